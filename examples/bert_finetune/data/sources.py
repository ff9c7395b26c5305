"""Where examples come from: the hub, a directory in its layout, or files.

Files are read as they are. Every cell of a .csv or .tsv is a text; a file that is not
what its ending says is rejected with the row.
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
    """Columns as they were read: lists, or columns of Arrow."""

    columns: Mapping[str, Any]
    where: str  # For messages.
    first_row: int = 1  # The number of the first row, for messages.
    is_text: bool = False  # Whether every cell is a text, whatever it means.

    def values(self, name: str, max_samples: int | None = None) -> Any:
        """Returns the first values of a column."""
        if name not in self.columns:
            found = ", ".join(map(repr, self.columns))
            raise UserError(f"{self.where} has no column {name!r}; it has {found}.")
        return self.columns[name][:max_samples]

    def numbered(self, values: Any) -> Iterator[tuple[str, Any]]:
        """Yields for each value where it is, for messages, and the value."""
        if not isinstance(values, list):
            try:
                values = values.to_pylist()
            except (pa.ArrowException, ValueError, OverflowError) as error:
                what = f"a value in {self.where} cannot be read"
                raise UserError(f"{what}: {first_line(error)}.") from error
        for row, value in enumerate(values, self.first_row):
            yield f"row {row} of {self.where}", value

    def texts(self, name: str, max_samples: int | None = None) -> Any:
        """Returns the first texts of a column; numbers and dates become theirs."""
        values = self.values(name, max_samples)
        is_arrow = not isinstance(values, list)
        kinds = (pa.string(), pa.large_string())
        if is_arrow and values.type in kinds and not values.null_count:
            try:
                values.validate(full=True)
            except pa.ArrowException as error:
                what = f"column {name!r} of {self.where} is not in UTF-8"
                raise UserError(f"{what}: {first_line(error)}.") from error
            return values
        return [_text(value, name, at) for at, value in self.numbered(values)]


def dataset_of(texts: Mapping[str, Any]) -> datasets.Dataset:
    """Returns a data set of these columns."""
    return datasets.Dataset(pa.table(dict(texts)))


def check_characters(text: str, what: str) -> None:
    """Raises a UserError for a surrogate, which JSON can escape and UTF-8 not hold."""
    try:
        text.encode()
    except UnicodeEncodeError as error:
        half = text[error.start]
        raise UserError(
            f"{what} holds half a character, {half!r}: remove it."
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
        f"column {column!r} must hold a text, {at} has {value!r:.80}: write one, or "
        "remove the row or the column."
    )


def load(name: str, config: str | None, split: str) -> Source:
    """Loads a split from a directory in the layout of the hub, or from the hub."""
    where = f"the {split} split of {f'{config} in ' if config else ''}{name}"
    directory = Path(name)
    if not directory.is_dir():
        return _with_rows(Source(_load_from_hub(name, config, split), where))
    pattern = f"{split}-*.parquet"
    folders = [config] if config else [".", "*"]
    files = [file for f in folders for file in sorted(directory.glob(f"{f}/{pattern}"))]
    if not files:
        raise UserError(f"there is no {folders[-1]}/{pattern} in {directory}.")
    numbers = [re.search(r"-(\d+)-of-(\d+)$", file.stem) for file in files]
    total = max((int(number[2]) for number in numbers if number), default=0)
    if total > len(files):
        found = ", ".join(file.name for file in files)
        raise UserError(f"{directory} has {found}, but not all {total} parts.")
    if len({file.parent for file in files}) > 1:
        raise UserError(
            f"{directory} holds {pattern} in more than one folder: give one of them as "
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
        hint = " Give --dataset_config_name." if needs_config else ""
        folder = f"{config}/" if config else ""
        raise UserError(
            f"data set {name!r} is not a local directory, and the Hugging Face Hub "
            f"could not provide it ({reason}).{hint} Give --dataset_name a directory "
            f"that holds {folder}{split}-*.parquet, or files of your own."
        ) from error
    return {column: dataset.data.column(column) for column in dataset.column_names}


def check_cache() -> Path:
    """Makes a folder in the cache of `datasets`, and blames that if it cannot."""
    directory = Path(datasets.config.HF_DATASETS_CACHE, "tokenized")
    try:
        directory.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=directory):
            pass
    except OSError as error:
        raise UserError(
            f"the cache for data sets, {directory}, cannot be written "
            f"({error.strerror}): set HF_DATASETS_CACHE to another directory."
        ) from error
    return directory


def load_file(path: str) -> Source:
    """Loads a file of one of the :data:`EXTENSIONS`."""
    file, kind = Path(path), Path(path).suffix.lower()
    if kind not in EXTENSIONS:
        known = ", ".join(EXTENSIONS)
        raise UserError(f"{path} must end in one of {known} to say its format.")
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
    """Reads a file in UTF-8, with or without a byte-order mark."""
    try:
        data = Path(path).read_bytes()
    except OSError as error:
        raise UserError(f"{path} cannot be read: {error.strerror}.") from error
    if data.startswith((codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE)) or b"\0" in data:
        raise UserError(f"{path} is in UTF-16, or no text: save it as UTF-8.")
    try:
        return data.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        line = data.count(b"\n", 0, error.start) + 1
        raise UserError(
            f"line {line} of {path} is not in UTF-8 (byte 0x{data[error.start]:02x}, "
            "perhaps Latin-1): save it as UTF-8."
        ) from error


def _lines(path: str) -> io.StringIO:
    """Returns the lines of a file; a carriage return ends one if all do so."""
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
            reason = "a carriage return inside a field that is not quoted"
        where = f"line {reader.line_num} of {path}"
        raise UserError(f"{where}: {reason}. Check its quotes.") from error


def _tsv_rows(path: str) -> Iterator[list[str]]:
    # Quotes are characters like others.
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
        raise UserError(f"the header of {path} has the column {twice[0]!r} twice.")
    cells, blank = [], None
    for number, row in enumerate(rows, start=2):
        if not row and len(header) == 1:
            row = [""]
        if not row:
            blank = blank or number
            continue
        if blank:  # Not one of those at the end.
            raise UserError(f"row {blank} of {path} is blank: remove it.")
        if len(row) != len(header):
            fields = "1 field" if len(row) == 1 else f"{len(row)} fields"
            found = f"row {number} has {fields}, the header has {len(header)}"
            remedy = "quote texts that hold the separator"
            if len(row) < len(header):
                remedy = "complete the row, or remove it"
            raise UserError(f"{found} in {path}: {remedy}.")
        cells.append(row)
    return dict(zip(header, map(list, zip(*cells, strict=True)), strict=False))


def _columns_of_json(path: str) -> dict[str, list[Any]]:
    """Returns the columns of an object on each line, or of a list of objects."""
    text, rows = _with_line_feeds(read_text(path)), []
    if text.lstrip().startswith("["):
        rows = list(enumerate(_parse_json(text, path), start=1))
    else:
        lines = text.rstrip().split("\n")
        for number, line in enumerate(lines if text.strip() else [], start=1):
            rows.append((number, _parse_json(line, f"line {number} of {path}")))
    for number, row in rows:
        if not isinstance(row, dict):
            raise UserError(f"row {number} of {path} is no object: {row!r:.80}.")
    names = dict.fromkeys(name for _, row in rows for name in row)
    for name in names:
        check_characters(name, f"the name of a column in {path}")
    return {name: [row.get(name) for _, row in rows] for name in names}


def _parse_json(text: str, at: str) -> Any:
    try:
        return json.loads(text, object_pairs_hook=_object)
    except (ValueError, RecursionError) as error:
        what = "blank: remove it"
        if text.strip():
            what = f"not JSON ({error}): an object on each line, or a list of objects"
        raise UserError(f"{at} is {what}.") from error


def _object(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    content = dict(pairs)
    if len(content) < len(pairs):
        raise ValueError("a key occurs twice in an object")
    return content


def _read_parquet(files: Sequence[Path]) -> dict[str, Any]:
    where = ", ".join(map(str, files))
    try:
        parts = [pyarrow.parquet.ParquetFile(file).read() for file in files]
        table = pa.concat_tables(parts, promote_options="permissive")
    except (OSError, pa.ArrowException) as error:
        raise UserError(f"{where} cannot be read: {first_line(error)}") from error
    return dict(zip(table.column_names, table.columns, strict=True))
