"""Tokenized examples, cached on disk."""

import functools
import hashlib
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import datasets
import filelock
import numpy as np
import pyarrow as pa

from bert_finetune.data.sources import check_cache

# Tokenizer outputs per example, as `datasets` stores them.
TOKEN_COLUMNS = {
    "input_ids": datasets.List(datasets.Value("int32")),
    "token_type_ids": datasets.List(datasets.Value("int8")),
}


class Features(NamedTuple):
    """Tokenized examples, concatenated."""

    tokens: np.ndarray  # int32, (tokens,)
    token_types: np.ndarray  # int8, (tokens,): 1 in the second text of a pair.
    starts: np.ndarray  # int64, (examples + 1,): start of each, and the end.
    targets: Mapping[str, np.ndarray]  # Added to each batch: one value per example.
    pad_token_id: int

    @property
    def num_examples(self) -> int:
        return len(self.starts) - 1


def tokenize(
    dataset: datasets.Dataset,
    tokenizer: Any,
    text_columns: Sequence[str],
    targets: Mapping[str, np.ndarray],
    max_length: int,
    *,
    overwrite_cache: bool = False,
) -> Features:
    """Tokenizes texts or pairs of texts, truncating the longer one first.

    ``max_length`` includes special tokens; ``targets`` holds one value per example.
    """

    def encode(batch: Mapping[str, list[str]], _: list[int]) -> dict[str, Any]:
        texts = [batch[column] for column in text_columns]
        encoded = tokenizer(*texts, truncation=True, max_length=max_length)
        return {name: encoded[name] for name in TOKEN_COLUMNS}

    key, types = (list(text_columns), max_length), TOKEN_COLUMNS
    tokenized = map_cached(
        dataset, encode, types, tokenizer, key, overwrite_cache=overwrite_cache
    )
    return features_of(tokenized, tokenizer, targets)


def map_cached(
    dataset: datasets.Dataset,
    encode: Callable[..., Mapping[str, Any]],
    columns: Mapping[str, Any],
    tokenizer: Any,
    key: tuple[Any, ...],
    *,
    overwrite_cache: bool = False,
) -> datasets.Dataset:
    """Applies ``encode`` to batches of rows and their indices.

    The result is cached by `datasets` under a hash of the data, the tokenizer and
    ``key``, which must hold everything else that the result depends on.
    """
    datasets.disable_progress_bars()
    # The default fingerprint hashes the pickled tokenizer, which changes with the first
    # text tokenized.
    _reset(tokenizer)
    parts = (dataset._fingerprint, tokenizer.backend_tokenizer.to_str(), *key)
    fingerprint = hashlib.sha256(repr(parts).encode()).hexdigest()[:32]
    # Without a file name, the result of an in-memory dataset stays in memory.
    file = check_cache() / f"{fingerprint}.arrow"
    tokenize_all = functools.partial(
        dataset.map,
        encode,
        batched=True,
        with_indices=True,
        remove_columns=dataset.column_names,
        features=datasets.Features(columns),
        cache_file_name=str(file),
        new_fingerprint=fingerprint,
    )
    # The first of several processes tokenizes; the others read its result.
    with filelock.FileLock(f"{file}.lock"):
        try:
            result = tokenize_all(load_from_cache_file=not overwrite_cache)
        except pa.ArrowException:  # The cached file is damaged.
            result = tokenize_all(load_from_cache_file=False)
    _reset(tokenizer)
    return result


def _reset(tokenizer: Any) -> None:
    """Clears truncation and padding, which would be saved with the tokenizer."""
    tokenizer.backend_tokenizer.no_truncation()
    tokenizer.backend_tokenizer.no_padding()


def features_of(
    tokenized: datasets.Dataset, tokenizer: Any, targets: Mapping[str, np.ndarray]
) -> Features:
    """Returns the token columns of a dataset as :class:`Features`."""
    tokens, starts = ragged(tokenized, "input_ids")
    token_types, _ = ragged(tokenized, "token_type_ids")
    pad_token_id = getattr(tokenizer, "pad_token_id", None) or 0
    return Features(tokens, token_types, starts, targets, pad_token_id)


def ragged(dataset: datasets.Dataset, column: str) -> tuple[np.ndarray, np.ndarray]:
    """Returns the concatenated lists of a column, and their offsets."""
    lists = dataset.data.column(column).combine_chunks()
    starts = lists.offsets.to_numpy().astype(np.int64)
    return lists.values.to_numpy()[starts[0] : starts[-1]], starts - starts[0]
