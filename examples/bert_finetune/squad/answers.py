"""Finds the best answer spans of each question from start and end logits."""

from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np
from scipy.special import softmax

from bert_finetune.squad.chunks import Chunks


class Span(NamedTuple):
    """A span of a context, or the empty no-answer span, with its logits."""

    text: str
    start_logit: float
    end_logit: float

    def score(self) -> float:
        return self.start_logit + self.end_logit


# If no span is valid, the score of no answer is compared with 0.
_NO_SPAN = Span("", 0.0, 0.0)


class Answer(NamedTuple):
    """A model's answer to a question."""

    text: str  # Empty for no answer.
    best_text: str  # The best span, even if no answer scores higher.
    # Score of no answer minus score of `best_text`; None without `null_threshold`.
    null_odds: float | None
    # Best first: `text`, `probability`, `start_logit` and `end_logit`.
    n_best: list[dict[str, Any]]


def find_answers(
    contexts: Sequence[str],
    chunks: Chunks,
    start_logits: np.ndarray,
    end_logits: np.ndarray,
    *,
    n_best_size: int,
    max_answer_length: int,
    null_threshold: float | None,
) -> list[Answer]:
    """Returns the answer to every question.

    The score of a span is the sum of its start and end logits. In each chunk, the
    ``n_best_size`` best starts and ends are combined. The score of no answer is the
    score of the first token, [CLS], in the chunk where it is lowest.

    Args:
      contexts: context of each question.
      chunks: chunks of the questions.
      start_logits: shape ``(tokens,)``, aligned with the tokens of ``chunks``.
      end_logits: likewise.
      n_best_size: maximum number of answers to list per question.
      max_answer_length: maximum number of tokens in an answer.
      null_threshold: questions with higher odds are left unanswered; ``None`` if every
        question has an answer.
    """
    bounds = np.searchsorted(chunks.questions, np.arange(len(contexts) + 1))
    starts = chunks.features.starts
    answers = []
    for question, context in enumerate(contexts):
        spans, nulls = [], []
        for i in range(bounds[question], bounds[question + 1]):
            tokens = slice(starts[i], starts[i + 1])
            start, end = start_logits[tokens], end_logits[tokens]
            firsts, ends = chunks.first_chars[tokens], chunks.end_chars[tokens]
            nulls.append(Span("", float(start[0]), float(end[0])))
            best = _best_spans(start, end, firsts >= 0, n_best_size, max_answer_length)
            spans += [
                Span(context[firsts[a] : ends[b]], float(start[a]), float(end[b]))
                for a, b in best
            ]
        answers.append(_choose(spans, nulls, n_best_size, null_threshold))
    return answers


def _best_spans(
    start_logits: np.ndarray,
    end_logits: np.ndarray,
    is_context: np.ndarray,
    n_best_size: int,
    max_answer_length: int,
) -> np.ndarray:
    """Returns the first and last token of each of the best spans in a chunk."""
    firsts = np.argsort(-start_logits, kind="stable")[:n_best_size]
    lasts = np.argsort(-end_logits, kind="stable")[:n_best_size]
    firsts, lasts = firsts[is_context[firsts]], lasts[is_context[lasts]]
    lengths = lasts - firsts[:, None] + 1
    a, b = np.nonzero((lengths >= 1) & (lengths <= max_answer_length))
    scores = start_logits[firsts[a]] + end_logits[lasts[b]]
    best = np.argsort(-scores, kind="stable")[:n_best_size]
    return np.stack([firsts[a[best]], lasts[b[best]]], axis=1)


def _choose(
    spans: list[Span], nulls: list[Span], n_best_size: int, null_threshold: float | None
) -> Answer:
    null = [] if null_threshold is None else [min(nulls, key=Span.score)]
    n_best = sorted([*spans, *null], key=Span.score, reverse=True)[:n_best_size]
    n_best += [span for span in null if span not in n_best]
    scores = [span.score() for span in n_best]
    probabilities = softmax(scores).tolist() if scores else []
    listed = [
        {**span._asdict(), "probability": probability}
        for span, probability in zip(n_best, probabilities, strict=True)
    ]
    best = max(spans, key=Span.score, default=_NO_SPAN)
    if null_threshold is None:
        return Answer(best.text, best.text, None, listed)
    odds = null[0].score() - best.score()
    text = "" if odds > null_threshold else best.text
    return Answer(text, best.text, odds, listed)
