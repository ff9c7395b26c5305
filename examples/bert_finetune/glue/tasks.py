"""The nine GLUE tasks, and a task made of files of one's own."""

from collections.abc import Mapping, Sequence
from typing import NamedTuple


class GlueTask(NamedTuple):
    """A task of classification, or of regression if it has one label only.

    Attributes:
      text_columns: one or two.
      label_names: in the order of the labels in the data.
      metrics: as GLUE reports them.
      eval_splits: split -> what its results end in.
      test_splits: split -> the file of predictions.
      writes_names: whether GLUE takes predictions as names of labels.
      label_range: of a regression; ``None`` is any.
    """

    text_columns: Sequence[str]
    label_names: Sequence[str]
    metrics: Sequence[str]
    eval_splits: Mapping[str, str]
    test_splits: Mapping[str, str]
    writes_names: bool = False
    label_range: tuple[float, float] | None = None

    @property
    def is_regression(self) -> bool:
        return len(self.label_names) == 1


REGRESSION_METRICS = ("pearson", "spearmanr")
_SENTENCES = ("sentence1", "sentence2")
_VALIDATION = {"validation": ""}

TASKS = {
    "cola": GlueTask(
        ("sentence",),
        ("unacceptable", "acceptable"),
        ("matthews_correlation",),
        _VALIDATION,
        {"test": "CoLA.tsv"},
    ),
    "sst2": GlueTask(
        ("sentence",),
        ("negative", "positive"),
        ("accuracy",),
        _VALIDATION,
        {"test": "SST-2.tsv"},
    ),
    "mrpc": GlueTask(
        _SENTENCES,
        ("not_equivalent", "equivalent"),
        ("accuracy", "f1"),
        _VALIDATION,
        {"test": "MRPC.tsv"},
    ),
    "qqp": GlueTask(
        ("question1", "question2"),
        ("not_duplicate", "duplicate"),
        ("accuracy", "f1"),
        _VALIDATION,
        {"test": "QQP.tsv"},
    ),
    "stsb": GlueTask(
        _SENTENCES,
        ("similarity",),
        REGRESSION_METRICS,
        _VALIDATION,
        {"test": "STS-B.tsv"},
        label_range=(0.0, 5.0),
    ),
    "mnli": GlueTask(
        ("premise", "hypothesis"),
        ("entailment", "neutral", "contradiction"),
        ("accuracy",),
        {"validation_matched": "", "validation_mismatched": "_mm"},
        {"test_matched": "MNLI-m.tsv", "test_mismatched": "MNLI-mm.tsv"},
        writes_names=True,
    ),
    "qnli": GlueTask(
        ("question", "sentence"),
        ("entailment", "not_entailment"),
        ("accuracy",),
        _VALIDATION,
        {"test": "QNLI.tsv"},
        writes_names=True,
    ),
    "rte": GlueTask(
        _SENTENCES,
        ("entailment", "not_entailment"),
        ("accuracy",),
        _VALIDATION,
        {"test": "RTE.tsv"},
        writes_names=True,
    ),
    "wnli": GlueTask(
        _SENTENCES,
        ("not_entailment", "entailment"),
        ("accuracy",),
        _VALIDATION,
        {"test": "WNLI.tsv"},
    ),
}


def task_of_files(text_columns: Sequence[str], label_names: Sequence[str]) -> GlueTask:
    """Returns the task of data that have these columns and labels."""
    return GlueTask(
        text_columns,
        label_names,
        REGRESSION_METRICS if len(label_names) == 1 else ("accuracy",),
        _VALIDATION,
        {"test": "predictions.tsv"},
        writes_names=True,
    )
