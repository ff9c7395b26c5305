"""The metrics of the GLUE tasks."""

import functools
from collections.abc import Sequence
from typing import Any

import numpy as np
from sklearn.metrics import accuracy_score, f1_score

_NO_POSITIVES: Any = 0  # Annotated as a string in scikit-learn.
_METRICS = {
    "accuracy": accuracy_score,
    "f1": functools.partial(f1_score, zero_division=_NO_POSITIVES),
}


def glue_metrics(
    names: Sequence[str], labels: np.ndarray, predictions: np.ndarray
) -> dict[str, float]:
    """Returns the metrics by name; of more than one, also their mean.

    Args:
      names: out of ``accuracy`` and ``f1`` (of the label 1).
      labels: integers, shape ``(examples,)``.
      predictions: integers, shape ``(examples,)``.
    """
    values = {name: float(_METRICS[name](labels, predictions)) for name in names}
    if len(names) > 1:
        values["combined_score"] = float(np.mean(list(values.values())))
    return values
