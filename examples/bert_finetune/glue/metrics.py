"""The metrics of the GLUE tasks."""

import functools
import math
from collections.abc import Sequence
from typing import Any

import numpy as np
from scipy import stats
from sklearn.metrics import (
    accuracy_score,
    f1_score,
    matthews_corrcoef,
    mean_squared_error,
)

_NO_POSITIVES: Any = 0  # scikit-learn annotates it as a string.


def _correlation(function: Any, labels: np.ndarray, predictions: np.ndarray) -> float:
    # Undefined if either side is constant; SciPy would warn.
    if np.ptp(labels) == 0 or np.ptp(predictions) == 0:
        return math.nan
    return function(labels, predictions).statistic


_METRICS = {
    "accuracy": accuracy_score,
    "f1": functools.partial(f1_score, zero_division=_NO_POSITIVES),
    "matthews_correlation": matthews_corrcoef,
    "mse": mean_squared_error,
    "pearson": functools.partial(_correlation, stats.pearsonr),
    "spearmanr": functools.partial(_correlation, stats.spearmanr),
}


def glue_metrics(
    names: Sequence[str], labels: np.ndarray, predictions: np.ndarray
) -> dict[str, float]:
    """Returns the metrics by name, and the mean if there are several scores.

    Labels and predictions have shape ``(examples,)``; F1 takes label 1 as positive.
    """
    values = {name: float(_METRICS[name](labels, predictions)) for name in names}
    scores = [value for name, value in values.items() if name != "mse"]
    if len(scores) > 1:
        values["combined_score"] = float(np.mean(scores))
    return values
