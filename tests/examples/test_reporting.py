import json
import math

import numpy as np
import pytest
from bert_finetune.errors import UserError
from bert_finetune.files import append_json_line, read_json_lines, write_json
from bert_finetune.glue import metrics
from bert_finetune.reporting.plots import plot_bands, plot_curves, smooth


def test_json_is_written_without_leftovers(tmp_path):
    path = tmp_path / "results.json"
    write_json(path, {"b": 1.5, "a": 2})
    assert json.loads(path.read_text()) == {"a": 2, "b": 1.5}
    assert list(tmp_path.iterdir()) == [path]


def test_json_lines_are_appended(tmp_path):
    path = tmp_path / "metrics.jsonl"
    for step in (1, 2):
        append_json_line(path, {"step": step})
    lines = path.read_text().splitlines()
    assert [json.loads(line)["step"] for line in lines] == [1, 2]


@pytest.mark.parametrize("torn", [b"", b'{"step": 3, "lo', b'{"step": "\xff', b"\0\0"])
def test_json_lines_are_read_without_a_torn_last_one(tmp_path, torn):
    path = tmp_path / "metrics.jsonl"
    for step, loss in ((1, 0.5), (2, math.inf)):
        append_json_line(path, {"step": step, "loss": loss})
    assert path.read_text().endswith('{"step": 2, "loss": null}\n')
    path.write_bytes(path.read_bytes() + torn)
    first, second = read_json_lines(path)
    assert first == {"step": 1, "loss": 0.5}
    assert math.isnan(second["loss"])


def test_json_has_no_nan(tmp_path):
    write_json(tmp_path / "a.json", {"a": [math.nan, (1.0,)], "b": {"c": -math.inf}})
    content = json.loads((tmp_path / "a.json").read_text())
    assert content == {"a": [None, [1.0]], "b": {"c": None}}


def test_torn_line_in_the_middle_is_an_error(tmp_path):
    path = tmp_path / "metrics.jsonl"
    path.write_text('{"step": 1}\n{"step": 2{"step": 2}\n{"step": 3}\n')
    with pytest.raises(UserError, match="line 2 of"):
        read_json_lines(path)


@pytest.mark.parametrize("length", [1, 7, 200, 1234])
def test_smoothing_averages_every_value_once(length):
    values = np.random.default_rng(0).random(length)
    steps, means = smooth(range(5, 5 * length + 5, 5), values)
    assert len(steps) == len(means) == min(length, 200)
    assert steps[-1] == 5 * length
    sizes = np.diff(np.array(steps) // 5, prepend=0)
    assert np.sum(means * sizes) == pytest.approx(values.sum())


@pytest.fixture
def drawn(monkeypatch):
    """Collects the figures that are saved."""
    from matplotlib.figure import Figure

    figures, save = [], Figure.savefig

    def savefig(figure, *args, **kwargs):
        figures.append(figure)
        save(figure, *args, **kwargs)

    monkeypatch.setattr(Figure, "savefig", savefig)
    return figures


def curves(axes):
    return {line.get_label(): line.get_xydata().tolist() for line in axes.lines}


def test_curves_are_drawn_by_panel_and_run(tmp_path, drawn):
    runs = {
        "MFAC": [
            {"step": 5, "loss": 0.7, "accuracy": 0.5},
            {"step": 5, "eval_loss": 0.75, "eval_accuracy": 0.25, "eval_f1": 0.125},
            {"step": 10, "loss": 0.6, "accuracy": 0.6},
            {"step": 10, "eval_loss": 0.65, "eval_accuracy": 0.75, "eval_f1": 0.875},
        ],
        "adamw": [{"step": 20, "loss": 0.9, "accuracy": 0.3}],
    }
    path = tmp_path / "curves.png"
    plot_curves(path, "two runs", runs, ["accuracy", "f1"])
    assert path.read_bytes().startswith(b"\x89PNG")
    loss, accuracy, f1 = drawn[0].axes
    assert curves(loss) == {
        "MFAC, training": [[5, 0.7], [10, 0.6]],
        "MFAC, validation: 0.650": [[5, 0.75], [10, 0.65]],
        "adamw, training": [[20, 0.9]],
    }
    assert curves(accuracy)["MFAC, validation: 0.750"] == [[5, 0.25], [10, 0.75]]
    assert curves(f1) == {"MFAC, validation: 0.875": [[5, 0.125], [10, 0.875]]}
    assert [axes.get_ylabel() for axes in drawn[0].axes] == ["loss", "accuracy", "f1"]
    colors = [line.get_color() for line in loss.lines]
    assert colors == ["C0", "C0", "C1"]


@pytest.mark.parametrize(
    "lines",
    [
        [],
        [{"step": 1, "loss": math.nan}, {"step": 1, "eval_accuracy": math.nan}],
        [{"step": 1, "loss": math.inf}, {"step": 2, "loss": 1.0}],
        [{"step": step, "loss": 1.0} for step in range(1, 502)],
    ],
)
@pytest.mark.parametrize("metrics", [[], ["accuracy", "f1"]])
def test_curves_of_odd_runs_are_drawn(tmp_path, lines, metrics):
    path = tmp_path / "curves.png"
    plot_curves(path, "odd", {"run": lines, "empty": []}, metrics)
    assert path.exists()


def evaluations(values):
    return [{"step": 0, "loss": 1.0}] + [
        {"step": step, "eval_f1": value} for step, value in values.items()
    ]


@pytest.mark.parametrize(
    ("seeds", "label", "means", "band"),
    [
        ([{5: 0.5, 10: 0.75}], "MFAC: 0.750", [[5, 0.5], [10, 0.75]], None),
        (
            [{5: 0.25, 10: 0.5}, {5: 0.75, 10: 0.5}],
            "MFAC: 0.500 ± 0.000, 2 seeds",
            [[5, 0.5], [10, 0.5]],
            # The sample standard deviation: √(0.25² + 0.25²).
            (0.5 - 0.125**0.5, 0.5 + 0.125**0.5),
        ),
        (
            [{5: 0.0, 10: 0.5, 15: 1.0}, {10: 0.5}, {}],
            "MFAC: 0.500 ± 0.000, 2 seeds",
            [[10, 0.5]],
            (0.5, 0.5),
        ),
        ([{5: 0.5}, {10: 0.5}], None, None, None),
        ([{}], None, None, None),
        ([], None, None, None),
    ],
)
def test_bands_are_over_the_seeds(tmp_path, drawn, seeds, label, means, band):
    path = tmp_path / "bands.png"
    groups = {"MFAC": [evaluations(values) for values in seeds]}
    plot_bands(path, "seeds", groups, ["f1", "accuracy"])
    assert path.read_bytes().startswith(b"\x89PNG")
    f1, accuracy = drawn[0].axes
    assert curves(accuracy) == {}
    assert curves(f1) == ({} if label is None else {label: means})
    assert len(f1.collections) == (band is not None)
    if band is not None:
        heights = f1.collections[0].get_paths()[0].vertices[:, 1]
        assert (heights.min(), heights.max()) == pytest.approx(band)


def test_training_means_are_dashed(tmp_path, drawn):
    first = [{"step": 1, "loss": 1.0}, {"step": 2, "eval_loss": 4.0}]
    groups = {"MFAC": [first, [{"step": 1, "loss": 2.0}]]}
    plot_bands(tmp_path / "bands.png", "seeds", groups, ["loss"])
    dashed, validation = drawn[0].axes[0].lines
    assert (dashed.get_linestyle(), dashed.get_xydata().tolist()) == ("--", [[1, 1.5]])
    assert validation.get_xydata().tolist() == [[2, 4]]


def test_bands_of_a_diverged_seed_are_drawn(tmp_path):
    runs = [evaluations({1: value}) for value in (math.inf, math.nan, 1.0)]
    plot_bands(tmp_path / "bands.png", "seeds", {"lion": runs}, ["f1"])


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
