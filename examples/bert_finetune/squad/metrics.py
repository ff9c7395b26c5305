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
    """Returns the words of a text, lowercased, without punctuation and articles."""
    return " ".join(_ARTICLES.sub(" ", text.lower().translate(_PUNCTUATION)).split())


def exact_match(answer: str, prediction: str) -> float:
    """Returns 1 if both normalize to the same words in the same order, else 0."""
    return float(normalize(answer) == normalize(prediction))


def f1(answer: str, prediction: str) -> float:
    """Returns the harmonic mean of precision and recall over words; 0 if none match."""
    words, predicted = normalize(answer).split(), normalize(prediction).split()
    common = (collections.Counter(words) & collections.Counter(predicted)).total()
    return 2 * common / (len(words) + len(predicted)) if common else 0.0


def squad_metrics(
    answers: Sequence[Sequence[str]], predictions: Sequence[str]
) -> dict[str, float]:
    """Returns the metrics of SQuAD 1.1 in percent; a question's best answer counts."""
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
    """Returns the metrics of SQuAD 2 in percent, named as in its evaluation script.

    ``exact`` and ``f1`` are means over all ``total`` questions; ``HasAns_`` and
    ``NoAns_`` prefix the same metrics for questions with and without answers.
    ``best_exact`` and ``best_f1`` use the best threshold on the odds,
    ``best_exact_thresh`` and ``best_f1_thresh``: questions with higher odds are left
    unanswered.

    Args:
      answers: reference answers of each question, any number; the best counts.
      predictions: predicted answer to each question, empty for no answer.
      best_texts: predicted answers if every question must be answered.
      null_odds: score of no answer minus score of the best answer, by question.
    """
    has_answer = np.array([bool(texts) for texts in answers])
    groups = {"": has_answer | True, "HasAns_": has_answer, "NoAns_": ~has_answer}
    # Answers of only articles and punctuation do not count.
    golds = [[t for t in texts if normalize(t)] or [""] for texts in answers]
    # Two texts without words match.
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
    """Returns the best mean score, and the highest odds at which to answer."""
    order = np.argsort(null_odds, kind="stable")
    odds = null_odds[order]
    gains = (if_answered - if_not)[order]
    # Questions with equal odds are answered together.
    last = np.append(odds[1:] != odds[:-1], True)
    sums = if_not.sum() + np.append(0.0, np.cumsum(gains)[last])
    best = int(np.argmax(sums))
    # With a threshold below all odds, no question is answered.
    thresholds = np.append(odds[0] - 1, odds[last])
    return float(sums[best] / len(odds)), float(thresholds[best])
