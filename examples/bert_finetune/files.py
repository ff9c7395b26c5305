"""Reads and writes text and JSON; only the first process of a run writes."""

import json
import math
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import jax

from bert_finetune.errors import UserError


def write_text(path: Path, text: str) -> None:
    """Writes a file atomically, in UTF-8."""
    if jax.process_index() > 0:
        return
    partial = path.with_name(f".{path.name}.partial")
    # The text may contain file names that are not UTF-8.
    partial.write_text(text, "utf-8", errors="replace")
    os.replace(partial, path)


def write_json(path: Path, content: Mapping[str, Any]) -> None:
    """Writes a JSON file atomically; non-finite numbers become null."""
    text = json.dumps(_finite(content), indent=4, sort_keys=True, allow_nan=False)
    write_text(path, text + "\n")


def _finite(content: Any) -> Any:
    if isinstance(content, Mapping):
        return {name: _finite(value) for name, value in content.items()}
    if isinstance(content, list | tuple):
        return [_finite(value) for value in content]
    is_odd = isinstance(content, float) and not math.isfinite(content)
    return None if is_odd else content


def append_json_line(path: Path, content: Mapping[str, Any]) -> None:
    """Appends one line to a `.jsonl` file."""
    if jax.process_index() > 0:
        return
    with open(path, "a") as file:
        file.write(json.dumps(_finite(content), allow_nan=False) + "\n")


def write_json_lines(path: Path, contents: Sequence[Mapping[str, Any]]) -> None:
    """Writes a `.jsonl` file atomically."""
    lines = [json.dumps(_finite(content), allow_nan=False) for content in contents]
    write_text(path, "".join(f"{line}\n" for line in lines))


def read_numbers(text: str | bytes) -> Any:
    """Parses JSON; null values of objects become NaN."""
    return json.loads(text, object_hook=_with_nan)


def _with_nan(content: dict[str, Any]) -> dict[str, Any]:
    return {k: math.nan if v is None else v for k, v in content.items()}


def read_json_lines(path: Path) -> list[dict[str, Any]]:
    """Reads a `.jsonl` file; drops a last line that a killed run left truncated."""
    lines = path.read_bytes().splitlines()
    contents = []
    for number, line in enumerate(lines, start=1):
        try:
            content = read_numbers(line)
        except ValueError:
            content = None
        if isinstance(content, dict):
            contents.append(content)
        elif number < len(lines):
            raise UserError(f"line {number} of {path} is not a JSON object.")
    return contents
