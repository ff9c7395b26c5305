"""Tokenised examples and the batches made of them."""

from collections.abc import Iterator, Mapping, Sequence
from typing import NamedTuple

import numpy as np
from transformers import PreTrainedTokenizerBase

_TOKENIZER_CHUNK = 4096


class Features(NamedTuple):
    """Tokenised examples, padded to one length.

    Attributes:
      input_ids: int32, shape ``(examples, length)``.
      attention_mask: uint8, 1 for tokens and 0 for padding, same shape.
      token_type_ids: uint8, 1 for the second text of a pair, same shape.
      labels: int32, shape ``(examples,)``.
    """

    input_ids: np.ndarray
    attention_mask: np.ndarray
    token_type_ids: np.ndarray
    labels: np.ndarray

    def __len__(self) -> int:
        return len(self.labels)


def tokenize(
    tokenizer: PreTrainedTokenizerBase,
    texts: Sequence[Sequence[str]],
    labels: Sequence[int],
    max_length: int,
) -> Features:
    """Tokenises texts or pairs of texts, truncating the longer one first.

    Args:
      tokenizer: the model's.
      texts: one or two columns of equal length.
      labels: one per example.
      max_length: tokens per example, special tokens included.
    """
    size = len(labels)
    features = Features(
        np.zeros((size, max_length), np.int32),
        np.zeros((size, max_length), np.uint8),
        np.zeros((size, max_length), np.uint8),
        np.asarray(labels, np.int32),
    )
    # In pieces, so that the tokenizer's Python lists stay small.
    for start in range(0, size, _TOKENIZER_CHUNK):
        rows = slice(start, start + _TOKENIZER_CHUNK)
        encoded = tokenizer(
            list(texts[0][rows]),
            list(texts[1][rows]) if len(texts) > 1 else None,
            padding="max_length",
            truncation=True,
            max_length=max_length,
            return_tensors="np",
        )
        features.input_ids[rows] = encoded["input_ids"]
        features.attention_mask[rows] = encoded["attention_mask"]
        features.token_type_ids[rows] = encoded["token_type_ids"]
    return features


def batch_of(
    features: Features, indices: np.ndarray, batch_size: int
) -> Mapping[str, np.ndarray]:
    """Returns a batch of fixed shape; ``weights`` is 0 for the rows that fill it up."""
    filled = np.resize(indices, batch_size)
    weights = (np.arange(batch_size) < len(indices)).astype(np.float32)
    batch = {
        name: column[filled].astype(np.int32)
        for name, column in features._asdict().items()
    }
    return {**batch, "weights": weights}


def train_order(
    num_examples: int, batch_size: int, num_steps: int, seed: int
) -> Iterator[np.ndarray]:
    """Yields the examples of ``num_steps`` batches, reshuffled each epoch.

    The last batch of an epoch may be short.
    """
    step, epoch = 0, 0
    while True:
        order = np.random.default_rng((seed, epoch)).permutation(num_examples)
        for start in range(0, num_examples, batch_size):
            if step == num_steps:
                return
            yield order[start : start + batch_size]
            step += 1
        epoch += 1


def train_batches(
    features: Features, batch_size: int, num_steps: int, seed: int
) -> Iterator[Mapping[str, np.ndarray]]:
    """Yields ``num_steps`` batches in the order of :func:`train_order`."""
    for indices in train_order(len(features), batch_size, num_steps, seed):
        yield batch_of(features, indices, batch_size)


def max_distinct_tokens(
    features: Features, batch_size: int, num_steps: int, seed: int
) -> int:
    """Returns the most distinct tokens that any batch of :func:`train_batches` has."""
    seen = np.zeros(features.input_ids.max() + 1, bool)
    most = 0
    for indices in train_order(len(features), batch_size, num_steps, seed):
        tokens = features.input_ids[indices]
        seen[tokens] = True
        most = max(most, int(np.count_nonzero(seen)))
        seen[tokens] = False
    return most


def eval_batches(
    features: Features, batch_size: int
) -> Iterator[Mapping[str, np.ndarray]]:
    """Yields every example once, in order."""
    for start in range(0, len(features), batch_size):
        indices = np.arange(start, min(start + batch_size, len(features)))
        yield batch_of(features, indices, batch_size)
