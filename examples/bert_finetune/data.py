"""Tokenised examples and the batches made of them."""

import collections
import hashlib
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, NamedTuple

import datasets
import datasets.config
import numpy as np
from transformers import PreTrainedTokenizerBase

# A batch is padded to one of these; each that occurs costs one compilation.
_LENGTHS = (32, 48, 64, 96, 128, 192, 256, 384, 512)
_PREFETCHED_BATCHES = 4
# What a tokenizer returns of an example, as `datasets` keeps it.
TOKEN_COLUMNS = {
    "input_ids": datasets.List(datasets.Value("int32")),
    "token_type_ids": datasets.List(datasets.Value("int8")),
}


class Features(NamedTuple):
    """Tokenised examples, one behind the other.

    Attributes:
      tokens: int32, shape ``(tokens,)``.
      token_types: int8, 1 for the second text of a pair, same shape.
      starts: int64, shape ``(examples + 1,)``: where each example begins, and the end.
      targets: by name, a number per example; becomes part of each batch.
      pad_token_id: what fills up a batch.
    """

    tokens: np.ndarray
    token_types: np.ndarray
    starts: np.ndarray
    targets: Mapping[str, np.ndarray]
    pad_token_id: int

    @property
    def num_examples(self) -> int:
        return len(self.starts) - 1


class TrainData(NamedTuple):
    """What fixes every batch of a training run.

    Attributes:
      features: the examples.
      batch_size: examples per step; the last step of an epoch may have fewer.
      num_steps: of the run.
      lengths: to which a batch may be padded, rising.
      seed: of the order.
    """

    features: Features
    batch_size: int
    num_steps: int
    lengths: Sequence[int]
    seed: int

    @property
    def steps_per_epoch(self) -> int:
        return -(-self.features.num_examples // self.batch_size)


class Survey(NamedTuple):
    """What the batches of a run have in common.

    Attributes:
      lengths: those that occur, rising.
      max_distinct_tokens: the most distinct tokens of a batch, padding included.
    """

    lengths: list[int]
    max_distinct_tokens: int


def tokenize(
    dataset: datasets.Dataset,
    tokenizer: PreTrainedTokenizerBase,
    text_columns: Sequence[str],
    targets: Mapping[str, np.ndarray],
    max_length: int,
    *,
    overwrite_cache: bool = False,
) -> Features:
    """Tokenises texts or pairs of texts, truncating the longer one first.

    Args:
      dataset: holds the text columns.
      tokenizer: the model's.
      text_columns: one or two.
      targets: by name, a number per example.
      max_length: tokens per example at most, special tokens included.
      overwrite_cache: tokenise also what is cached.
    """

    def encode(batch: Mapping[str, list[str]], _: list[int]) -> dict[str, Any]:
        texts = [batch[column] for column in text_columns]
        encoded = tokenizer(
            texts[0],
            texts[1] if len(texts) > 1 else None,
            truncation=True,
            max_length=max_length,
        )
        return {name: encoded[name] for name in TOKEN_COLUMNS}

    tokenized = map_cached(
        dataset,
        encode,
        TOKEN_COLUMNS,
        tokenizer,
        (list(text_columns), max_length),
        overwrite_cache=overwrite_cache,
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
    tokenizer and the key.

    Args:
      dataset: of the texts.
      encode: from columns and row numbers to the new columns.
      columns: the types of these.
      tokenizer: that ``encode`` uses.
      key: all else that the result depends on.
      overwrite_cache: do also what is cached.
    """
    datasets.disable_progress_bars()
    # Not the name that `datasets` would choose, from the tokenizer as it is pickled: it
    # changes with the first text tokenised.
    _reset(tokenizer)
    parts = (dataset._fingerprint, tokenizer.backend_tokenizer.to_str(), *key)
    fingerprint = hashlib.sha256(repr(parts).encode()).hexdigest()[:32]
    file = None
    if not dataset.cache_files:  # It is in memory, where `datasets` would leave it.
        directory = Path(datasets.config.HF_DATASETS_CACHE, "tokenized")
        directory.mkdir(parents=True, exist_ok=True)
        file = str(directory / f"{fingerprint}.arrow")
    result = dataset.map(
        encode,
        batched=True,
        with_indices=True,
        remove_columns=dataset.column_names,
        features=datasets.Features(columns),
        load_from_cache_file=not overwrite_cache,
        cache_file_name=file,
        new_fingerprint=fingerprint,
    )
    _reset(tokenizer)
    return result


def _reset(tokenizer: Any) -> None:
    """Removes the traces of texts tokenised before, which would be saved with it."""
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


def batch_lengths(max_length: int) -> list[int]:
    """Returns the lengths to which batches are padded, up to ``max_length``."""
    return [length for length in _LENGTHS if length < max_length] + [max_length]


def batch_of(
    features: Features, indices: np.ndarray, batch_size: int, lengths: Sequence[int]
) -> dict[str, np.ndarray]:
    """Returns a batch, padded to the smallest of the lengths that holds its longest.

    ``weights`` is 0 for the rows that fill it up to ``batch_size``.
    """
    filled = np.resize(indices, batch_size)
    starts = features.starts[filled]
    sizes = features.starts[filled + 1] - starts
    length = next(length for length in lengths if length >= sizes.max())
    columns = np.arange(length)
    mask = columns < sizes[:, None]
    # Behind the last example there is nothing to read.
    positions = np.where(mask, starts[:, None] + columns, 0)
    return {
        "input_ids": np.where(mask, features.tokens[positions], features.pad_token_id),
        "attention_mask": mask.astype(np.int32),
        "token_type_ids": np.where(mask, features.token_types[positions], 0).astype(
            np.int32
        ),
        "weights": (np.arange(batch_size) < len(indices)).astype(np.float32),
        **{name: column[filled] for name, column in features.targets.items()},
    }


def train_order(train_data: TrainData, start: int = 0) -> Iterator[np.ndarray]:
    """Yields the examples of each step from ``start`` on, reshuffled every epoch.

    The order follows from the seed and the step alone, so a run that goes on in the
    middle sees what it would have seen.
    """
    features, batch_size = train_data.features, train_data.batch_size
    epoch, step_in_epoch = divmod(start, train_data.steps_per_epoch)
    step = start
    while step < train_data.num_steps:
        rng = np.random.default_rng((train_data.seed, epoch))
        order = rng.permutation(features.num_examples)
        for first in range(step_in_epoch * batch_size, len(order), batch_size):
            if step == train_data.num_steps:
                return
            yield order[first : first + batch_size]
            step += 1
        epoch, step_in_epoch = epoch + 1, 0


def train_batches(
    train_data: TrainData, start: int = 0
) -> Iterator[dict[str, np.ndarray]]:
    """Yields the batch of each step from ``start`` on."""
    for indices in train_order(train_data, start):
        yield batch_of(
            train_data.features, indices, train_data.batch_size, train_data.lengths
        )


def survey(train_data: TrainData) -> Survey:
    """Goes through the batches of a run without taking a step."""
    lengths, most = set(), 0
    seen = np.zeros(
        1 + max(train_data.features.tokens.max(), train_data.features.pad_token_id),
        bool,
    )
    for batch in train_batches(train_data):
        tokens = batch["input_ids"]
        lengths.add(tokens.shape[1])
        seen[tokens] = True
        most = max(most, int(np.count_nonzero(seen)))
        seen[tokens] = False
    return Survey(sorted(lengths), most)


def eval_batches(
    features: Features, batch_size: int, lengths: Sequence[int]
) -> Iterator[dict[str, np.ndarray]]:
    """Yields every example once, in order."""
    for start in range(0, features.num_examples, batch_size):
        indices = np.arange(start, min(start + batch_size, features.num_examples))
        yield batch_of(features, indices, batch_size, lengths)


def prefetch(batches: Iterable[Any]) -> Iterator[Any]:
    """Yields the same, made a few batches ahead on a thread."""
    iterator, end = iter(batches), object()
    with ThreadPoolExecutor(max_workers=1) as pool:
        coming = collections.deque(
            pool.submit(next, iterator, end) for _ in range(_PREFETCHED_BATCHES)
        )
        while (batch := coming.popleft().result()) is not end:
            coming.append(pool.submit(next, iterator, end))
            yield batch
