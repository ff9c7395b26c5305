"""Writes the model card: a README.md with a model's results and its training."""

import contextlib
import dataclasses
import importlib.metadata
import math
import os
import platform
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from huggingface_hub import EvalResult, ModelCardData

from bert_finetune.arguments import Arguments
from bert_finetune.files import write_text

# Flags that are listed even with their default.
_ALWAYS_NAMED = frozenset(
    "doc_stride learning_rate lr_scheduler_type max_seq_length num_train_epochs "
    "per_device_eval_batch_size per_device_train_batch_size seed".split()
)
_AUTO_CLASSES = {
    "text-classification": "AutoModelForSequenceClassification",
    "question-answering": "AutoModelForQuestionAnswering",
}
# Maximum rows of the table; more evaluations are sampled evenly.
_MAX_ROWS = 30

_Values = Mapping[str, float]


class Description(NamedTuple):
    """Names of a run, its data and its metrics, for reports."""

    title: str
    dataset: str  # A Hub id, a directory or a file.
    config: str | None  # Of the dataset, if it has several.
    metrics: Sequence[str]  # Without `eval_`, in addition to the loss.
    pipeline_tag: str  # The Hub's name for the kind of task.


def write_model_card(
    path: Path,
    args: Arguments,
    task: Description,
    hyperparams: Mapping[str, Any],
    results: _Values,
    lines: Sequence[_Values],
    command: str,
) -> None:
    """Writes a model card atomically; its title is the name of its directory.

    ``results`` holds the final evaluation, with the prefix ``eval_``, or is empty;
    ``lines`` are the lines of `metrics.jsonl`.
    """
    title = path.resolve().parent.name
    found = {name: results.get(f"eval_{name}") for name in ("loss", *task.metrics)}
    values = {name: value for name, value in found.items() if value is not None}
    base, data = _link(args.model_name_or_path), _link(task.dataset, "datasets/")
    if task.config is not None:
        data = f"`{task.config}` of {data}"
    auto_class = _AUTO_CLASSES[task.pipeline_tag]
    text = f"""\
---
{_front_matter(title, args, task, values)}
---

# {title}

This is {base}, fine-tuned on {data} with {args.optim}, in JAX.

{_evaluation(values)}

## How to load it

```python
from transformers import {auto_class}, AutoTokenizer

name = {title!r}  # The directory of this card, or its id on the Hub.
model = {auto_class}.from_pretrained(name)
tokenizer = AutoTokenizer.from_pretrained(name)
```

## Training

```bash
{command}
```

{_bullets(_flags(args, hyperparams))}

{_table([*values], lines)}## Versions

{_bullets(versions())}
"""
    write_text(path, text)


def _front_matter(
    title: str, args: Arguments, task: Description, values: _Values
) -> str:
    """Returns the metadata for the Hub; results are listed only for data on the Hub."""
    dataset = _hub_id(task.dataset)
    metrics = [name for name in values if name != "loss"]
    listed = [
        EvalResult(
            task_type=task.pipeline_tag,
            task_name=_pretty(task.pipeline_tag),
            dataset_type=dataset,
            dataset_name=", ".join(filter(None, [dataset, task.config])),
            dataset_config=task.config,
            metric_type=name,
            metric_name=_pretty(name),
            metric_value=values[name],
        )
        for name in metrics
        # The Hub reads the front matter as JSON, which has no NaN.
        if dataset is not None and math.isfinite(values[name])
    ]
    return ModelCardData(
        base_model=_hub_id(args.model_name_or_path),
        datasets=None if dataset is None else [dataset],
        library_name="transformers",
        metrics=metrics or None,
        pipeline_tag=task.pipeline_tag,
        tags=["jax", "flax", "optax", args.optim.lower()],
        model_name=title if listed else None,
        eval_results=listed or None,
    ).to_yaml()


def _evaluation(values: _Values) -> str:
    if not values:
        return "It was not evaluated."
    shown = {_pretty(name): _format(value) for name, value in values.items()}
    return f"On the evaluation data:\n\n{_bullets(shown)}"


def _flags(args: Arguments, hyperparams: Mapping[str, Any]) -> dict[str, Any]:
    """Returns the flags that differ from their default or are always listed."""
    flags = {
        field.name: getattr(args, field.name)
        for field in dataclasses.fields(args)
        # Model and output directory have no default; they are elsewhere in the card.
        if field.default is not dataclasses.MISSING
        and (field.name in _ALWAYS_NAMED or getattr(args, field.name) != field.default)
    }
    flags["learning_rate"] = hyperparams["lr"]
    return {**flags, args.optim: hyperparams}


def _table(names: Sequence[str], lines: Sequence[_Values]) -> str:
    """Returns a table of evaluations, each with the latest logged training loss."""
    rows, training_loss = [], None
    for line in lines:
        values = [line.get(f"eval_{name}") for name in names]
        if any(value is not None for value in values):
            cells = map(_format, [line["epoch"], training_loss, *values])
            rows.append([str(line["step"]), *cells])
        training_loss = line.get("loss", training_loss)
    if not rows:
        return ""
    chosen = np.linspace(0, len(rows) - 1, min(len(rows), _MAX_ROWS)).round()
    titles = ["Validation loss" if name == "loss" else _pretty(name) for name in names]
    head = ["Step", "Epoch", "Training loss", *titles]
    table = [head, ["---:"] * len(head), *(rows[int(i)] for i in chosen)]
    return "\n".join(f"| {' | '.join(row)} |" for row in table) + "\n\n"


def versions() -> dict[str, str]:
    """Returns the versions of Python and the main packages."""
    found = {"python": platform.python_version()}
    for package in "mfac_jax jax optax flax transformers datasets".split():
        # A package that runs from a checkout may have no metadata.
        with contextlib.suppress(importlib.metadata.PackageNotFoundError):
            found[package] = importlib.metadata.version(package)
    return found


def _is_local(name: str) -> bool:
    return os.path.isabs(name) or os.path.exists(name)


def _hub_id(name: str) -> str | None:
    """Returns the name if it is a Hub id (user/name), not a path; else ``None``."""
    is_id = re.fullmatch(r"[\w.-]+/[\w.-]+", name) and not _is_local(name)
    return name if is_id else None


def _link(name: str, kind: str = "") -> str:
    link = f"[{name}](https://huggingface.co/{kind}{name})"
    return f"`{_inline(name)}`" if _hub_id(name) is None else link


def _format(value: float | None) -> str:
    return "" if value is None else f"{value:.4g}"


def _pretty(name: str) -> str:
    return re.sub("[_-]", " ", name).capitalize()


def _bullets(values: Mapping[str, Any]) -> str:
    return "\n".join(f"- {name}: `{_inline(v)}`" for name, v in values.items())


def _inline(value: Any) -> str:
    """Formats a value on one line; a path loses its directories."""
    if isinstance(value, Mapping):
        return ", ".join(f"{name} = {_inline(v)}" for name, v in value.items())
    if isinstance(value, str) and _is_local(value):
        value = os.path.basename(os.path.abspath(value))
    return " ".join(str(value).replace("`", "'").split())
