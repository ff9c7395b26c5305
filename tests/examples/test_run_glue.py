"""Runs the GLUE script as a user would, on small generated data."""

import json
import os
import pathlib
import subprocess
import sys

import jax
import numpy as np
import pytest
import run_glue
import toy_bert
from bert_finetune.errors import UserError
from bert_finetune.glue import tasks
from bert_finetune.model import pretrained
from bert_finetune.training import loop, memory
from safetensors.numpy import load_file
from scipy import stats
from sklearn.metrics import accuracy_score, f1_score, matthews_corrcoef

pytestmark = pytest.mark.usefixtures("quick_compilation")

MFAC = [
    *("--optim", "MFAC"),
    *("--optim_args", '{"lr": 1e-2, "num_grads": 64, "damp": 1e-4}'),
]
ADAMW = ["--optim", "adamw", "--learning_rate", "1e-2"]


@pytest.fixture(scope="module")
def root(tmp_path_factory):
    """Writes a model directory like the Hub's, and the nine tasks."""
    root = tmp_path_factory.mktemp("root")
    toy_bert.write_model(root / "model", as_torch=True)
    weights = toy_bert.tensors()
    encoder = {k: v for k, v in weights.items() if not k.startswith("classifier")}
    toy_bert.write_model(root / "encoder", encoder)
    for task in tasks.TASKS:
        toy_bert.write_task(root / "glue", task)
    return root


def command(root, output_dir, task="sst2", *flags):
    return [
        *("--model_name_or_path", str(root / "model"), "--task_name", task),
        *("--dataset_name", str(root / "glue"), "--output_dir", str(output_dir)),
        *("--max_seq_length", "20", "--per_device_train_batch_size", "16"),
        *("--num_devices", "1", *flags),
    ]


def read_json(path):
    return json.loads(path.read_text())


def read_lines(path):
    return [json.loads(line) for line in path.read_text().splitlines()]


# GLUE's metrics, computed from labels and predictions.
EXPECTED_METRICS = {
    "matthews_correlation": matthews_corrcoef,
    "accuracy": accuracy_score,
    "f1": f1_score,
    "pearson": lambda a, b: stats.pearsonr(a, b).statistic,
    "spearmanr": lambda a, b: stats.spearmanr(a, b).statistic,
}
OF_TASK = {
    "cola": ["matthews_correlation"],
    "mrpc": ["accuracy", "f1"],
    "qqp": ["accuracy", "f1"],
    "stsb": ["pearson", "spearmanr"],
}


@pytest.mark.parametrize("task", tasks.TASKS)
def test_every_task_end_to_end(root, tmp_path, task):
    """Predictions for the validation split must have the metrics of its evaluation."""
    splits = {
        "": "validation_matched" if task == "mnli" else "validation",
        **({"_mm": "validation_mismatched"} if task == "mnli" else {}),
    }
    paths = {
        ending: root / "glue" / task / f"{split}-00000-of-00001.parquet"
        for ending, split in splits.items()
    }
    flags = [*ADAMW, "--do_train", "--do_eval", "--do_predict", "--max_steps", "60"]
    if task != "mnli":  # MNLI also writes files for its two test splits.
        flags += ["--test_file", str(paths[""])]
    argv = command(root, tmp_path / "out", task, *flags)
    argv[1] = str(root / "encoder")
    results = run_glue.main(argv)
    predictions_in = tmp_path / "out"
    if task == "mnli":
        predictions_in = tmp_path / "again"
        argv = command(root, predictions_in, task, "--do_predict")
        argv[1] = str(tmp_path / "out")
        run_glue.main([*argv, "--test_file", str(paths[""])])
    [file, *_] = tasks.TASKS[task].test_splits.values()
    header, *rows = (predictions_in / file).read_text().splitlines()
    assert header == "index\tprediction"
    assert [row.split("\t")[0] for row in rows] == [str(i) for i in range(37)]
    predictions = [row.split("\t")[1] for row in rows]
    if task in ("mnli", "qnli", "rte"):
        assert set(predictions) <= set(tasks.TASKS[task].label_names)
        predictions = [tasks.TASKS[task].label_names.index(p) for p in predictions]
    predictions = np.array(predictions, float if task == "stsb" else int)
    labels = pretrained_labels(paths[""])
    for name in OF_TASK.get(task, ["accuracy"]):
        expected = EXPECTED_METRICS[name](labels, predictions)
        assert results[f"eval_{name}"] == pytest.approx(expected, abs=2e-3)
        assert results[f"eval_{name}"] > 0.5  # It learns; chance is 0, 1/3 or 1/2.
    assert results["eval_samples"] == 37  # Not a multiple of the batch size.
    if task == "mnli":
        assert results["eval_accuracy_mm"] > 0.5
    if task == "stsb":
        assert np.all((predictions >= 0) & (predictions <= 5))
    for file in tasks.TASKS[task].test_splits.values():
        assert len((tmp_path / "out" / file).read_text().splitlines()) == 38
    names = pretrained.read_config(tmp_path / "out").id2label
    assert list(names.values()) == list(tasks.TASKS[task].label_names)


def pretrained_labels(path):
    import pyarrow.parquet

    return pyarrow.parquet.read_table(path).column("label").to_numpy()


def test_trains_evaluates_and_reports(root, tmp_path):
    flags = [*MFAC, "--do_train", "--do_eval", "--num_train_epochs", "3"]
    flags += ["--eval_strategy", "epoch", "--report_to", "tensorboard"]
    argv = command(root, tmp_path, "qqp", *flags, "--logging_steps", "25")
    results = run_glue.main(argv)
    written = read_json(tmp_path / "eval_results.json")
    assert written == results
    keys = {"eval_loss", "eval_accuracy", "eval_f1", "eval_combined_score"}
    assert keys | {"eval_samples", "epoch"} <= written.keys()
    assert written["eval_accuracy"] > 0.9
    train_results = read_json(tmp_path / "train_results.json")
    assert train_results["train_samples"] == 320
    assert train_results["epoch"] == written["epoch"] == 3
    assert read_json(tmp_path / "all_results.json") == train_results | written
    lines = read_lines(tmp_path / "metrics.jsonl")
    training = [line for line in lines if "loss" in line]
    assert [line["step"] for line in training] == [1, 25, 50, 60]
    assert {"accuracy", "learning_rate", "epoch", "damp"} <= training[-1].keys()
    assert training[-1]["loss"] < training[0]["loss"]
    evaluations = [line for line in lines if "eval_loss" in line]
    assert [line["step"] for line in evaluations] == [20, 40, 60]
    assert evaluations[-1]["eval_loss"] == written["eval_loss"]
    for name in ("config.json", "model.safetensors", "tokenizer.json", "curves.png"):
        assert (tmp_path / name).exists()
    card = (tmp_path / "README.md").read_text()
    assert f"--output_dir {tmp_path}" in card
    assert "num_grads = 64" in card
    assert list((tmp_path / "runs").iterdir())
    # The saved model evaluates to the same results.
    argv = command(root, tmp_path, "qqp", "--do_eval")
    argv[1] = str(tmp_path)
    again = run_glue.main(argv)
    for name in keys:
        assert again[name] == written[name]
    assert read_json(tmp_path / "all_results.json")["train_samples"] == 320


@pytest.mark.parametrize(
    "flags",
    [
        ["--optim", "lion", "--bf16", "--lr_scheduler_type", "cosine"],
        ["--optim", "contrib.muon", "--gradient_accumulation_steps", "2"],
        ["--optim", "sgd", "--optim_args", '{"momentum": 0.9}', "--warmup_steps", "3"],
    ],
)
def test_optimizers_of_optax(root, tmp_path, flags):
    flags = [*flags, "--do_train", "--max_steps", "8", "--learning_rate", "1e-3"]
    run_glue.main(command(root, tmp_path, "sst2", *flags, "--logging_steps", "1"))
    losses = [line["loss"] for line in read_lines(tmp_path / "metrics.jsonl")]
    assert len(losses) == 8
    assert np.all(np.isfinite(losses))
    assert not np.array_equal(
        load_file(tmp_path / "model.safetensors")["classifier.weight"],
        toy_bert.tensors()["classifier.weight"],
    )


def test_custom_files(root, tmp_path):
    texts = ["good film", "bad day", "blue cat", "good dog", "bad cat", "blue day"]
    labels = ["fine", "poor", "odd"] * 2
    rows = [f"{text},{label}\n" for text, label in zip(texts, labels, strict=True)]
    path = tmp_path / "reviews.csv"
    path.write_text("text,label\n" + "".join(rows * 20))
    argv = command(root, tmp_path / "out", "sst2", *ADAMW, "--do_train", "--do_eval")
    argv[1] = str(root / "encoder")
    argv[2:6] = ["--train_file", str(path), "--validation_file", str(path)]
    results = run_glue.main([*argv, "--num_train_epochs", "8"])
    assert results["eval_accuracy"] > 0.9
    config = read_json(tmp_path / "out" / "config.json")
    assert config["id2label"] == {"0": "fine", "1": "odd", "2": "poor"}
    argv = command(root, tmp_path / "again", "sst2", "--do_eval", "--do_predict")
    argv[1] = str(tmp_path / "out")
    argv[2:6] = ["--validation_file", str(path), "--test_file", str(path)]
    assert run_glue.main(argv)["eval_accuracy"] == results["eval_accuracy"]
    lines = (tmp_path / "again" / "predictions.tsv").read_text().splitlines()
    assert lines[1] == "0\tfine"


def test_a_model_keeps_its_own_order_of_labels(root, tmp_path):
    """A model with both its labels and its head swapped is the same model."""
    results = {}
    for name, order in {
        "same": ["not_entailment", "entailment"],
        "swapped": ["entailment", "not_entailment"],
    }.items():
        weights = toy_bert.tensors()
        if name == "swapped":
            for part in ("weight", "bias"):
                weights[f"classifier.{part}"] = weights[f"classifier.{part}"][::-1]
        weights = {k: np.ascontiguousarray(v) for k, v in weights.items()}
        model = toy_bert.write_model(
            tmp_path / name, weights, id2label=dict(enumerate(order))
        )
        argv = command(root, tmp_path / f"{name}_out", "wnli", "--do_eval")
        argv[1] = str(model)
        results[name] = run_glue.main(argv)
    assert results["swapped"]["eval_loss"] == pytest.approx(
        results["same"]["eval_loss"], rel=1e-6
    )
    assert results["swapped"]["eval_accuracy"] == results["same"]["eval_accuracy"]


def test_a_run_can_be_repeated_to_the_bit(root, tmp_path):
    flags = [*MFAC, "--do_train", "--max_steps", "60", "--logging_steps", "1"]
    for name, seed in {"first": "1", "again": "1", "other": "2"}.items():
        run_glue.main(command(root, tmp_path / name, "qqp", *flags, "--seed", seed))
    first, again, other = (
        load_file(tmp_path / name / "model.safetensors")
        for name in ("first", "again", "other")
    )
    assert all(np.array_equal(first[name], again[name]) for name in first)
    assert not all(np.array_equal(first[name], other[name]) for name in first)
    lines = (tmp_path / "first" / "metrics.jsonl").read_text().splitlines()
    assert len(lines) == 60
    assert lines == (tmp_path / "again" / "metrics.jsonl").read_text().splitlines()


def test_short_padding_changes_no_loss(root, tmp_path, monkeypatch):
    """Padding changes neither the batches nor their order."""
    monkeypatch.setattr("bert_finetune.data.batches._LENGTHS", (12,))
    model = toy_bert.write_model(
        tmp_path / "model", hidden_dropout_prob=0.0, attention_probs_dropout_prob=0.0
    )
    losses = {}
    for name, flags in {"short": [], "fixed": ["--pad_to_max_length"]}.items():
        flags = [*ADAMW, *flags, "--do_train", "--max_steps", "30"]
        argv = command(root, tmp_path / name, "sst2", *flags, "--logging_steps", "1")
        argv[1] = str(model)
        run_glue.main([*argv, "--per_device_train_batch_size", "2"])
        lines = read_lines(tmp_path / name / "metrics.jsonl")
        losses[name] = [line["loss"] for line in lines]
    np.testing.assert_allclose(losses["short"], losses["fixed"], rtol=0, atol=1e-5)


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
    results = read_json(tmp_path / "row_sparse" / "train_results.json")
    assert results["num_dropped"] == 0
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
    assert train_results["epoch"] == 1.5  # 3 steps at 2 per epoch.


def test_a_learning_rate_of_zero_changes_nothing(root, tmp_path):
    flags = [*ADAMW[:2], "--learning_rate", "0", "--do_train", "--max_steps", "2"]
    run_glue.main(command(root, tmp_path, "sst2", *flags))
    for name, array in load_file(tmp_path / "model.safetensors").items():
        np.testing.assert_array_equal(array, toy_bert.tensors()[name])


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--task_name", "ax"], "--task_name must be one of cola, sst2, .*, got 'ax'"),
        (["--optim", "sgdd"], "--optim must be MFAC, adam_mfac, adamw or"),
        (["--optim", "lbfgs", "--optim_args", "{}"], "more than gradients"),
        (["--metric_for_best_model", "f1"], "must be one of loss, accuracy, got 'f1'"),
        (["--optim_args", '{"num_grads": 0}'], "num_grads .* an integer of at least 1"),
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
    with pytest.raises(UserError, match=r"data has no sst2/validation-\*\.parquet"):
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
    argv = command(root, tmp_path, "sst2", *ADAMW, "--do_train", "--max_steps", "3")
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


def test_a_window_too_large_is_rejected_before_anything_is_written(
    root, tmp_path, monkeypatch
):
    monkeypatch.setattr(memory, "available_memory", lambda: 10**6)
    flags = ["--optim", "MFAC", "--optim_args", '{"num_grads": 1024}', "--do_train"]
    with pytest.raises(UserError, match="lower num_grads"):
        run_glue.main(command(root, tmp_path / "out", "sst2", *flags))
    assert not (tmp_path / "out").exists()


def test_running_out_of_device_memory_is_a_one_line_error(root, tmp_path, monkeypatch):
    def train(*args):
        raise jax.errors.JaxRuntimeError("RESOURCE_EXHAUSTED: 9 GB")

    monkeypatch.setattr(loop, "train", train)
    with pytest.raises(UserError, match="out of memory"):
        run_glue.main(command(root, tmp_path, "sst2", *ADAMW, "--do_train"))


def test_as_a_script(root, tmp_path):
    """Checks the exit code, and that errors are one line instead of a traceback."""
    script = pathlib.Path(run_glue.__file__)
    argv = command(root, tmp_path / "out", "sst2", *MFAC, "--do_train", "--max_steps=2")

    def run(*flags):
        return subprocess.run(
            [sys.executable, str(script), *argv, *flags],
            capture_output=True,
            text=True,
            cwd=tmp_path,
            env={
                **os.environ,
                "PYTHONPATH": str(script.parents[1]),
                "JAX_PLATFORMS": "cpu",
                "JAX_NUM_CPU_DEVICES": "1",
            },
            check=False,
        )

    first = run()
    assert first.returncode == 0, first.stderr
    # Not a terminal: plain lines.
    assert "step 2/2: " in first.stderr
    assert "\r" not in first.stderr
    assert "Results are in" in first.stdout
    rejected = run("--max_seq_length", "2")
    assert rejected.returncode == 1
    assert rejected.stderr == "error: --max_seq_length must be at least 3, got 2.\n"
