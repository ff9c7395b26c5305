"""Finds the task that the flags name, and loads its splits."""

from typing import Any, NamedTuple

import datasets
import numpy as np
from transformers import BertConfig

from bert_finetune.arguments import GlueArguments
from bert_finetune.data import sources
from bert_finetune.errors import UserError
from bert_finetune.glue import labels
from bert_finetune.glue.tasks import TASKS, GlueTask, task_of_files

# Columns that hold row numbers.
_ROW_NUMBERS = ("", "id", "idx", "index", "guid", "unnamed: 0", "__index_level_0__")


class Split(NamedTuple):
    """Texts with labels: int32 class indices, or float32 regression targets.

    The labels of a test split are zeros and unused.
    """

    dataset: datasets.Dataset
    labels: np.ndarray


def find_task(args: GlueArguments, config: BertConfig) -> GlueTask:
    """Returns the task that ``--task_name`` names, or infers one from the data.

    The training split determines the inferred task or, without training, the config of
    the model.
    """
    name = args.task_name
    if name is not None:
        if name not in TASKS:
            known = ", ".join(TASKS)
            raise UserError(f"--task_name must be one of {known}, got {name!r}.")
        return TASKS[name]
    split = "validation" if args.do_eval else "test"
    source = _load(args, "train" if args.do_train else split)
    if not args.do_train:
        return _task_of_model(config, source)
    names = labels.find_names(source)
    return task_of_files(_find_text_columns(source), names or ["score"])


def _task_of_model(config: BertConfig, source: sources.Source) -> GlueTask:
    names = labels.names_of(config)
    task = TASKS.get(str(getattr(config, "finetuning_task", None)).lower())
    columns: Any = getattr(config, "text_columns", None)
    if not isinstance(columns, list) or not all(isinstance(c, str) for c in columns):
        columns = None
    missing = [column for column in columns or [] if column not in source.columns]
    if missing:
        raise UserError(
            f"{source.where} has no column {missing[0]!r}, which the model was trained "
            f"on; it has {', '.join(map(repr, source.columns))}: rename one."
        )
    if task is not None and set(task.text_columns) <= source.columns.keys():
        columns = columns or task.text_columns
    found = task_of_files(columns or _find_text_columns(source), names)
    if task is None or labels.match(task.label_names, names) is None:
        return found
    return found._replace(
        label_names=task.label_names,
        metrics=task.metrics,
        is_numbered=True,
        label_range=task.label_range,
    )


def _find_text_columns(source: sources.Source) -> list[str]:
    """Returns sentence1 and sentence2, else the first columns, like Hugging Face."""
    usual, names = ["sentence1", "sentence2"], set(source.columns) - {labels.LABEL}
    rest = [n for n in source.columns if n in names and n.lower() not in _ROW_NUMBERS]
    texts = usual if names.issuperset(usual) else rest[:2]
    if not texts:
        found = ", ".join(map(repr, source.columns))
        raise UserError(f"{source.where} has no text column; it has {found}.")
    unused = ", ".join(
        repr(name) for name in source.columns if name in names - {*texts}
    )
    if unused:
        print(f"Unused columns of {source.where}: {unused}.")
    return texts


def _load(args: GlueArguments, split: str) -> sources.Source:
    """Loads a split; ``validation_matched`` is in ``--validation_file``, if given."""
    file: str | None = getattr(args, f"{split.split('_')[0]}_file")
    if file is not None:
        return sources.load_file(file)
    assert args.dataset_name is not None, "the flags have been checked"
    config = args.task_name or args.dataset_config_name
    return sources.load(args.dataset_name, config, split)


def load_split(
    args: GlueArguments, task: GlueTask, split: str, max_samples: int | None
) -> Split:
    """Loads the first examples of a split and validates its texts and labels."""
    source = _load(args, split)
    texts = {name: source.texts(name, max_samples) for name in task.text_columns}
    dataset = sources.dataset_of(texts)
    if split.startswith("test"):
        return Split(dataset, np.zeros(len(dataset), np.int32))
    values = source.values(labels.LABEL, max_samples)
    return Split(dataset, labels.to_array(source, values, task))
