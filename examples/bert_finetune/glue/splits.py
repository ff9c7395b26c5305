"""The splits of a classification or regression task, checked."""

from collections.abc import Iterable
from typing import Any, NamedTuple

import datasets
import numpy as np
import pyarrow.types
from transformers import BertConfig

from bert_finetune.arguments import GlueArguments
from bert_finetune.data import sources
from bert_finetune.errors import UserError
from bert_finetune.glue.tasks import TASKS, GlueTask, task_of_files

LABEL = "label"
_LARGEST = float(np.finfo(np.float32).max)


class Split(NamedTuple):
    """Texts, with int32 indices into the task's label names or float32 numbers.

    The labels of a test split are zeros, which nobody reads.
    """

    dataset: datasets.Dataset
    labels: np.ndarray


def find_task(args: GlueArguments, config: BertConfig) -> GlueTask:
    """Returns the task that the flags name, or that their files hold.

    The labels of files are those of the training file; without one, those that the
    model was trained on.
    """
    name = args.task_name
    if name is not None:
        if name not in TASKS:
            known = ", ".join(TASKS)
            raise UserError(f"--task_name must be one of {known}, got {name!r}.")
        return TASKS[name]
    path = args.train_file if args.do_train else args.validation_file or args.test_file
    assert path is not None, "the flags have been checked"
    dataset = sources.load_files([path])
    text_columns = _find_text_columns(dataset, path)
    if not args.do_train:
        assert config.id2label is not None
        return task_of_files(text_columns, list(config.id2label.values()))
    dataset = sources.select(dataset, text_columns, [LABEL], None, path)
    labels = dataset.data.column(LABEL)
    values = [] if pyarrow.types.is_nested(labels.type) else labels.unique().to_pylist()
    if any(isinstance(value, float) for value in values):
        return task_of_files(text_columns, ["score"])
    # A .csv has an empty text where a label is missing.
    if None in values or "" in values or len(values) < 2:
        raise UserError(
            f"the labels of {path} must be two or more names or integers, or numbers "
            f"to predict, got {_shown(values)}."
        )
    return task_of_files(text_columns, [str(value) for value in sorted(values)])


def _find_text_columns(dataset: datasets.Dataset, path: str) -> list[str]:
    columns = dataset.column_names
    names = [n for n in columns if n != LABEL and sources.holds_text(dataset, n)]
    if not names:
        found = ", ".join(columns)
        raise UserError(f"{path} has no text column besides {LABEL!r}; it has {found}.")
    usual = ["sentence1", "sentence2"]
    return usual if set(usual) <= set(names) else names[:2]


def load_split(
    args: GlueArguments, task: GlueTask, split: str, max_samples: int | None
) -> Split:
    """Loads the first examples of a split and checks its texts and labels.

    The first word of the split's name in GLUE says which file it is.
    """
    kind = split.split("_")[0]
    file: str | None = getattr(args, f"{kind}_file")
    if file is not None:
        dataset, where = sources.load_files([file]), file
    else:
        where = f"the {split} split of {args.task_name} in {args.dataset_name}"
        dataset = sources.load(args.dataset_name, args.task_name, split)
    others = [] if kind == "test" else [LABEL]
    dataset = sources.select(dataset, task.text_columns, others, max_samples, where)
    if kind == "test":
        return Split(dataset, np.zeros(len(dataset), np.int32))
    return Split(dataset, _labels(dataset[LABEL][:], task, where))


def _labels(values: list[Any], task: GlueTask, where: str) -> np.ndarray:
    names = task.label_names
    index: dict[Any, int] = {name: i for i, name in enumerate(names)}
    if task.is_regression:
        low, high = task.label_range or (-_LARGEST, _LARGEST)
        limits = f" from {low:g} to {high:g}" if task.label_range else ""
        expected = f"numbers{limits}"
        bad = [
            v for v in values if not (isinstance(v, int | float) and low <= v <= high)
        ]
    else:
        if task in TASKS.values():
            expected = f"integers from 0 to {len(names) - 1} or {', '.join(names)}"
            index |= {i: i for i in range(len(names))}
        else:
            expected = f"among {', '.join(names)}"
            values = [str(value) for value in values]
        bad = [v for v in values if isinstance(v, list | dict) or v not in index]
    if bad:
        hint = " (-1 stands for a label that is not public)" if -1 in bad else ""
        got = f"{_shown(bad)}{hint}"
        raise UserError(f"the labels of {where} must be {expected}, got {got}.")
    if task.is_regression:
        return np.asarray(values, np.float32)
    return np.asarray([index[value] for value in values], np.int32)


def _shown(values: Iterable[Any]) -> str:
    return f"[{', '.join(sorted({repr(value) for value in values})[:5])}]"
