"""Files written atomically."""

import json
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from bert_finetune.errors import UserError


def write_text(path: Path, text: str) -> None:
    """Writes a file atomically, in UTF-8."""
    partial = path.with_name(f".{path.name}.partial")
    # Names of files need not be UTF-8.
    partial.write_text(text, "utf-8", errors="replace")
    os.replace(partial, path)


def write_json(path: Path, content: Mapping[str, Any]) -> None:
    """Writes a JSON file atomically."""
    write_text(path, json.dumps(content, indent=4, sort_keys=True) + "\n")


def append_json_line(path: Path, content: Mapping[str, Any]) -> None:
    """Appends one line to a `.jsonl` file."""
    with open(path, "a") as file:
        file.write(json.dumps(content) + "\n")


def write_json_lines(path: Path, contents: Sequence[Mapping[str, Any]]) -> None:
    """Writes a `.jsonl` file atomically."""
    write_text(path, "".join(json.dumps(content) + "\n" for content in contents))


def read_json_lines(path: Path) -> list[dict[str, Any]]:
    """Reads a `.jsonl` file, without a last line that a killed run left torn."""
    lines = path.read_bytes().splitlines()
    contents = []
    for number, line in enumerate(lines, start=1):
        try:
            content = json.loads(line)
        except ValueError:
            content = None
        if isinstance(content, dict):
            contents.append(content)
        elif number < len(lines):
            raise UserError(f"line {number} of {path} is not an object in JSON.")
    return contents
