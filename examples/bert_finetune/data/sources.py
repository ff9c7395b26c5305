"""Reads examples from the Hugging Face Hub, a directory in its layout, or files.

Every cell of a .csv or .tsv is read as text, without conversion. Errors report the row
or line.
"""

import codecs
import csv
import datetime
import decimal
import io
import json
import math
import re
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import datasets
import datasets.config
import pyarrow as pa
import pyarrow.parquet

from bert_finetune.errors import UserError, first_line

EXTENSIONS = (".csv", ".tsv", ".json", ".jsonl", ".parquet")


class Source(NamedTuple):
    """Columns as read: lists, or Arrow columns."""

    columns: Mapping[str, Any]
    where: str  # Names the source in messages.
    first_row: int = 1  # Number of the first row, for messages.
    is_text: bool = False  # Whether every cell is text (.csv, .tsv).

    def values(self, name: str, max_samples: int | None = None) -> Any:
        """Returns the first ``max_samples`` values of a column."""
        if name not in self.columns:
            found = ", ".join(map(repr, self.columns))
            raise UserError(f"{self.where} has no column {name!r}; it has {found}.")
        return self.columns[name][:max_samples]

    def numbered(self, values: Any) -> Iterator[tuple[str, Any]]:
        """Yields the location of each value, for messages, and the value."""
        if not isinstance(values, list):
            try:
                values = values.to_pylist()
            except (pa.ArrowException, ValueError, OverflowError) as error:
                what = f"a value in {self.where} cannot be read"
                raise UserError(f"{what}: {first_line(error)}.") from error
        for row, value in enumerate(values, self.first_row):
            yield f"row {row} of {self.where}", value

    def texts(self, name: str, max_samples: int | None = None) -> Any:
        """Returns the first texts of a column; numbers and dates become strings."""
        values = self.values(name, max_samples)
        is_arrow = not isinstance(values, list)
        kinds = (pa.string(), pa.large_string())
        if is_arrow and values.type in kinds and not values.null_count:
            try:
                values.validate(full=True)
            except pa.ArrowException as error:
                what = f"column {name!r} of {self.where} is not valid UTF-8"
                raise UserError(f"{what}: {first_line(error)}.") from error
            return values
        return [_text(value, name, at) for at, value in self.numbered(values)]


def dataset_of(texts: Mapping[str, Any]) -> datasets.Dataset:
    """Returns a dataset with these columns."""
    return datasets.Dataset(pa.table(dict(texts)))


def check_characters(text: str, what: str) -> None:
    """Raises a UserError for an unpaired surrogate, which UTF-8 cannot encode."""
    try:
        text.encode()
    except UnicodeEncodeError as error:
        surrogate = text[error.start]
        raise UserError(
            f"{what} contains an unpaired surrogate, {surrogate!r}: remove it."
        ) from error


def _text(value: Any, column: str, at: str) -> str:
    match value:
        case str():
            check_characters(value, f"column {column!r}, {at},")
            return value
        case bool():
            return str(value).lower()
        case int() | decimal.Decimal():
            return str(value)
        case float() if math.isfinite(value):
            return str(value)
        case datetime.date() | datetime.time():
            return value.isoformat()
    raise UserError(
        f"column {column!r} must contain text, but {at} has {value!r:.80}: replace it, "
        "or remove the row or the column."
    )


def load(name: str, config: str | None, split: str) -> Source:
    """Loads a split from a directory in the Hub's layout, or from the Hub."""
    where = f"the {split} split of {f'{config} in ' if config else ''}{name}"
    directory = Path(name)
    if not directory.is_dir():
        return _with_rows(Source(_load_from_hub(name, config, split), where))
    pattern = f"{split}-*.parquet"
    folders = [config] if config else [".", "*"]
    files = [file for f in folders for file in sorted(directory.glob(f"{f}/{pattern}"))]
    if not files:
        raise UserError(f"{directory} has no {folders[-1]}/{pattern}.")
    numbers = [re.search(r"-(\d+)-of-(\d+)$", file.stem) for file in files]
    total = max((int(number[2]) for number in numbers if number), default=0)
    if total > len(files):
        found = ", ".join(file.name for file in files)
        raise UserError(
            f"{directory} has {len(files)} of {total} parts ({found}): add the rest."
        )
    if len({file.parent for file in files}) > 1:
        raise UserError(
            f"{directory} has {pattern} in more than one folder: pass one of them as "
            "--dataset_name."
        )
    return _with_rows(Source(_read_parquet(files), where))


def _with_rows(source: Source) -> Source:
    if not source.columns or not len(next(iter(source.columns.values()))):
        raise UserError(f"{source.where} is empty: it has no rows.")
    return source


def _load_from_hub(name: str, config: str | None, split: str) -> dict[str, Any]:
    datasets.disable_progress_bars()
    check_cache()
    try:
        dataset = datasets.load_dataset(name, config, split=split)
    except (OSError, ValueError) as error:
        reason = " ".join(str(error).split())
        needs_config = "Config name is missing" in reason
        hint = " Set --dataset_config_name." if needs_config else ""
        folder = f"{config}/" if config else ""
        raise UserError(
            f"dataset {name!r} is not a local directory, and the Hugging Face Hub "
            f"could not provide it ({reason}).{hint} Set --dataset_name to a directory "
            f"with {folder}{split}-*.parquet, or pass your own files."
        ) from error
    return {column: dataset.data.column(column) for column in dataset.column_names}


def check_cache() -> Path:
    """Returns a folder in the cache of `datasets`, after checking it is writable."""
    directory = Path(datasets.config.HF_DATASETS_CACHE, "tokenized")
    try:
        directory.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=directory):
            pass
    except OSError as error:
        raise UserError(
            f"the dataset cache {directory} is not writable "
            f"({error.strerror}): set HF_DATASETS_CACHE to another directory."
        ) from error
    return directory


def load_file(path: str) -> Source:
    """Loads a file with one of the :data:`EXTENSIONS`."""
    file, kind = Path(path), Path(path).suffix.lower()
    if kind not in EXTENSIONS:
        known = ", ".join(EXTENSIONS)
        raise UserError(f"{path} must end in one of {known}.")
    if not file.is_file():
        raise UserError(f"there is no file {path}.")
    if kind == ".parquet":
        source = Source(_read_parquet([file]), path)
    elif kind in (".csv", ".tsv"):
        rows = _csv_rows(path) if kind == ".csv" else _tsv_rows(path)
        columns = _columns_of_table(path, rows)
        source = Source(columns, path, first_row=2, is_text=True)
    else:
        source = Source(_columns_of_json(path), path)
    return _with_rows(source)


def read_text(path: str) -> str:
    """Reads a UTF-8 file, with or without a byte-order mark."""
    try:
        data = Path(path).read_bytes()
    except OSError as error:
        raise UserError(f"{path} cannot be read: {error.strerror}.") from error
    if data.startswith((codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE)) or b"\0" in data:
        raise UserError(f"{path} is UTF-16 or binary: save it as UTF-8 text.")
    try:
        return data.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        line = data.count(b"\n", 0, error.start) + 1
        raise UserError(
            f"line {line} of {path} is not valid UTF-8 (byte "
            f"0x{data[error.start]:02x}, perhaps Latin-1): save the file as UTF-8."
        ) from error


def _lines(path: str) -> io.StringIO:
    """Returns the lines of a file; without line feeds, carriage returns end them."""
    return io.StringIO(_with_line_feeds(read_text(path)), newline="\n")


def _with_line_feeds(text: str) -> str:
    return text if "\n" in text else text.replace("\r", "\n")


def _csv_rows(path: str) -> Iterator[list[str]]:
    csv.field_size_limit(2**31 - 1)
    reader = csv.reader(_lines(path), strict=True)
    try:
        yield from reader
    except csv.Error as error:
        reason = str(error)
        if "new-line" in reason:
            reason = "a carriage return inside an unquoted field"
        where = f"line {reader.line_num} of {path}"
        raise UserError(f"{where}: {reason}. Check the quotes.") from error


def _tsv_rows(path: str) -> Iterator[list[str]]:
    # Quotes have no special meaning.
    for line in _lines(path):
        line = line.removesuffix("\n").removesuffix("\r")
        yield line.split("\t") if line else []


def _columns_of_table(path: str, rows: Iterator[list[str]]) -> dict[str, list[str]]:
    header = next(rows, None)
    if header == []:
        raise UserError(f"the first line of {path} is blank: it must name the columns.")
    header = header or []
    twice = [name for name in header if header.count(name) > 1]
    if twice:
        raise UserError(f"the header of {path} names the column {twice[0]!r} twice.")
    cells, blank = [], None
    for number, row in enumerate(rows, start=2):
        if not row and len(header) == 1:
            row = [""]
        if not row:
            blank = blank or number
            continue
        if blank:  # Blank rows are allowed at the end only.
            raise UserError(f"row {blank} of {path} is blank: remove it.")
        if len(row) != len(header):
            fields = "1 field" if len(row) == 1 else f"{len(row)} fields"
            found = f"row {number} of {path} has {fields}, the header {len(header)}"
            remedy = "quote texts with commas (.csv), or replace tabs in them (.tsv)"
            if len(row) < len(header):
                remedy = "complete or remove the row"
            raise UserError(f"{found}: {remedy}.")
        cells.append(row)
    return dict(zip(header, map(list, zip(*cells, strict=True)), strict=False))


def _columns_of_json(path: str) -> dict[str, list[Any]]:
    """Returns the columns of JSON Lines, or of a JSON list of objects."""
    text, rows = _with_line_feeds(read_text(path)), []
    if text.lstrip().startswith("["):
        rows = list(enumerate(_parse_json(text, path), start=1))
    else:
        lines = text.rstrip().split("\n")
        for number, line in enumerate(lines if text.strip() else [], start=1):
            rows.append((number, _parse_json(line, f"line {number} of {path}")))
    for number, row in rows:
        if not isinstance(row, dict):
            raise UserError(
                f"row {number} of {path} is not a JSON object: {row!r:.80}."
            )
    names = dict.fromkeys(name for _, row in rows for name in row)
    for name in names:
        check_characters(name, f"a column name in {path}")
    return {name: [row.get(name) for _, row in rows] for name in names}


def _parse_json(text: str, at: str) -> Any:
    try:
        return json.loads(text, object_pairs_hook=_object)
    except (ValueError, RecursionError) as error:
        what = "blank: remove it"
        if text.strip():
            what = (
                f"not JSON ({error}): write one object per line, or a list of objects"
            )
        raise UserError(f"{at} is {what}.") from error


def _object(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    content = dict(pairs)
    if len(content) < len(pairs):
        raise ValueError("an object has a duplicate key")
    return content


def _read_parquet(files: Sequence[Path]) -> dict[str, Any]:
    where = ", ".join(map(str, files))
    try:
        parts = [pyarrow.parquet.ParquetFile(file).read() for file in files]
        table = pa.concat_tables(parts, promote_options="permissive")
    except (OSError, pa.ArrowException) as error:
        raise UserError(f"{where} cannot be read: {first_line(error)}") from error
    return dict(zip(table.column_names, table.columns, strict=True))
