import json

import numpy as np
import pytest
from bert_finetune import metrics, reporting


def test_json_is_there_whole(tmp_path):
    path = tmp_path / "results.json"
    reporting.write_json(path, {"b": 1.5, "a": 2})
    assert json.loads(path.read_text()) == {"a": 2, "b": 1.5}
    assert list(tmp_path.iterdir()) == [path]


def test_json_lines_are_appended(tmp_path):
    path = tmp_path / "metrics.jsonl"
    for step in (1, 2):
        reporting.append_json_line(path, {"step": step})
    lines = path.read_text().splitlines()
    assert [json.loads(line)["step"] for line in lines] == [1, 2]


@pytest.mark.parametrize("length", [1, 7, 200, 1234])
def test_smoothing_averages_every_value_once(length):
    values = np.random.default_rng(0).random(length)
    steps, means = reporting.smooth(values)
    assert len(steps) == len(means) == min(length, 200)
    assert steps[-1] == length
    sizes = np.diff(steps, prepend=0)
    assert np.sum(means * sizes) == pytest.approx(values.sum())


def test_curves_are_a_png(tmp_path):
    runs = {
        "MFAC": {"loss": [0.7, 0.6], "accuracy": [0.5, 0.6]},
        "adamw": {"loss": [0.7], "accuracy": [0.4]},
    }
    results = {"MFAC": {"eval_loss": 0.65, "eval_accuracy": 0.55}}
    reporting.plot_curves(tmp_path / "curves.png", "two runs", runs, results)
    assert (tmp_path / "curves.png").read_bytes().startswith(b"\x89PNG")


def test_metrics_of_glue():
    labels, predictions = np.array([1, 1, 0, 0, 1]), np.array([1, 0, 0, 1, 1])
    values = metrics.glue_metrics(["accuracy", "f1"], labels, predictions)
    assert values["accuracy"] == pytest.approx(3 / 5)
    # Two true positives, one false positive, one false negative.
    assert values["f1"] == pytest.approx(2 / 3)
    assert values["combined_score"] == pytest.approx((3 / 5 + 2 / 3) / 2)
    assert metrics.glue_metrics(["accuracy"], labels, predictions) == {
        "accuracy": pytest.approx(3 / 5)
    }


def test_f1_without_positives_is_zero():
    zeros = np.zeros(3, int)
    assert metrics.glue_metrics(["f1"], zeros, zeros) == {"f1": 0.0}
