"""The splits of a classification or regression task, checked."""

from collections.abc import Sequence
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


class Split(NamedTuple):
    """Examples of a task.

    Attributes:
      dataset: holds the text columns.
      labels: int32 indices into the task's ``label_names``, or float32 numbers; zeros
        for a test split, whose labels nobody reads.
    """

    dataset: datasets.Dataset
    labels: np.ndarray


def find_task(args: GlueArguments, config: BertConfig) -> GlueTask:
    """Returns the task that the flags name, or that their files hold.

    The labels of files are those of the training file; without one, those that the
    model was trained on.

    Raises:
      UserError: for an unknown task, or files that cannot be used.
    """
    if args.task_name is not None:
        if args.task_name not in TASKS:
            raise UserError(
                f"--task_name must be one of {', '.join(TASKS)}, got "
                f"{args.task_name!r}."
            )
        return TASKS[args.task_name]
    path = args.train_file if args.do_train else None
    path = path or args.validation_file or args.test_file
    assert path is not None, "the flags have been checked"
    dataset = sources.load_files([path])
    text_columns = _find_text_columns(dataset, path)
    if not args.do_train:
        assert config.id2label is not None
        return task_of_files(text_columns, list(config.id2label.values()))
    sources.check_columns(dataset, [LABEL], path)
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
    names = [name for name in dataset.column_names if sources.holds_text(dataset, name)]
    names = [name for name in names if name != LABEL]
    if not names:
        raise UserError(
            f"{path} has no column of texts beside {LABEL!r}; it has "
            f"{', '.join(dataset.column_names)}."
        )
    usual = ["sentence1", "sentence2"]
    return usual if set(usual) <= set(names) else names[:2]


def load_split(
    args: GlueArguments, task: GlueTask, split: str, max_samples: int | None
) -> Split:
    """Loads a split and checks its texts and labels.

    Args:
      args: the flags, which say where it is.
      task: of the flags.
      split: a name in GLUE; its first word says which file it is.
      max_samples: keep the first examples only.

    Raises:
      UserError: if the split or one of its columns is not there, or of the wrong kind.
    """
    kind = split.split("_")[0]
    file: str | None = getattr(args, f"{kind}_file")
    if file is not None:
        dataset, where = sources.load_files([file]), file
    else:
        where = f"the {split} split of {args.task_name} in {args.dataset_name}"
        dataset = sources.load(args.dataset_name, args.task_name, split)
    columns = [*task.text_columns, *([] if kind == "test" else [LABEL])]
    sources.check_columns(dataset, columns, where)
    if max_samples is not None:
        dataset = dataset.select(range(min(max_samples, len(dataset))))
    sources.check_texts(dataset, task.text_columns, where)
    if kind == "test":
        return Split(dataset, np.zeros(len(dataset), np.int32))
    values = dataset[LABEL][:]
    find_labels = _label_numbers if task.is_regression else _label_indices
    return Split(dataset, find_labels(values, task, where))


def _label_numbers(values: Sequence[Any], task: GlueTask, where: str) -> np.ndarray:
    low, high = task.label_range or (-np.inf, np.inf)
    numbers = [value for value in values if isinstance(value, int | float)]
    if len(numbers) < len(values) or not all(
        low <= number <= high and np.isfinite(number) for number in numbers
    ):
        raise UserError(
            f"the labels of {where} must be numbers"
            + (f" from {low:g} to {high:g}" if task.label_range else "")
            + f", got {_shown(values)}."
        )
    return np.asarray(numbers, np.float32)


def _label_indices(values: Sequence[Any], task: GlueTask, where: str) -> np.ndarray:
    names = task.label_names
    index = {name: i for i, name in enumerate(names)}
    if task in TASKS.values():
        expected = f"integers from 0 to {len(names) - 1} or {', '.join(names)}"
        index |= {i: i for i in range(len(names))}
    else:
        expected = f"among {', '.join(names)}"
        values = [str(value) for value in values]
    unknown = [
        value
        for value in values
        if isinstance(value, list | dict) or value not in index
    ]
    if unknown:
        hint = " (-1 stands for a label that is not public)" if -1 in unknown else ""
        raise UserError(
            f"the labels of {where} must be {expected}, got {_shown(unknown)}{hint}."
        )
    return np.asarray([index[value] for value in values], np.int32)


def _shown(values: Sequence[Any]) -> str:
    return f"[{', '.join(sorted({repr(value) for value in values})[:5])}]"
