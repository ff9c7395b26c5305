"""Exact match and F1, as the evaluation scripts of SQuAD 1.1 and 2 define them.

References:
  Rajpurkar et al., `SQuAD: 100,000+ Questions for Machine Comprehension of Text
  <https://arxiv.org/abs/1606.05250>`_, 2016, section 6.1

  Rajpurkar et al., `Know What You Don't Know: Unanswerable Questions for SQuAD
  <https://arxiv.org/abs/1806.03822>`_, 2018
"""

import collections
import functools
import re
import string
from collections.abc import Callable, Sequence

import numpy as np

_PUNCTUATION = str.maketrans("", "", string.punctuation)
_ARTICLES = re.compile(r"\b(a|an|the)\b")


@functools.lru_cache(maxsize=2**16)
def normalize(text: str) -> str:
    """Returns the words of a text, without case, punctuation and articles."""
    return " ".join(_ARTICLES.sub(" ", text.lower().translate(_PUNCTUATION)).split())


def exact_match(answer: str, prediction: str) -> float:
    """Returns 1 if both have the same words in the same order, otherwise 0."""
    return float(normalize(answer) == normalize(prediction))


def f1(answer: str, prediction: str) -> float:
    """Returns the harmonic mean of precision and recall over words; 0 without any."""
    words, predicted = normalize(answer).split(), normalize(prediction).split()
    common = (collections.Counter(words) & collections.Counter(predicted)).total()
    return 2 * common / (len(words) + len(predicted)) if common else 0.0


def squad_metrics(
    answers: Sequence[Sequence[str]], predictions: Sequence[str]
) -> dict[str, float]:
    """Returns the metrics of version 1.1, in percent, of the best of each answer."""
    return {
        name: 100 * float(np.mean(_best_scores(score, answers, predictions)))
        for name, score in {"exact_match": exact_match, "f1": f1}.items()
    }


def _best_scores(
    score: Callable[[str, str], float],
    answers: Sequence[Sequence[str]],
    predictions: Sequence[str],
) -> np.ndarray:
    pairs = zip(answers, predictions, strict=True)
    return np.array([max(score(text, p) for text in texts) for texts, p in pairs])


def squad_v2_metrics(
    answers: Sequence[Sequence[str]],
    predictions: Sequence[str],
    best_texts: Sequence[str],
    null_odds: Sequence[float],
) -> dict[str, float]:
    """Returns the metrics of version 2, in percent, under the names of its script.

    ``exact`` and ``f1`` are over all questions, and with ``HasAns_`` or ``NoAns_`` over
    those with or without answers, each with ``total``, their number. ``best_exact`` and
    ``best_f1`` are what the best threshold on the odds would give, which is
    ``best_exact_thresh`` or ``best_f1_thresh``: questions of odds above it are left
    unanswered.

    Args:
      answers: to each question, any number; the best counts.
      predictions: the answer of the model to each question, empty for none.
      best_texts: the same if it had to answer.
      null_odds: the larger, the rather a question is left unanswered.
    """
    has_answer = np.array([bool(texts) for texts in answers])
    groups = {"": has_answer | True, "HasAns_": has_answer, "NoAns_": ~has_answer}
    # An answer of articles and punctuation alone is none.
    golds = [[t for t in texts if normalize(t)] or [""] for texts in answers]
    # That neither side has words is a match.
    scores = {"exact": exact_match, "f1": lambda a, p: f1(a, p) or exact_match(a, p)}
    values = {
        name: _best_scores(score, golds, predictions) for name, score in scores.items()
    }
    metrics: dict[str, float] = {}
    for prefix, chosen in groups.items():
        if chosen.any():
            for name, value in values.items():
                metrics[prefix + name] = 100 * float(value[chosen].mean())
            metrics[f"{prefix}total"] = int(chosen.sum())
    for name, score in scores.items():
        best, metrics[f"best_{name}_thresh"] = _best_threshold(
            _best_scores(score, golds, best_texts),
            _best_scores(score, golds, [""] * len(golds)),
            np.asarray(null_odds),
        )
        metrics[f"best_{name}"] = 100 * best
    return metrics


def _best_threshold(
    if_answered: np.ndarray, if_not: np.ndarray, null_odds: np.ndarray
) -> tuple[float, float]:
    """Returns the best mean score, and the odds up to which questions are answered."""
    order = np.argsort(null_odds, kind="stable")
    odds = null_odds[order]
    gains = (if_answered - if_not)[order]
    # Questions of equal odds are answered together.
    last = np.append(odds[1:] != odds[:-1], True)
    sums = if_not.sum() + np.append(0.0, np.cumsum(gains)[last])
    best = int(np.argmax(sums))
    # Below all odds no question is answered.
    thresholds = np.append(odds[0] - 1, odds[last])
    return float(sums[best] / len(odds)), float(thresholds[best])
