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
    """Loads a split from a directory or from the hub.

    Args:
      name: a directory in the layout of the hub, or a hub id.
      config: of the data set, if it has several; the folder of its files.
      split: its name.

    Raises:
      UserError: if it is not there.
    """
    directory = Path(name)
    if directory.is_dir():
        return _load_from_directory(directory, config, split)
    datasets.disable_progress_bars()
    try:
        return datasets.load_dataset(name, config, split=split)
    except (OSError, ValueError) as error:
        hint = ""
        if config is None and "Config name is missing" in str(error):
            hint = " Give --dataset_config_name."
        folder = f"{config}/" if config else ""
        raise UserError(
            f"data set {name!r} is not a local directory, and the Hugging Face Hub "
            f"could not provide it ({' '.join(str(error).split())}).{hint} Give "
            f"--dataset_name a directory that holds {folder}{split}-*.parquet, or "
            "files of your own."
        ) from error


def _load_from_directory(
    directory: Path, config: str | None, split: str
) -> datasets.Dataset:
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


def load_files(files: Sequence[str]) -> datasets.Dataset:
    """Loads files of one format.

    Raises:
      UserError: if one is not there, empty, or cannot be read.
    """
    datasets.disable_progress_bars()
    extension = Path(files[0]).suffix
    if extension not in _FORMATS:
        raise UserError(
            f"{files[0]} must end in one of {', '.join(_FORMATS)} to say its format."
        )
    for file in files:
        if not Path(file).is_file():
            raise UserError(f"there is no file {file}.")
    file_format, options = _FORMATS[extension]
    where = ", ".join(files)
    try:
        if extension == ".parquet" and not any(
            pyarrow.parquet.read_metadata(file).num_rows for file in files
        ):
            raise UserError(f"{where} is empty.")
        # One unnamed split, which datasets calls "train".
        return datasets.load_dataset(
            file_format, data_files=list(files), split="train", **options
        )
    except UserError:
        raise
    except Exception as error:
        # What `datasets` raises where there is not one example.
        if isinstance(error, StopIteration) or "corresponds to no data" in str(error):
            raise UserError(f"{where} is empty.") from None
        cause = str(error.__cause__ or error).strip()
        raise UserError(f"{where} cannot be read: {cause}") from None


def check_columns(
    dataset: datasets.Dataset, columns: Sequence[str], where: str
) -> None:
    """Checks that these columns are there.

    Raises:
      UserError: naming the first that is not, and those that are.
    """
    for column in columns:
        if column not in dataset.column_names:
            raise UserError(
                f"{where} has no column {column!r}; it has "
                f"{', '.join(dataset.column_names)}."
            )


def check_texts(dataset: datasets.Dataset, columns: Sequence[str], where: str) -> None:
    """Checks that these columns hold a text in every row.

    Raises:
      UserError: naming the first that does not.
    """
    for column in columns:
        texts = dataset.data.column(column)
        if not holds_text(dataset, column) or texts.null_count:
            raise UserError(
                f"column {column!r} of {where} must hold a text in every row; it has "
                f"type {texts.type} and {texts.null_count} empty entries."
            )


def holds_text(dataset: datasets.Dataset, column: str) -> bool:
    """Says whether the column is one of texts."""
    return str(dataset.data.column(column).type) in ("string", "large_string")
