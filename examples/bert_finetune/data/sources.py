"""Where examples come from: the hub, a directory in its layout, or files."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import datasets
import pyarrow.parquet

from bert_finetune.errors import UserError

# Extension -> format of `datasets` and its options.
_FORMATS: dict[str, tuple[str, dict[str, Any]]] = {
    # A text may read "null" or "NA".
    ".csv": ("csv", {"keep_default_na": False}),
    # Quotes in a .tsv are characters like others.
    ".tsv": ("csv", {"keep_default_na": False, "delimiter": "\t", "quoting": 3}),
    ".json": ("json", {}),
    ".jsonl": ("json", {}),
    ".parquet": ("parquet", {}),
}


def load(name: str, config: str | None, split: str) -> datasets.Dataset:
    """Loads a split from a directory in the layout of the hub, or from the hub."""
    directory = Path(name)
    if not directory.is_dir():
        return _load_from_hub(name, config, split)
    pattern = f"{split}-*.parquet"
    folders = [config] if config else [".", "*"]
    files = [file for f in folders for file in sorted(directory.glob(f"{f}/{pattern}"))]
    if not files:
        raise UserError(f"there is no {folders[-1]}/{pattern} in {directory}.")
    if len({file.parent for file in files}) > 1:
        raise UserError(
            f"{directory} holds {pattern} in more than one folder: give one of them as "
            "--dataset_name."
        )
    return load_files([str(file) for file in files])


def _load_from_hub(name: str, config: str | None, split: str) -> datasets.Dataset:
    datasets.disable_progress_bars()
    try:
        return datasets.load_dataset(name, config, split=split)
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


def load_files(files: Sequence[str]) -> datasets.Dataset:
    """Loads files of one format."""
    datasets.disable_progress_bars()
    extension = Path(files[0]).suffix
    if extension not in _FORMATS:
        known = ", ".join(_FORMATS)
        raise UserError(f"{files[0]} must end in one of {known} to say its format.")
    for file in files:
        if not Path(file).is_file():
            raise UserError(f"there is no file {file}.")
    file_format, options = _FORMATS[extension]
    where = ", ".join(files)
    try:
        if extension == ".parquet" and not any(
            pyarrow.parquet.read_metadata(file).num_rows for file in files
        ):
            raise StopIteration  # As `datasets` does for an empty .jsonl.
        # One unnamed split, which datasets calls "train".
        return datasets.load_dataset(
            file_format, data_files=list(files), split="train", **options
        )
    except Exception as error:
        if isinstance(error, StopIteration) or "corresponds to no data" in str(error):
            raise UserError(f"{where} is empty.") from error
        cause = str(error.__cause__ or error).strip()
        raise UserError(f"{where} cannot be read: {cause}") from error


def select(
    dataset: datasets.Dataset,
    texts: Sequence[str],
    others: Sequence[str],
    max_samples: int | None,
    where: str,
) -> datasets.Dataset:
    """Selects columns and the first rows, and checks that ``texts`` hold texts."""
    columns = [*texts, *others]
    for column in columns:
        if column not in dataset.column_names:
            found = ", ".join(dataset.column_names)
            raise UserError(f"{where} has no column {column!r}; it has {found}.")
    rows = range(len(dataset))[:max_samples]
    dataset = dataset.select_columns(columns).select(rows)
    for column in texts:
        entries = dataset.data.column(column)
        if not holds_text(dataset, column) or entries.null_count:
            raise UserError(
                f"column {column!r} of {where} must hold a text in every row; it has "
                f"type {entries.type} and {entries.null_count} empty entries."
            )
    return dataset


def holds_text(dataset: datasets.Dataset, column: str) -> bool:
    """Says whether the column is one of texts."""
    return str(dataset.data.column(column).type) in ("string", "large_string")
