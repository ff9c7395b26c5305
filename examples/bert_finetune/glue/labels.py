"""Infers whether labels are classes or numbers, and converts them to arrays."""

import collections
import decimal
import math
import re
import sys
import unicodedata
from collections.abc import Sequence
from typing import Any

import numpy as np
from transformers import BertConfig

from bert_finetune.data.sources import Source, check_characters
from bert_finetune.errors import UserError
from bert_finetune.glue.tasks import GlueTask

LABEL = "label"
# Python's int() takes at most a few thousand digits.
_INTEGER = re.compile(r"[-+]?\d{1,300}")
_NUMBER = re.compile(r"[-+]?(\d+\.?\d*|\.\d+)([eE][-+]?\d+)?")
_LARGEST = float(np.finfo(np.float32).max)


def find_names(source: Source) -> list[str] | None:
    """Returns the class names, or ``None`` for regression.

    Names may be integers. Floats are regression targets; so are labels of a .csv or
    .tsv if all are numbers and at least one is not an integer.
    """
    labels = _stripped(source, source.values(LABEL))
    for at, value in labels:
        if value is None or value == "" or value != value:
            raise UserError(
                f"{at} has the label {value!r}: fill it in, or remove the row."
            )
        if not isinstance(value, str | int | float | decimal.Decimal):
            raise UserError(f"label {value!r:.80} at {at} must be a name or a number.")
    names = {str(value) for _, value in labels}
    numbers = set(filter(_NUMBER.fullmatch, names))
    has_decimals = not all(map(_INTEGER.fullmatch, numbers))
    are_typed = any(isinstance(v, float | decimal.Decimal) for _, v in labels)
    for at, value in labels if has_decimals or are_typed else []:
        is_odd = not _is_typed_number(value) if are_typed else str(value) not in numbers
        if is_odd:
            raise UserError(
                f"label {value!r:.80} at {at} is not a number, but other labels are: "
                "correct it, or remove the row."
            )
    if are_typed or (source.is_text and has_decimals):
        if all(float(value).is_integer() for _, value in labels):
            what = f"the labels of {source.where} are whole numbers written as decimals"
            print(f"warning: {what}: they become regression targets.", file=sys.stderr)
        return None
    check_names(sorted(names), source.where)
    if len(names) < 2:
        raise UserError(
            f"the labels of {source.where} must be two or more names or integers, or "
            f"decimal numbers for regression; all are {labels[0][1]!r}."
        )
    _warn_of_spellings(sorted(names), source.where)
    if all(map(_INTEGER.fullmatch, names)):
        return sorted(names, key=lambda name: (int(name), name))
    if all(map(_NUMBER.fullmatch, names)):
        what = f"the {len(names)} class names of {source.where} are numbers"
        remedy = "for regression, write them without quotes"
        print(f"warning: {what}, such as {min(names)!r}: {remedy}.", file=sys.stderr)
    return sorted(names)


def _stripped(source: Source, values: Any) -> list[tuple[str, Any]]:
    """Returns labels with their locations, stripped of whitespace."""
    stripped = []
    for at, value in source.numbered(values):
        if isinstance(value, str):
            check_characters(value, f"the label at {at}")
            value = value.strip()
        stripped.append((at, value))
    return stripped


def _warn_of_spellings(names: Sequence[str], where: str) -> None:
    """Warns about names that may be spellings of the same class."""
    seen: dict[Any, str] = {}
    for name in names:
        plain = unicodedata.normalize("NFC", name).casefold()
        other = seen.setdefault(int(name) if _INTEGER.fullmatch(name) else plain, name)
        if other != name:
            what = f"{other!r} and {name!r} are different classes of {where}"
            print(f"warning: {what}.", file=sys.stderr)


def _is_typed_number(value: Any) -> bool:
    is_number = isinstance(value, int | float | decimal.Decimal)
    return is_number and not isinstance(value, bool)


def check_names(names: Sequence[str], where: str) -> None:
    """Raises a UserError for names that would break a line of predictions."""
    torn = [name for name in names if re.search(r"[\t\n\r]", name)]
    if torn:
        what = f"label {torn[0]!r} of {where} contains a tab or a line break"
        raise UserError(f"{what}: rename it.")


def names_of(config: BertConfig) -> list[str]:
    """Returns a model's label names, in the order of its logits."""
    return [str(name) for _, name in sorted((config.id2label or {}).items())]


def match(names: Sequence[str], known: Sequence[str]) -> list[int] | None:
    """Returns each name's index in ``known``, or ``None`` if the names differ.

    Case is ignored, and `1` matches `LABEL_1`.
    """
    keys, known_keys = list(map(_key, names)), list(map(_key, known))
    if sorted(keys) != sorted(known_keys) or len(set(keys)) < len(keys):
        return None
    return [known_keys.index(key) for key in keys]


def are_generic(names: Sequence[str]) -> bool:
    """Returns whether the names are the defaults `LABEL_0`, `LABEL_1` and so on."""
    return all(re.fullmatch(r"LABEL_\d+", name) for name in names)


def _key(name: str) -> str:
    return name.casefold().removeprefix("label_")


def to_array(source: Source, values: Any, task: GlueTask) -> np.ndarray:
    """Returns float32 regression targets, or int32 indices of the task's classes."""
    if task.is_regression:
        return np.asarray(_numbers(source, values, task.label_range), np.float32)
    names, counts = task.label_names, collections.Counter(map(_key, task.label_names))
    index = {_key(n): i for i, n in enumerate(names) if counts[_key(n)] == 1}
    index |= {name: i for i, name in enumerate(names)}
    expected = f"one of {', '.join(names[:10])}{', ...' if len(names) > 10 else ''}"
    if task.is_numbered:
        index = {**{str(i): i for i in range(len(names))}, **index}
        expected = f"an integer from 0 to {len(names) - 1} or {expected}"
    if are_generic(names):
        expected = f"an integer from 0 to {len(names) - 1}, as the model has no names"
    found = []
    for at, value in _stripped(source, values):
        name = str(value)
        label = index.get(name, index.get(_key(name)))
        if label is None and _NUMBER.fullmatch(name) and float(name).is_integer():
            name = str(int(float(name)))  # 1.0 is 1.
            label = index.get(name, index.get(_key(name)))
        if label is None:
            hint = " (-1 marks labels that are not public)" if name == "-1" else ""
            raise UserError(f"label {value!r:.80} at {at} must be {expected}{hint}.")
        found.append(label)
    return np.asarray(found, np.int32)


def _numbers(
    source: Source, values: Any, label_range: tuple[float, float] | None
) -> list[float]:
    low, high = label_range or (-_LARGEST, _LARGEST)
    expected = "a number in the range of float32"
    if label_range:
        expected = f"a number from {low:g} to {high:g}"
    found = []
    for at, value in _stripped(source, values):
        is_number = _is_typed_number(value) or (
            isinstance(value, str) and _NUMBER.fullmatch(value)
        )
        number = float(value) if is_number else math.nan
        if not low <= number <= high:
            raise UserError(f"label {value!r:.80} at {at} must be {expected}.")
        found.append(number)
    return found
