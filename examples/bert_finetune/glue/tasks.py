"""The nine GLUE tasks, and a task for your own files."""

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple


class GlueTask(NamedTuple):
    """A classification task, or a regression task if it has a single label."""

    text_columns: Sequence[str]  # One or two.
    label_names: Sequence[str]  # In the order of the data's label indices.
    metrics: Sequence[str]  # As GLUE reports them.
    eval_splits: Mapping[str, str]  # Split -> suffix of its metrics.
    test_splits: Mapping[str, str]  # Split -> its prediction file.
    writes_names: bool = False  # Whether predictions are label names.
    is_numbered: bool = False  # Whether data may use label indices.
    label_range: tuple[float, float] | None = None  # Regression only; None: any.

    @property
    def is_regression(self) -> bool:
        return len(self.label_names) == 1


def _task(texts: str, labels: str, metrics: str, file: str, **others: Any) -> GlueTask:
    splits = {"eval_splits": {"validation": ""}, "test_splits": {"test": file}}
    words = texts.split(), labels.split(), metrics.split()
    return GlueTask(*words, **{**splits, "is_numbered": True, **others})


_SENTENCES = "sentence1 sentence2"
_ENTAILMENT = "entailment not_entailment"

TASKS = {
    "cola": _task(
        "sentence", "unacceptable acceptable", "matthews_correlation", "CoLA.tsv"
    ),
    "sst2": _task("sentence", "negative positive", "accuracy", "SST-2.tsv"),
    "mrpc": _task(_SENTENCES, "not_equivalent equivalent", "accuracy f1", "MRPC.tsv"),
    "qqp": _task(
        "question1 question2", "not_duplicate duplicate", "accuracy f1", "QQP.tsv"
    ),
    "stsb": _task(
        _SENTENCES,
        "similarity",
        "pearson spearmanr",
        "STS-B.tsv",
        label_range=(0.0, 5.0),
    ),
    "mnli": _task(
        "premise hypothesis",
        "entailment neutral contradiction",
        "accuracy",
        "",
        eval_splits={"validation_matched": "", "validation_mismatched": "_mm"},
        test_splits={"test_matched": "MNLI-m.tsv", "test_mismatched": "MNLI-mm.tsv"},
        writes_names=True,
    ),
    "qnli": _task(
        "question sentence", _ENTAILMENT, "accuracy", "QNLI.tsv", writes_names=True
    ),
    "rte": _task(_SENTENCES, _ENTAILMENT, "accuracy", "RTE.tsv", writes_names=True),
    "wnli": _task(_SENTENCES, "not_entailment entailment", "accuracy", "WNLI.tsv"),
}


def task_of_files(text_columns: Sequence[str], label_names: Sequence[str]) -> GlueTask:
    """Returns the task of data with these columns and labels."""
    regression = ("mse", "pearson", "spearmanr")
    return GlueTask(
        text_columns,
        label_names,
        regression if len(label_names) == 1 else ("accuracy",),
        {"validation": ""},
        {"test": "predictions.tsv"},
        writes_names=True,
    )
