"""The GLUE script, run as a user would run it, on small generated data."""

import json
import pathlib
import subprocess
import sys

import numpy as np
import pytest
import run_glue
import toy_bert
from bert_finetune import optimizers
from bert_finetune.errors import UserError
from safetensors.numpy import load_file

MFAC = [
    *("--optim", "MFAC"),
    *("--optim_args", '{"lr": 1e-2, "num_grads": 64, "damp": 1e-4}'),
]
ADAMW = ["--optim", "adamw", "--learning_rate", "3e-3"]


@pytest.fixture(scope="module")
def root(tmp_path_factory):
    """Holds a model directory like the hub's and the three tasks."""
    root = tmp_path_factory.mktemp("root")
    toy_bert.write_model(root / "model", as_torch=True)
    for task in ("qqp", "mrpc", "sst2"):
        toy_bert.write_task(root / "glue", task)
    return root


def command(root, output_dir, task="sst2", *flags):
    return [
        *("--model_name_or_path", str(root / "model"), "--task_name", task),
        *("--dataset_name", str(root / "glue"), "--output_dir", str(output_dir)),
        *("--max_seq_length", "16", "--per_device_train_batch_size", "16"),
        *flags,
    ]


def read_json(path):
    return json.loads(path.read_text())


@pytest.mark.parametrize(
    ("task", "optim"),
    [("qqp", MFAC), ("qqp", ADAMW), ("mrpc", MFAC), ("sst2", MFAC)],
)
def test_trains_evaluates_and_saves(root, tmp_path, task, optim):
    flags = [*optim, "--do_train", "--do_eval", "--num_train_epochs", "5"]
    results = run_glue.main(
        command(root, tmp_path, task, *flags, "--logging_steps", "30")
    )
    written = read_json(tmp_path / "eval_results.json")
    assert written == results
    keys = {"eval_loss", "eval_accuracy", "eval_samples", "epoch"}
    if task != "sst2":
        keys |= {"eval_f1", "eval_combined_score"}
    assert keys <= written.keys()
    assert written["eval_samples"] == 37  # Not a multiple of the batch size.
    train_results = read_json(tmp_path / "train_results.json")
    assert train_results["train_samples"] == 320
    assert train_results["epoch"] == written["epoch"] == 5
    lines = (tmp_path / "metrics.jsonl").read_text().splitlines()
    metrics = [json.loads(line) for line in lines]
    assert [line["step"] for line in metrics] == [1, 30, 60, 90, 100]
    assert {"loss", "accuracy", "learning_rate", "epoch"} <= metrics[-1].keys()
    assert ("damp" in metrics[-1]) == (optim is MFAC)
    assert metrics[-1]["loss"] < metrics[0]["loss"]
    assert written["eval_accuracy"] > 0.9
    assert (tmp_path / "curves.png").exists()
    for name in ("config.json", "model.safetensors", "tokenizer.json"):
        assert (tmp_path / name).exists()
    # What was saved evaluates to the same figures.
    argv = command(root, tmp_path / "again", task, "--do_eval")
    argv[1] = str(tmp_path)
    again = run_glue.main([*argv, "--per_device_eval_batch_size", "5"])
    for name in keys - {"epoch"}:
        assert again[name] == pytest.approx(written[name], rel=1e-5)


def test_a_run_can_be_repeated_to_the_bit(root, tmp_path):
    flags = [*MFAC, "--do_train", "--max_steps", "9", "--logging_steps", "1"]
    for name, seed in {"first": "1", "again": "1", "other": "2"}.items():
        run_glue.main(command(root, tmp_path / name, "qqp", *flags, "--seed", seed))
    first, again, other = (
        load_file(tmp_path / name / "model.safetensors")
        for name in ("first", "again", "other")
    )
    assert all(np.array_equal(first[name], again[name]) for name in first)
    assert not all(np.array_equal(first[name], other[name]) for name in first)
    lines = (tmp_path / "first" / "metrics.jsonl").read_text().splitlines()
    assert len(lines) == 9
    assert lines == (tmp_path / "again" / "metrics.jsonl").read_text().splitlines()


def test_row_sparse_windows_follow_dense_ones_and_drop_nothing(root, tmp_path):
    losses = {}
    for window in ("row_sparse", "dense"):
        output_dir = tmp_path / window
        optim_args = json.dumps(
            {"lr": 1e-2, "num_grads": 8, "damp": 1e-2, "window": window}
        )
        argv = command(
            *(root, output_dir, "qqp", "--optim", "MFAC", "--optim_args", optim_args),
            *("--do_train", "--max_steps", "20", "--logging_steps", "1"),
        )
        run_glue.main([*argv, "--per_device_train_batch_size", "2"])
        lines = (output_dir / "metrics.jsonl").read_text().splitlines()
        losses[window] = [json.loads(line)["loss"] for line in lines]
        assert read_json(output_dir / "train_results.json")["num_dropped"] == 0
    np.testing.assert_allclose(losses["row_sparse"], losses["dense"], rtol=1e-4)


def test_sample_limits_and_step_limits(root, tmp_path):
    results = run_glue.main(
        command(
            *(root, tmp_path, "sst2", *ADAMW, "--do_train", "--do_eval"),
            *("--max_train_samples", "20", "--max_eval_samples", "10"),
            *("--max_steps", "3"),
        )
    )
    assert results["eval_samples"] == 10
    train_results = read_json(tmp_path / "train_results.json")
    assert train_results["train_samples"] == 20
    assert train_results["epoch"] == 1.5  # 3 steps of 2 an epoch.


def test_a_learning_rate_of_zero_changes_nothing(root, tmp_path):
    flags = [*ADAMW[:2], "--learning_rate", "0", "--do_train", "--max_steps", "2"]
    run_glue.main(command(root, tmp_path, "sst2", *flags))
    for name, array in load_file(tmp_path / "model.safetensors").items():
        np.testing.assert_array_equal(array, toy_bert.tensors()[name])


def spoil_columns(directory, **columns):
    for split in ("train", "validation"):
        defaults = {"sentence": ["a", "b", "c"], "label": [0, 1, 0]} | columns
        kept = {name: column for name, column in defaults.items() if column}
        path = directory / "sst2" / f"{split}-00000-of-00001.parquet"
        toy_bert.write_parquet(path, kept)


@pytest.mark.parametrize(
    ("columns", "message"),
    [
        ({"sentence": None, "text": ["a", "b", "c"]}, "no column 'sentence'.*text"),
        ({"label": None}, "no column 'label'; it has sentence"),
        ({"label": [0, 1, 2]}, r"integers from 0 to 1, got \[0, 1, 2\]"),
        ({"label": [-1, -1, -1]}, r"integers from 0 to 1, got \[-1\]"),
        ({"label": [0.0, 0.5, 1.0]}, "integers from 0 to 1"),
        ({"label": ["no", "yes", "no"]}, "integers from 0 to 1"),
        ({"label": [0, None, 1]}, "integers from 0 to 1"),
        ({"sentence": [1, 2, 3]}, "'sentence' .* must hold a text in every row"),
        ({"sentence": ["a", None, "c"]}, "1 empty entries"),
    ],
)
def test_bad_data_is_one_clear_error(root, tmp_path, columns, message):
    spoil_columns(tmp_path / "data", **columns)
    argv = command(root, tmp_path / "out", "sst2", *MFAC, "--do_train")
    argv[5] = str(tmp_path / "data")
    with pytest.raises(UserError, match=message):
        run_glue.main(argv)
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--task_name", "cola"], "--task_name must be one of mrpc, qqp, sst2, got 'c"),
        (["--optim", "sgd"], "--optim must be one of MFAC, adamw"),
        (["--optim_args", '{"num_grads": 0}'], "num_grads must be at least 1"),
        (["--max_seq_length", "64"], "64 is more than the 32 positions"),
    ],
)
def test_a_bad_flag_writes_nothing(root, tmp_path, flags, message):
    argv = command(root, tmp_path / "out", "sst2", "--optim", "MFAC", "--do_train")
    with pytest.raises(UserError, match=message):
        run_glue.main([*argv, *flags])
    assert not (tmp_path / "out").exists()


def test_a_missing_split_is_named(root, tmp_path):
    toy_bert.write_task(tmp_path / "data", "sst2")
    (tmp_path / "data/sst2/validation-00000-of-00001.parquet").unlink()
    argv = command(root, tmp_path / "out", "sst2", "--do_eval")
    argv[5] = str(tmp_path / "data")
    with pytest.raises(UserError, match=r"no sst2/validation-\*\.parquet in .*data"):
        run_glue.main(argv)


def test_a_file_that_is_not_parquet_is_named(root, tmp_path):
    toy_bert.write_task(tmp_path / "data", "sst2")
    path = tmp_path / "data/sst2/train-00000-of-00001.parquet"
    path.write_text("sentence,label")
    argv = command(root, tmp_path / "out", "sst2", "--do_train")
    argv[5] = str(tmp_path / "data")
    with pytest.raises(UserError, match=r"train-00000-of-00001.parquet cannot be read"):
        run_glue.main(argv)


def test_a_directory_in_use_is_kept(root, tmp_path):
    kept = tmp_path / "results.txt"
    kept.write_text("precious")
    argv = command(root, tmp_path, "sst2", *ADAMW, "--do_train", "--max_steps", "1")
    with pytest.raises(UserError, match=r"not empty: .*--overwrite_output_dir"):
        run_glue.main(argv)
    assert [p.name for p in tmp_path.iterdir()] == ["results.txt"]
    run_glue.main([*argv, "--overwrite_output_dir"])
    assert kept.read_text() == "precious"
    assert (tmp_path / "model.safetensors").exists()


def test_an_unwritable_directory_is_named(root, tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match=r"--output_dir .*file/out cannot be written"):
        run_glue.main(command(root, tmp_path / "file" / "out", "sst2", "--do_train"))


def test_a_window_too_large_is_refused_before_anything_is_written(
    root, tmp_path, monkeypatch
):
    monkeypatch.setattr(optimizers, "available_memory", lambda: 10**6)
    flags = ["--optim", "MFAC", "--optim_args", '{"num_grads": 1024}', "--do_train"]
    with pytest.raises(UserError, match="lower num_grads"):
        run_glue.main(command(root, tmp_path / "out", "sst2", *flags))
    assert not (tmp_path / "out").exists()


def test_as_a_script(root, tmp_path):
    """One process of its own: the exit code, and one line instead of a traceback."""
    script = pathlib.Path(run_glue.__file__)
    argv = command(root, tmp_path / "out", "sst2", *MFAC, "--do_train", "--max_steps=2")
    run = subprocess.run(
        [sys.executable, str(script), *argv],
        capture_output=True,
        text=True,
        cwd=tmp_path,
        env={"PYTHONPATH": str(script.parents[1]), "JAX_PLATFORMS": "cpu"},
        check=False,
    )
    assert run.returncode == 0, run.stderr
    assert "2/2" in run.stderr
    assert "Results are in" in run.stdout
    again = subprocess.run(
        [sys.executable, str(script), *argv],
        capture_output=True,
        text=True,
        cwd=tmp_path,
        env={"PYTHONPATH": str(script.parents[1]), "JAX_PLATFORMS": "cpu"},
        check=False,
    )
    assert again.returncode != 0
    assert again.stderr.splitlines()[-1].startswith("error: --output_dir")
    assert "Traceback" not in again.stderr
