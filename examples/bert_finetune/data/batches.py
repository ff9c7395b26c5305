"""Padded batches of tokenized examples, shuffled by a seed."""

import collections
import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any, NamedTuple

import numpy as np

from bert_finetune.data.features import Features

# Lengths to which batches are padded; each one that occurs is compiled once.
_LENGTHS = (32, 48, 64, 80, 96, 112, 128, 192, 256, 384, 512)
_PREFETCHED_BATCHES = 4


class TrainData(NamedTuple):
    """Determines every batch of a training run."""

    features: Features
    batch_size: int  # The last step of an epoch may have fewer examples.
    num_steps: int
    lengths: Sequence[int]  # Padded lengths of batches, ascending.
    seed: int  # Shuffles the examples.

    @property
    def steps_per_epoch(self) -> int:
        return -(-self.features.num_examples // self.batch_size)

    @property
    def max_length(self) -> int:
        longest = np.diff(self.features.starts).max()
        return next(length for length in self.lengths if length >= longest)


def batch_lengths(max_length: int) -> list[int]:
    """Returns the padded lengths of batches, up to ``max_length``."""
    return [length for length in _LENGTHS if length < max_length] + [max_length]


def batch_of(
    features: Features, indices: np.ndarray, batch_size: int, lengths: Sequence[int]
) -> dict[str, np.ndarray]:
    """Returns a batch, padded to the smallest of ``lengths`` that fits its examples.

    ``weights`` is 0 for the rows that fill the batch up to ``batch_size``.
    """
    filled = np.resize(indices, batch_size)
    starts = features.starts[filled]
    sizes = features.starts[filled + 1] - starts
    length = next(length for length in lengths if length >= sizes.max())
    columns = np.arange(length)
    mask = columns < sizes[:, None]
    # Padding of the last example would index past the end.
    positions = np.where(mask, starts[:, None] + columns, 0)
    types = np.where(mask, features.token_types[positions], 0)
    return {
        "input_ids": np.where(mask, features.tokens[positions], features.pad_token_id),
        "attention_mask": mask.astype(np.int32),
        "token_type_ids": types.astype(np.int32),
        "weights": (np.arange(batch_size) < len(indices)).astype(np.float32),
        **{name: column[filled] for name, column in features.targets.items()},
    }


def train_order(train_data: TrainData, start: int = 0) -> Iterator[np.ndarray]:
    """Yields the example indices of each step from ``start``, shuffled every epoch.

    Seed and step alone determine the order, so a resumed run sees the same batches.
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
    """Yields the batch of each step from ``start``."""
    for indices in train_order(train_data, start):
        yield batch_of(
            train_data.features, indices, train_data.batch_size, train_data.lengths
        )


def max_distinct_tokens(
    train_data: TrainData, first_batches: Sequence[Mapping[str, np.ndarray]]
) -> int:
    """Returns a bound on the distinct tokens of a batch, padding included.

    If ``first_batches`` are all batches, their maximum is exact. Otherwise the bound is
    six standard deviations above their mean, or their maximum if larger (the largest of
    11,362 batches of QQP is 4.6 above).
    """
    counts = [len(np.unique(batch["input_ids"])) for batch in first_batches]
    if train_data.num_steps <= len(counts):
        return max(counts)
    return max(*counts, math.ceil(np.mean(counts) + 6 * np.std(counts)))


def eval_batches(
    features: Features, batch_size: int, lengths: Sequence[int]
) -> Iterator[dict[str, np.ndarray]]:
    """Yields batches of all examples, each once and in order."""
    for start in range(0, features.num_examples, batch_size):
        indices = np.arange(start, min(start + batch_size, features.num_examples))
        yield batch_of(features, indices, batch_size, lengths)


def prefetch(batches: Iterable[Any]) -> Iterator[Any]:
    """Yields the same batches, built a few ahead on a background thread."""
    iterator, end = iter(batches), object()
    with ThreadPoolExecutor(max_workers=1) as pool:
        coming = collections.deque(
            pool.submit(next, iterator, end) for _ in range(_PREFETCHED_BATCHES)
        )
        while (batch := coming.popleft().result()) is not end:
            coming.append(pool.submit(next, iterator, end))
            yield batch
