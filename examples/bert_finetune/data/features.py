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

# What a tokenizer returns of an example, as `datasets` keeps it.
TOKEN_COLUMNS = {
    "input_ids": datasets.List(datasets.Value("int32")),
    "token_type_ids": datasets.List(datasets.Value("int8")),
}


class Features(NamedTuple):
    """Tokenized examples, concatenated."""

    tokens: np.ndarray  # int32, (tokens,)
    token_types: np.ndarray  # int8, (tokens,): 1 in the second text of a pair.
    starts: np.ndarray  # int64, (examples + 1,): where each begins, and the end.
    targets: Mapping[str, np.ndarray]  # Part of each batch: a number per example.
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

    ``max_length`` includes special tokens; ``targets`` are numbers per example.
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
    """Applies ``encode`` to batches of rows and their numbers.

    The result is kept in the cache of `datasets`, under a name made from the data, the
    tokenizer and ``key``, which is all else that it depends on.
    """
    datasets.disable_progress_bars()
    # Not the name that `datasets` would choose, from the tokenizer as it is pickled: it
    # changes with the first text tokenized.
    _reset(tokenizer)
    parts = (dataset._fingerprint, tokenizer.backend_tokenizer.to_str(), *key)
    fingerprint = hashlib.sha256(repr(parts).encode()).hexdigest()[:32]
    # It is in memory, where `datasets` would leave the result too.
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
    # Of several processes the first to come tokenizes, and the others read.
    with filelock.FileLock(f"{file}.lock"):
        try:
            result = tokenize_all(load_from_cache_file=not overwrite_cache)
        except pa.ArrowException:  # The cached file is damaged.
            result = tokenize_all(load_from_cache_file=False)
    _reset(tokenizer)
    return result


def _reset(tokenizer: Any) -> None:
    """Removes the traces of texts tokenized before, which would be saved with it."""
    tokenizer.backend_tokenizer.no_truncation()
    tokenizer.backend_tokenizer.no_padding()


def features_of(
    tokenized: datasets.Dataset, tokenizer: Any, targets: Mapping[str, np.ndarray]
) -> Features:
    """Returns what the token columns of a data set hold."""
    tokens, starts = ragged(tokenized, "input_ids")
    token_types, _ = ragged(tokenized, "token_type_ids")
    pad_token_id = getattr(tokenizer, "pad_token_id", None) or 0
    return Features(tokens, token_types, starts, targets, pad_token_id)


def ragged(dataset: datasets.Dataset, column: str) -> tuple[np.ndarray, np.ndarray]:
    """Returns the lists of a column one behind the other, and where each begins."""
    lists = dataset.data.column(column).combine_chunks()
    starts = lists.offsets.to_numpy().astype(np.int64)
    return lists.values.to_numpy()[starts[0] : starts[-1]], starts - starts[0]
