"""The model card: a README.md that says how a model was trained and how good it is."""

import contextlib
import dataclasses
import importlib.metadata
import math
import os
import platform
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from huggingface_hub import EvalResult, ModelCardData
from huggingface_hub.errors import HFValidationError
from huggingface_hub.utils import validate_repo_id

# Flags that a reader looks for, whether or not they have their default.
_ALWAYS_NAMED = frozenset(
    "doc_stride learning_rate lr_scheduler_type max_seq_length num_train_epochs "
    "per_device_eval_batch_size per_device_train_batch_size seed".split()
)
_PACKAGES = "mfac_jax jax optax flax transformers datasets".split()
_AUTO_CLASSES = {
    "text-classification": "AutoModelForSequenceClassification",
    "question-answering": "AutoModelForQuestionAnswering",
}
# Rows of the table; of more evaluations, as many are taken evenly.
_MAX_ROWS = 30


def named_flags(args: Any) -> dict[str, Any]:
    """Returns the flags a card lists: those that differ from their default, and more.

    Args:
      args: a dataclass. Its fields without a default, the model and the directory,
        belong elsewhere in the card.
    """
    return {
        field.name: getattr(args, field.name)
        for field in dataclasses.fields(args)
        if field.default is not dataclasses.MISSING
        and (field.name in _ALWAYS_NAMED or getattr(args, field.name) != field.default)
    }


def write_model_card(
    path: Path,
    *,
    model_name: str,
    dataset: str,
    task: str | None,
    optimizer: str,
    metrics: Sequence[str],
    results: Mapping[str, Any],
    hyperparams: Mapping[str, Any],
    command: str,
    lines: Sequence[Mapping[str, Any]],
    pipeline_tag: str = "text-classification",
) -> None:
    """Writes a model card that is there whole or not at all.

    Args:
      path: of the card; the model is called as its directory.
      model_name: what was fine-tuned: a hub id or a directory.
      dataset: what it was fine-tuned on: a hub id, a directory or a file.
      task: the configuration of the data set, if it has any.
      optimizer: its name.
      metrics: the names, without ``eval_``, of the results that count beside the loss.
      results: of the evaluation, under names with ``eval_``; empty without one.
      hyperparams: what to list; a mapping among them is listed in one line.
      command: what was run.
      lines: of `metrics.jsonl`.
      pipeline_tag: the hub's name for what the model does.
    """
    title = path.resolve().parent.name
    found = [name for name in metrics if f"eval_{name}" in results]
    values = {name: results[f"eval_{name}"] for name in found}
    index = _index(dataset, task, pipeline_tag, values)
    dataset_id = _hub_id(dataset)
    front_matter = ModelCardData(
        base_model=_hub_id(model_name),
        datasets=None if dataset_id is None else [dataset_id],
        library_name="transformers",
        metrics=found or None,
        pipeline_tag=pipeline_tag,
        tags=["jax", "flax", "optax", optimizer.lower()],
        model_name=title if index else None,
        eval_results=index or None,
    )
    data = _link(dataset, "datasets/")
    if task is not None:
        data = f"`{task}` of {data}"
    sections = [
        f"---\n{front_matter.to_yaml()}\n---",
        f"# {title}",
        f"This is {_link(model_name)}, fine-tuned on {data} with {optimizer}, in JAX.",
        _results(found, results),
        "## How to load it",
        _code("python", _loading(title, pipeline_tag)),
        "## Training",
        _code("bash", command),
        _bullets(hyperparams),
        *_table(metrics, lines),
        "## Versions",
        _bullets(_versions()),
    ]
    partial = path.with_name(f".{path.name}.partial")
    # A file name that is not UTF-8 can be part of the command.
    partial.write_text("\n\n".join(sections) + "\n", "utf-8", errors="replace")
    os.replace(partial, path)


def _index(
    dataset: str, task: str | None, pipeline_tag: str, values: Mapping[str, Any]
) -> list[EvalResult]:
    """Returns the results that the hub can list: those for data that it knows."""
    dataset_id = _hub_id(dataset)
    if dataset_id is None:
        return []
    return [
        EvalResult(
            task_type=pipeline_tag,
            task_name=_pretty(pipeline_tag),
            dataset_type=dataset_id,
            dataset_name=dataset_id if task is None else f"{dataset_id}, {task}",
            dataset_config=task,
            metric_type=name,
            metric_name=_pretty(name),
            metric_value=_number(value),
        )
        for name, value in values.items()
        # The hub reads the front matter as JSON, which has no NaN.
        if math.isfinite(_number(value))
    ]


def _results(metrics: Sequence[str], results: Mapping[str, Any]) -> str:
    found = {
        _pretty(name): _format(results[f"eval_{name}"])
        for name in ("loss", *metrics)
        if f"eval_{name}" in results
    }
    if not found:
        return "It was not evaluated."
    return f"On the evaluation data:\n\n{_bullets(found)}"


def _loading(title: str, pipeline_tag: str) -> str:
    auto_class = _AUTO_CLASSES.get(pipeline_tag, "AutoModel")
    return (
        f"from transformers import {auto_class}, AutoTokenizer\n\n"
        f"name = {title!r}  # The directory of this card, or its id on the hub.\n"
        f"model = {auto_class}.from_pretrained(name)\n"
        "tokenizer = AutoTokenizer.from_pretrained(name)"
    )


def _table(metrics: Sequence[str], lines: Sequence[Mapping[str, Any]]) -> list[str]:
    """Returns a table of evaluations, each beside the training loss logged last."""
    names = [
        n for n in ("loss", *metrics) if any(f"eval_{n}" in line for line in lines)
    ]
    rows, training_loss = [], ""
    for line in lines:
        if any(name.startswith("eval_") for name in line):
            values = [line.get(f"eval_{name}", "") for name in names]
            cells = [line.get("epoch", ""), training_loss, *values]
            rows.append([str(line.get("step", "")), *map(_format, cells)])
        training_loss = line.get("loss", training_loss)
    if not rows:
        return []
    chosen = np.linspace(0, len(rows) - 1, min(len(rows), _MAX_ROWS)).round()
    titles = ["Validation loss" if name == "loss" else _pretty(name) for name in names]
    head = ["Step", "Epoch", "Training loss", *titles]
    table = [head, ["---:"] * len(head), *(rows[int(i)] for i in chosen)]
    return ["\n".join(f"| {' | '.join(row)} |" for row in table)]


def _versions() -> dict[str, str]:
    versions = {"Python": platform.python_version()}
    for package in _PACKAGES:
        # Nothing is known of a package that runs from a checkout.
        with contextlib.suppress(importlib.metadata.PackageNotFoundError):
            versions[package] = importlib.metadata.version(package)
    return versions


def _is_local(name: str) -> bool:
    return os.path.isabs(name) or os.path.exists(name)


def _hub_id(name: str) -> str | None:
    """Returns a name of the form user/name that cannot mean a path here."""
    try:
        validate_repo_id(name)
    except HFValidationError:
        return None
    return name if "/" in name and not _is_local(name) else None


def _display_name(name: str) -> str:
    """Returns a name without the directories, which mean nothing elsewhere."""
    return os.path.basename(os.path.abspath(name)) if _is_local(name) else name


def _link(name: str, kind: str = "") -> str:
    if _hub_id(name) is None:
        return f"`{_display_name(name)}`"
    return f"[{name}](https://huggingface.co/{kind}{name})"


def _number(value: Any) -> float:
    try:
        return float(value)
    except (TypeError, ValueError, OverflowError):
        return math.nan


def _format(value: Any) -> str:
    number = _number(value)
    return str(value) if math.isnan(number) else f"{number:.4g}"


def _pretty(name: str) -> str:
    return re.sub("[_-]", " ", name).capitalize()


def _bullets(values: Mapping[str, Any]) -> str:
    return "\n".join(f"- {name}: `{_inline(v)}`" for name, v in values.items())


def _inline(value: Any) -> str:
    if isinstance(value, Mapping):
        return ", ".join(f"{name} = {_inline(v)}" for name, v in value.items())
    text = _display_name(value) if isinstance(value, str) else str(value)
    return " ".join(text.replace("`", "'").split())


def _code(language: str, text: str) -> str:
    longest = max(map(len, re.findall("`+", text)), default=0)
    fence = "`" * max(3, longest + 1)
    return f"{fence}{language}\n{text}\n{fence}"
