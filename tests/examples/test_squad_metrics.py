import json
import pathlib

import numpy as np
import pytest
from bert_finetune.squad import metrics

REFERENCE = pathlib.Path(__file__).parents[1] / "reference" / "squad_metrics.json"


@pytest.mark.parametrize(
    ("answer", "prediction", "exact", "f1"),
    [
        ("the Eiffel Tower", "Eiffel tower.", 1, 1),
        ("in 1990", "1990", 0, 2 / 3),  # Precision 1, recall 1/2.
        ("A cat, an owl", "cat owl the dog", 0, 4 / 5),  # 2 of 3 and 2 of 2.
        ("red red blue", "red", 0, 1 / 2),  # A word counts as often as it occurs.
        ("red", "blue", 0, 0),
        ("theatre", "re", 0, 0),  # Articles are whole words.
        ("U.S.", "us", 1, 1),
        ("naïve  café", "Naïve Café", 1, 1),
    ],
)
def test_scores_worked_out_by_hand(answer, prediction, exact, f1):
    assert metrics.exact_match(answer, prediction) == exact
    assert metrics.f1(answer, prediction) == pytest.approx(f1)


def test_version_1_by_hand():
    answers = [["red cat", "cat"], ["blue dog"], ["one two three four"]]
    values = metrics.squad_metrics(answers, ["The Cat", "dog", "five"])
    assert values == pytest.approx({"exact_match": 100 / 3, "f1": 100 * (5 / 3) / 3})


def test_version_2_by_hand():
    """Four questions; two of them have an answer."""
    values = metrics.squad_v2_metrics(
        [["red cat", "cat"], ["blue dog"], [], []],
        ["cat", "", "", "dog"],
        ["cat", "dog", "red", "dog"],
        [-2.0, 1.0, 3.0, -1.0],
    )
    # Exact: 1, 0, 1, 0. F1: the same. Answered up to odds of -2: 1, 0, 1, 1; up to 1:
    # 1, 2/3 in F1, 1, 0.
    assert values == pytest.approx(
        {
            **{"exact": 50, "f1": 50, "total": 4},
            **{"HasAns_exact": 50, "HasAns_f1": 50, "HasAns_total": 2},
            **{"NoAns_exact": 50, "NoAns_f1": 50, "NoAns_total": 2},
            **{"best_exact": 75, "best_exact_thresh": -2},
            **{"best_f1": 75, "best_f1_thresh": -2},
        }
    )


def test_a_text_without_words_matches_only_another_without_words():
    answers, texts = [["red"], [], ["the"]], ["the", "an", "a"]
    values = metrics.squad_v2_metrics(answers, texts, texts, [0.0] * 3)
    # "the" counts as an answer, although it normalizes to nothing.
    assert (values["HasAns_f1"], values["HasAns_total"]) == (50, 2)
    assert (values["NoAns_f1"], values["NoAns_total"]) == (100, 1)


def test_all_answered_or_none():
    values = metrics.squad_v2_metrics([["red"]], ["red"], ["red"], [7.0])
    assert not any(name.startswith("NoAns") for name in values)
    assert (values["best_exact"], values["best_exact_thresh"]) == (100, 7)
    values = metrics.squad_v2_metrics([[]], [""], ["red"], [7.0])
    assert not any(name.startswith("HasAns") for name in values)
    # Every question stays unanswered below the lowest odds.
    assert (values["best_f1"], values["best_f1_thresh"] < 7) == (100, True)


def test_the_best_threshold_is_the_best_of_all():
    rng = np.random.default_rng(0)
    words = ["red", "blue", "cat", "dog"]
    answers = [[" ".join(rng.choice(words, 2))] * rng.integers(0, 2) for _ in range(80)]
    best_texts = [" ".join(rng.choice(words, 2)) for _ in answers]
    odds = rng.integers(-5, 6, len(answers)) / 2  # Many are equal.

    def at(threshold):
        predictions = np.where(odds > threshold, "", best_texts).tolist()
        return metrics.squad_v2_metrics(answers, predictions, best_texts, odds)

    found = at(0.0)
    for name in ("exact", "f1"):
        best = max(at(threshold)[name] for threshold in [-9, *odds])
        assert found[f"best_{name}"] == pytest.approx(best)
        threshold = found[f"best_{name}_thresh"]
        assert at(threshold)[name] == pytest.approx(best)
        assert found[name] < best


def test_the_metrics_match_transformers_4():
    recorded = json.loads(REFERENCE.read_text())
    values = metrics.squad_v2_metrics(
        *(recorded[k] for k in ("answers", "predictions", "best_texts", "null_odds"))
    )
    assert values == pytest.approx(recorded["squad_v2"], abs=1e-9)


def test_the_metrics_match_torchmetrics():
    recorded = json.loads(REFERENCE.read_text())
    # For an answer without words it computes the F1 of SQuAD 2.
    chosen = [i for i, t in enumerate(recorded["answers"]) if t and "the" not in t]
    values = metrics.squad_metrics(
        *([recorded[name][i] for i in chosen] for name in ("answers", "predictions"))
    )
    assert values == pytest.approx(recorded["squad"], rel=1e-6)  # It is in float32.
