"""Reads and appends to the tables of results: JSON Lines, one measured row per line."""

import datetime
import json
import os
import platform
import shlex
import shutil
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import jax

Row = Mapping[str, Any]
RESULTS = Path(__file__).parent / "results"


def read_rows(path: Path) -> list[dict[str, Any]]:
    """Returns the rows of a table; none if there is no such file."""
    lines = path.read_text().splitlines() if path.exists() else []
    return [json.loads(line) for line in lines]


def append_row(path: Path | None, row: Row) -> None:
    """Appends a row with its date, device, versions, commit and command.

    Does nothing if `path` is None, that is, without `--output`.
    """
    if path is not None:
        path.parent.mkdir(parents=True, exist_ok=True)
        with path.open("a") as file:
            file.write(format_row({**row, **environment()}))


def format_row(row: Row) -> str:
    """Returns a line of a table."""
    return json.dumps(_round(row), ensure_ascii=False) + "\n"


def environment() -> dict[str, str]:
    """Returns what a row needs to be measured again."""
    device = jax.devices()[0].device_kind
    commit = ""
    if shutil.which("git"):
        command = ["git", "describe", "--always", "--dirty"]
        commit = subprocess.run(
            command, cwd=Path(__file__).parent, capture_output=True, text=True
        ).stdout.strip()
    return {
        "date": datetime.date.today().isoformat(),
        "device": f"{os.cpu_count()} CPU cores" if device == "cpu" else device,
        "jax": jax.__version__,
        "python": platform.python_version(),
        "commit": commit,
        "command": shlex.join(["python", *sys.argv]),
    }


def _round(value: Any) -> Any:
    """Rounds floats to seven significant digits."""
    if isinstance(value, Mapping):
        return {key: _round(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_round(item) for item in value]
    return float(f"{value:.7g}") if isinstance(value, float) else value
