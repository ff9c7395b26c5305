"""Tests the grid of optimizers and seeds, mostly with a fake `run_glue.main`."""

import dataclasses
import json
import runpy
import signal
import sys
from pathlib import Path

import numpy as np
import pytest
import run_glue
import run_qa
import run_seeds
import toy_bert
from bert_finetune.arguments import GlueArguments, QaArguments, parse_arguments
from bert_finetune.errors import Interrupted, UserError
from bert_finetune.files import append_json_line, read_json_lines, write_json
from bert_finetune.reporting import log

SHARED = [
    *("--model_name_or_path", "somewhere/BERT_tiny/", "--task_name", "qqp"),
    *("--do_train", "--do_eval"),
]


def accuracy(optim, seed):
    return {"MFAC": 0.8, "adamw": 0.7, "lion": 0.6}[optim] + 0.003 * seed**2


class FakeRunGlue:
    """Writes the files of a run without training; interrupts after `budget` runs."""

    def __init__(self):
        self.runs, self.budget, self.plots = [], 100, []

    def main(self, argv):
        args = parse_arguments(GlueArguments, argv)
        directory = Path(args.output_dir)
        directory.mkdir(parents=True, exist_ok=True)
        write_json(directory / "arguments.json", dataclasses.asdict(args))
        if len(self.runs) == self.budget:
            raise Interrupted("stopped by SIGTERM.", 143)
        self.runs.append(args)
        value = accuracy(args.optim, args.seed)
        results = {"eval_accuracy": value, "eval_f1": value / 2, "eval_loss": 1 - value}
        line = {"step": 1, "epoch": 1.0, **results}
        append_json_line(directory / "metrics.jsonl", line)
        other = dict.fromkeys(run_seeds.NOT_METRICS, 5.0) | {"runtime_mm": 5.0}
        results |= {f"eval_{name}": value for name, value in other.items()}
        results |= {"train_loss": 0.5, "epoch": 1.0}
        write_json(directory / "all_results.json", results)
        return results

    def plot_bands(self, path, title, groups, metrics):
        path.write_bytes(b"")
        self.plots.append((title, groups, metrics))


@pytest.fixture
def fake(monkeypatch):
    fake = FakeRunGlue()
    monkeypatch.setattr(run_glue, "main", fake.main)
    monkeypatch.setattr(run_seeds, "plot_bands", fake.plot_bands)
    return fake


def command(root, *flags, optims=("MFAC", "adamw"), seeds=3):
    own = ["--optims", *optims, "--seeds", str(seeds)]
    return [*own, "--", *SHARED, "--output_dir", str(root), *flags]


def read_json(path):
    return json.loads(path.read_text())


def table(text):
    """Returns the cells of a Markdown table by row and column."""
    lines = [line for line in text.splitlines() if line.startswith("|")]
    (_, *columns), _, *rows = (
        [cell.strip() for cell in line.strip("|").split("|")] for line in lines
    )
    return {row: dict(zip(columns, cells, strict=True)) for row, *cells in rows}


def test_means_and_deviations_are_numpys(fake, tmp_path, capsys):
    run_seeds.main(command(tmp_path, seeds=4))
    written = read_json(tmp_path / "seeds.json")
    markdown = (tmp_path / "seeds.md").read_text(encoding="utf-8")
    cells = table(markdown)
    assert cells == table(capsys.readouterr().out)
    assert written["seeds"] == [0, 1, 2, 3]
    for optim in ("MFAC", "adamw"):
        metrics = written["optimizers"][optim]["metrics"]
        assert metrics.keys() == cells[optim].keys() == {"accuracy", "f1", "loss"}
        values = np.array([accuracy(optim, seed) for seed in range(4)])
        for name, expected in {
            "accuracy": values,
            "f1": values / 2,
            "loss": 1 - values,
        }.items():
            by_seed = metrics[name]["values"]
            assert list(by_seed) == ["0", "1", "2", "3"]
            np.testing.assert_array_equal(list(by_seed.values()), expected)
            mean, std = expected.mean(), expected.std(ddof=1)
            assert metrics[name]["mean"] == pytest.approx(mean, rel=1e-12)
            assert metrics[name]["std"] == pytest.approx(std, rel=1e-12)
            text = f"{mean:.4f} ± {std:.4f}"
            if name != "loss":
                text = f"{100 * mean:.2f} ± {100 * std:.2f}"
            assert cells[optim][name] == text
    assert {"python", "mfac_jax", "jax", "optax"} <= written["versions"].keys()
    run = written["optimizers"]["MFAC"]["runs"]["2"]
    assert run["lines"][0]["eval_loss"] == run["eval_loss"] == 1 - accuracy("MFAC", 2)
    assert run["train_loss"] == 0.5
    assert written["command"] in markdown
    assert written["command"].startswith("python examples/run_seeds.py --optims MFAC")
    ((title, groups, metrics),) = fake.plots
    assert title == "bert-tiny on qqp"
    assert metrics == ["accuracy", "f1", "loss"]
    assert [len(group) for group in groups.values()] == [4, 4]
    assert groups["adamw"][2][0]["eval_accuracy"] == accuracy("adamw", 2)


def test_one_seed_has_no_deviation(fake, tmp_path):
    run_seeds.main(command(tmp_path, seeds=1))
    assert table((tmp_path / "seeds.md").read_text())["adamw"] == {
        "accuracy": "70.00",
        "f1": "35.00",
        "loss": "0.3000",
    }
    metrics = read_json(tmp_path / "seeds.json")["optimizers"]["MFAC"]["metrics"]
    assert metrics["loss"]["std"] is None


@pytest.mark.parametrize("value", [np.nan, np.inf])
def test_a_diverged_run_does_not_prevent_the_table(fake, tmp_path, monkeypatch, value):
    monkeypatch.setattr(
        *(sys.modules[__name__], "accuracy"),
        lambda optim, seed: value if seed == 1 else 0.5,
    )
    run_seeds.main(command(tmp_path))
    text = table((tmp_path / "seeds.md").read_text())["MFAC"]["accuracy"]
    assert text == "nan ± nan"


def test_published_results_are_next_to_ours(fake, tmp_path, capsys):
    run_seeds.main(command(tmp_path, optims=("MFAC", "adamw", "lion")))
    out = capsys.readouterr().out
    cells = table(out)
    assert list(cells) == "MFAC/M-FAC, published/adamw/Adam, published/lion".split("/")
    published = {"accuracy": "84.29 ± 0.08", "f1": "79.71 ± 0.13", "loss": ""}
    assert cells["M-FAC, published"] == published
    assert cells["Adam, published"]["f1"] == "77.58 ± 0.08"
    card = "https://huggingface.co/M-FAC/bert-tiny-finetuned-qqp"
    for text in (out, (tmp_path / "seeds.md").read_text(encoding="utf-8")):
        assert f"Published M-FAC: {card}, num_grads 1024, 5 epochs." in text
        assert f"Published Adam: {card}, 5 epochs." in text
    optimizers = read_json(tmp_path / "seeds.json")["optimizers"]
    assert optimizers["adamw"]["published"]["f1"] == {
        "mean": 0.7758,
        "std": 0.0008,
        "num_grads": None,
        "epochs": 5,
        "source": card,
    }
    assert optimizers["lion"]["published"] == {}


def test_without_published_results_the_table_is_ours_alone(fake, tmp_path, capsys):
    run_seeds.main(command(tmp_path, "--task_name", "rte"))
    out = capsys.readouterr().out
    assert list(table(out)) == ["MFAC", "adamw"]
    assert "Published" not in out


def test_every_published_result_is_complete():
    lines = run_seeds.PUBLISHED.read_text(encoding="utf-8").splitlines()[1:]
    found = 0
    for model, task in {tuple(line.split(",")[:2]) for line in lines}:
        results = run_seeds.published_results(model, task)
        assert results.keys() == {"M-FAC", "Adam"}
        assert results["M-FAC"].keys() == results["Adam"].keys()
        for name, by_metric in results.items():
            for result in by_metric.values():
                found += 1
                assert 0.4 < result["mean"] < 0.9
                assert 0 < result["std"] < 0.06
                num_grads = result["num_grads"]
                assert num_grads is None if name == "Adam" else num_grads in (512, 1024)
                card = f"huggingface.co/M-FAC/{model}-finetuned-{task.replace('_', '')}"
                assert card in result["source"]
                quoted = "quoted by a third party" in result["source"]
                assert (result["epochs"] is None) == quoted
    assert found == len(lines) == 36


def test_the_arguments_of_each_run(fake, tmp_path):
    optims = ('MFAC={"num_grads": 8}', "adamw")
    flags = ["--optim_args", '{"lr": 1}', "--seed", "7"]
    run_seeds.main(command(tmp_path, *flags, optims=optims, seeds=2))
    names = ("optim", "seed", "optim_args", "output_dir", "eval_strategy", "task_name")
    assert [tuple(getattr(run, n) for n in names) for run in fake.runs] == [
        (optim, seed, args, str(tmp_path / optim / f"seed-{seed}"), "epoch", "qqp")
        for seed in (7, 8)
        for optim, args in [("MFAC", '{"num_grads": 8}'), ("adamw", '{"lr": 1}')]
    ]
    written = read_json(tmp_path / "seeds.json")
    assert written["seeds"] == [7, 8]
    arguments = written["optimizers"]["MFAC"]["arguments"]
    assert arguments["optim_args"] == '{"num_grads": 8}'
    assert not arguments.keys() & {"seed", "output_dir"}


def test_a_given_evaluation_strategy_is_kept(fake, tmp_path):
    run_seeds.main(command(tmp_path, "--eval-strategy=steps", seeds=1))
    assert [run.eval_strategy for run in fake.runs] == ["steps", "steps"]


def test_an_interrupted_grid_resumes(fake, tmp_path, capsys):
    fake.budget = 3
    with pytest.raises(Interrupted, match=r"SIGTERM\. The same .* command continues"):
        run_seeds.main(command(tmp_path, seeds=2))
    assert not (tmp_path / "seeds.md").exists()
    fake.budget = 100
    capsys.readouterr()
    run_seeds.main(command(tmp_path, seeds=2))
    assert [(run.seed, run.optim) for run in fake.runs] == [
        *((0, "MFAC"), (0, "adamw"), (1, "MFAC"), (1, "adamw"))
    ]
    out = capsys.readouterr().out
    assert f"1 of 4: MFAC, seed 0 is finished in {tmp_path}/MFAC/seed-0." in out
    assert "Run 4 of 4: adamw, seed 1.\n" in out
    # A larger grid keeps what is there.
    run_seeds.main(command(tmp_path, optims=("lion", "adamw"), seeds=2))
    assert [(run.seed, run.optim) for run in fake.runs[4:]] == [
        *((0, "lion"), (1, "lion"))
    ]


@pytest.mark.parametrize("budget", [3, 2])  # Finished, or interrupted.
def test_changed_flags_are_rejected_before_anything_runs(fake, tmp_path, budget):
    fake.budget = budget
    argv = command(tmp_path, "--max_seq_length", "64", optims=("MFAC",))
    if budget == 3:
        run_seeds.main(argv)
    else:
        with pytest.raises(Interrupted):
            run_seeds.main(argv)
        (tmp_path / "MFAC" / "seed-0" / "arguments.json").unlink()
        (tmp_path / "MFAC" / "seed-1" / "arguments.json").unlink()
    fake.budget = 100
    changed = command(tmp_path, "--bf16", optims=('MFAC={"damp": 1}', "adamw"))
    with pytest.raises(UserError) as error:
        run_seeds.main(changed)
    directory = tmp_path / "MFAC" / f"seed-{0 if budget == 3 else 2}"
    assert str(error.value) == (
        f"{directory} holds a run with other flags: --bf16 was False, now True; "
        "--max_seq_length was 64, now 128; --optim_args was None, now "
        "'{\"damp\": 1}'. Use another --output_dir."
    )
    assert len(fake.runs) == budget


def test_another_spelling_of_the_directory_is_the_same(fake, tmp_path, monkeypatch):
    run_seeds.main(command(tmp_path / "out", seeds=1))
    monkeypatch.chdir(tmp_path)
    run_seeds.main(command("./out/", seeds=1))
    assert len(fake.runs) == 2


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        (command("out", seeds=0), "--seeds must be at least 1, got 0"),
        (command("out", "--max_seq_length", "1"), "--max_seq_length must be at least"),
        (command("out", "--overwrite_output_dir"), "--overwrite_output_dir and .* are"),
        (command("out", "--distributed"), "--distributed is for single runs"),
        (command("out", "--resume_from_checkpoint"), "interrupted runs resume auto"),
        (
            command("out", optims=('MFAC={"damp": 1}', "adamw", "MFAC")),
            "--optims has MFAC twice",
        ),
        ([f for f in command("out") if f != "--do_eval"], "--do_eval are needed"),
        ([f for f in command("out") if f != "--do_train"], "--do_train and .* needed"),
    ],
)
def test_mistakes_show_before_anything_runs(fake, tmp_path, monkeypatch, argv, message):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(UserError, match=message):
        run_seeds.main(argv)
    assert not fake.runs
    assert not any(tmp_path.iterdir())


OWN_FLAGS = ["--optims", "MFAC", "--seeds", "5"]


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        (OWN_FLAGS, "required: ARGUMENTS"),
        ([*OWN_FLAGS, "--"], "required: ARGUMENTS"),
        ([*OWN_FLAGS, *SHARED], "-- ARGUMENTS"),
        (["--script", "run_qa", *OWN_FLAGS], "required: ARGUMENTS"),
        (["--seed", "1", *command("out")], "unrecognized arguments: --seed"),
    ],
)
def test_unknown_and_missing_flags_are_rejected(fake, capsys, argv, message):
    with pytest.raises(SystemExit) as exit_info:
        run_seeds.main(argv)
    assert exit_info.value.code == 2
    assert message in capsys.readouterr().err
    assert not fake.runs


def test_a_second_list_of_optimizers_is_not_a_flag_of_a_run(fake):
    with pytest.raises(UserError, match="unknown flag --optims"):
        run_seeds.main(command("out", "--optims"))


@pytest.mark.parametrize(
    ("budget", "seeds", "code"),
    [(1, 3, 143), (100, 0, "error: --seeds must be at least 1, got 0.")],
)
def test_exit_codes(fake, tmp_path, monkeypatch, budget, seeds, code):
    fake.budget = budget
    monkeypatch.setattr(sys, "argv", ["run_seeds.py", *command(tmp_path, seeds=seeds)])
    with pytest.raises(SystemExit) as exit_info:
        runpy.run_path(run_seeds.__file__, run_name="__main__")
    assert exit_info.value.code == code


def test_questions_and_answers(monkeypatch, tmp_path):
    """With `--script run_qa`: results are in percent, details are left out."""

    def main(argv):
        args = parse_arguments(QaArguments, argv)
        directory = Path(args.output_dir)
        directory.mkdir(parents=True)
        write_json(directory / "arguments.json", dataclasses.asdict(args))
        line = {"step": 1, "eval_exact": 50.0 + args.seed, "eval_f1": 60.0}
        append_json_line(directory / "metrics.jsonl", line)
        details = {"eval_total": 9, "eval_HasAns_f1": 1.0, "eval_best_f1_thresh": 2.0}
        write_json(directory / "all_results.json", line | details)

    monkeypatch.setattr(run_qa, "main", main)
    argv = ["--script", "run_qa", "--optims", "MFAC", "adamw", "--seeds", "3", "--"]
    argv += ["--model_name_or_path", "prajjwal1/bert-tiny", "--output_dir"]
    argv += [str(tmp_path), "--dataset_name", "squad_v2", "--do_train", "--do_eval"]
    run_seeds.main([*argv, "--version_2_with_negative"])
    markdown = (tmp_path / "seeds.md").read_text(encoding="utf-8")
    assert markdown.startswith("# bert-tiny on squad_v2\n")
    ours, published = {"exact": "51.00 ± 1.00", "f1": "60.00 ± 0.00"}, {}
    published["M-FAC"] = {"exact": "49.80 ± 0.43", "f1": "52.18 ± 0.20"}
    published["Adam"] = {"exact": "48.41 ± 0.57", "f1": "49.99 ± 0.54"}
    assert table(markdown) == {
        "MFAC": ours,
        "M-FAC, published": published["M-FAC"],
        "adamw": ours,
        "Adam, published": published["Adam"],
    }


@pytest.mark.usefixtures("quick_compilation")
def test_real_runs_interrupted_and_continued(tmp_path, monkeypatch):
    without_dropout = {"hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0}
    toy_bert.write_model(tmp_path / "model", **without_dropout)
    toy_bert.write_task(tmp_path / "glue", "sst2", num_train=32, num_eval=9)
    root = tmp_path / "out"
    argv = [
        *("--optims", 'MFAC={"lr": 1e-2, "num_grads": 4, "damp": 1e-4}', "adamw"),
        *("--seeds", "2", "--", "--model_name_or_path", str(tmp_path / "model")),
        *("--task_name", "sst2", "--dataset_name", str(tmp_path / "glue")),
        *("--output_dir", str(root), "--do_train", "--do_eval"),
        *("--max_seq_length", "8", "--pad_to_max_length", "--logging_steps", "1"),
        *("--per_device_train_batch_size", "16", "--num_train_epochs", "2"),
        *("--num_devices", "1"),
    ]
    append = append_json_line

    def interrupt_the_third_run(path, content):
        append(path, content)
        if path.parent == root / "MFAC" / "seed-1" and "eval_loss" in content:
            signal.raise_signal(signal.SIGINT)

    with monkeypatch.context() as patch:
        patch.setattr(log, "append_json_line", interrupt_the_third_run)
        with pytest.raises(Interrupted, match=r"SIGINT .*continues the grid"):
            run_seeds.main(argv)
    runs = [root / o / f"seed-{s}" for s in (0, 1) for o in ("MFAC", "adamw")]
    finished = [(run / "all_results.json").exists() for run in runs]
    assert finished == [True, True, False, False]
    before = [(run / "metrics.jsonl").read_bytes() for run in runs[:2]]
    run_seeds.main(argv)
    assert before == [(run / "metrics.jsonl").read_bytes() for run in runs[:2]]
    for run in runs:
        lines = read_json_lines(run / "metrics.jsonl")
        assert [line["step"] for line in lines if "loss" in line] == [1, 2, 3, 4]
        assert [line["step"] for line in lines if "eval_loss" in line] == [2, 4]
    cells = table((root / "seeds.md").read_text(encoding="utf-8"))
    assert list(cells) == ["MFAC", "adamw"]
    for optim, by_metric in read_json(root / "seeds.json")["optimizers"].items():
        for seed in (0, 1):
            results = read_json(root / optim / f"seed-{seed}" / "all_results.json")
            value = by_metric["metrics"]["accuracy"]["values"][str(seed)]
            assert value == results["eval_accuracy"]
        assert {"accuracy", "loss"} <= by_metric["metrics"].keys()
    assert (root / "seeds.png").read_bytes().startswith(b"\x89PNG")
