"""Cuts contexts into chunks, and locates answers in them."""

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import datasets
import numpy as np

from bert_finetune.data import features as tokenized
from bert_finetune.errors import UserError

_COLUMNS = {
    **tokenized.TOKEN_COLUMNS,
    "question": datasets.Value("int32"),
    "first_chars": datasets.List(datasets.Value("int32")),
    "end_chars": datasets.List(datasets.Value("int32")),
}


class Chunks(NamedTuple):
    """Tokenized pairs of a question and a chunk of its context; arrays are int32."""

    features: tokenized.Features  # One example per chunk.
    questions: np.ndarray  # (chunks,), ascending: index of the question.
    first_chars: np.ndarray  # (tokens,): start in the context, -1 outside.
    end_chars: np.ndarray  # Likewise, one past its last character.


def cut(
    dataset: datasets.Dataset,
    tokenizer: Any,
    max_length: int,
    stride: int,
    *,
    overwrite_cache: bool = False,
) -> Chunks:
    """Tokenizes questions with their contexts; cuts long ones into overlapping chunks.

    A question that leaves no room for new context tokens is truncated. ``max_length``
    includes question and special tokens; consecutive chunks share ``stride`` tokens.
    """
    room = max_length - stride - tokenizer.num_special_tokens_to_add(pair=True) - 1
    if room < 1:
        raise UserError(
            f"--doc_stride {stride} is too large for --max_seq_length {max_length}: "
            "each chunk must hold the question, the special tokens and at least one "
            "new token of the context."
        )

    def encode(batch: Mapping[str, list[str]], rows: list[int]) -> dict[str, Any]:
        encoded = tokenizer(
            _cut_off(batch["question"], tokenizer, room),
            batch["context"],
            truncation="only_second",
            max_length=max_length,
            stride=stride,
            return_overflowing_tokens=True,
        )
        return {
            **{name: encoded[name] for name in tokenized.TOKEN_COLUMNS},
            "question": [rows[i] for i in encoded["overflow_to_sample_mapping"]],
            "first_chars": [_context_chars(chunk, 0) for chunk in encoded.encodings],
            "end_chars": [_context_chars(chunk, 1) for chunk in encoded.encodings],
        }

    key = ("chunks", max_length, stride)
    cut_up = tokenized.map_cached(
        dataset, encode, _COLUMNS, tokenizer, key, overwrite_cache=overwrite_cache
    )
    return Chunks(
        tokenized.features_of(cut_up, tokenizer, {}),
        cut_up.data.column("question").to_numpy(),
        tokenized.ragged(cut_up, "first_chars")[0],
        tokenized.ragged(cut_up, "end_chars")[0],
    )


def _cut_off(questions: Sequence[str], tokenizer: Any, room: int) -> list[str]:
    encodings = tokenizer(list(questions), add_special_tokens=False).encodings
    return [
        question if len(encoding) <= room else question[: encoding.offsets[room][0]]
        for question, encoding in zip(questions, encodings, strict=True)
    ]


def _context_chars(chunk: Any, end: int) -> list[int]:
    """Returns the start (``end`` 0) or end (1) of context tokens; -1 elsewhere."""
    pairs = zip(chunk.offsets, chunk.sequence_ids, strict=True)
    return [offsets[end] if part == 1 else -1 for offsets, part in pairs]


def answer_positions(
    chunks: Chunks, answers: Sequence[tuple[int, int] | None]
) -> dict[str, np.ndarray]:
    """Returns the first and last token of the answer in each chunk.

    They delimit the narrowest span that contains the answer. Both are 0, the position
    of [CLS], if the chunk does not contain the complete answer or there is none.
    ``answers`` gives each answer's first character in its context, and one past its
    last.
    """
    positions = np.zeros((2, len(chunks.questions)), np.int32)
    starts = chunks.features.starts
    for i, question in enumerate(chunks.questions):
        tokens, answer = slice(starts[i], starts[i + 1]), answers[question]
        [context] = np.nonzero(chunks.first_chars[tokens] >= 0)
        if answer is None or not len(context):
            continue
        first_char, end_char = answer
        firsts = chunks.first_chars[tokens][context]
        ends = chunks.end_chars[tokens][context]
        if firsts[0] <= first_char and end_char <= ends[-1]:
            first = np.searchsorted(firsts, first_char, side="right") - 1
            last = np.searchsorted(ends, end_char, side="left")
            # Several tokens can share a character: include all of them.
            first = np.searchsorted(firsts, firsts[first], side="left")
            last = np.searchsorted(ends, ends[last], side="right") - 1
            positions[:, i] = context[first], context[last]
    return {"start_positions": positions[0], "end_positions": positions[1]}
