"""Runs that are killed, stopped, or resumed from damaged checkpoints."""

import gc
import json
import os
import pathlib
import re
import resource
import shutil
import signal
import subprocess
import sys
import textwrap

import numpy as np
import pytest
import run_glue
import toy_bert
from bert_finetune.errors import Interrupted, UserError
from bert_finetune.glue.task import Classification
from bert_finetune.reporting.log import Log
from bert_finetune.training import checkpoints, steps
from safetensors.numpy import load_file

NUM_STEPS = 24  # Ten per epoch.
MFAC = ["--optim", "MFAC", "--optim_args", '{"lr": 1e-2, "num_grads": 8, "damp": 1e-4}']
# Orbax's threads raise on bad files and abandon tasks.
pytestmark = [
    pytest.mark.usefixtures("quick_compilation"),
    *(
        pytest.mark.filterwarnings(f"ignore::pytest.Pytest{kind}ExceptionWarning")
        for kind in ("UnhandledThread", "Unraisable")
    ),
]


@pytest.fixture(autouse=True)
def no_abandoned_tasks():
    yield
    gc.collect()


@pytest.fixture(scope="module")
def root(tmp_path_factory):
    root = tmp_path_factory.mktemp("root")
    toy_bert.write_model(root / "model")
    toy_bert.write_task(root / "glue", "sst2", num_train=40)
    return root


def command(root, output_dir, *flags):
    return [
        *("--model_name_or_path", str(root / "model"), "--task_name", "sst2"),
        *("--dataset_name", str(root / "glue"), "--output_dir", str(output_dir)),
        *("--max_seq_length", "16", "--per_device_train_batch_size", "4", *MFAC),
        *("--do_train", "--max_steps", str(NUM_STEPS), "--logging_steps", "3"),
        *("--save_strategy", "steps", "--save_steps", "7", "--num_devices", "1"),
        *flags,
    ]


@pytest.fixture(scope="module")
def unbroken(root):
    """Runs without interruption and keeps all checkpoints."""
    run_glue.main(command(root, root / "unbroken", "--save_total_limit", "9"))
    return root / "unbroken"


def started(unbroken, output_dir, *, until):
    """Creates the output directory of a run that ended after a checkpoint."""
    shutil.copytree(unbroken, output_dir)
    for step in steps_of(output_dir):
        if step > until:
            shutil.rmtree(output_dir / f"checkpoint-{step}")
    (output_dir / "model.safetensors").unlink()
    return output_dir


def steps_of(output_dir):
    steps = map(checkpoints.step_of, output_dir.iterdir())
    return sorted((step for step in steps if step is not None), reverse=True)


def lines_of(output_dir):
    lines = (output_dir / "metrics.jsonl").read_text().splitlines()
    return [json.loads(line) for line in lines]


def assert_same_model(output_dir, other):
    first, second = (load_file(d / "model.safetensors") for d in (output_dir, other))
    assert first.keys() == second.keys()
    for name, tensor in first.items():
        np.testing.assert_array_equal(tensor, second[name])


def test_a_checkpoint_is_a_model_directory(unbroken):
    assert steps_of(unbroken) == [24, 21, 14, 7]
    for name in ("config.json", "tokenizer.json", "loop", "state"):
        assert (unbroken / "checkpoint-24" / name).exists()
    assert_same_model(unbroken / "checkpoint-24", unbroken)


def test_killed_in_mid_epoch_and_resumed_to_the_bit(root, tmp_path, unbroken):
    """Uses SIGKILL in a separate process; the checkpoint holds the window."""
    argv = command(root, tmp_path)
    script = f"""
        import os, signal, sys
        import run_glue
        from bert_finetune.reporting.log import Log
        take_in = Log.step
        def step(self, step, metrics):
            take_in(self, step, metrics)
            if step == 17:
                os.kill(os.getpid(), signal.SIGKILL)
        Log.step = step
        run_glue.main({argv})
    """
    examples = pathlib.Path(run_glue.__file__).parent
    killed = subprocess.run(
        [sys.executable, "-c", textwrap.dedent(script)],
        env={
            **os.environ,
            "PYTHONPATH": f"{examples}{os.pathsep}{examples.parent}",
            "JAX_PLATFORMS": "cpu",
        },
        capture_output=True,
        check=False,
    )
    assert killed.returncode == -signal.SIGKILL, killed.stderr
    assert steps_of(tmp_path) == [14]  # --save_total_limit is 1.
    assert not (tmp_path / "model.safetensors").exists()
    # Lines after step 14 are written again; a truncated one is dropped.
    assert lines_of(tmp_path)[-1]["step"] == 15
    with open(tmp_path / "metrics.jsonl", "a") as file:
        file.write('{"step": 18, "lo')
    run_glue.main(argv)
    assert_same_model(tmp_path, unbroken)
    assert lines_of(tmp_path) == lines_of(unbroken)
    assert steps_of(tmp_path) == [24]


@pytest.mark.parametrize("flags", [[], ["path"]])
def test_ways_to_name_the_checkpoint_to_resume_from(
    root, tmp_path, unbroken, flags, capsys
):
    out, kept = tmp_path / "out", steps_of(unbroken)
    if flags == ["path"]:
        checkpoint = unbroken / "checkpoint-14"
        flags = [str(checkpoint)]
    else:
        checkpoint = started(unbroken, out, until=14) / "checkpoint-14"
        # As left by a kill between writing the state and the model.
        (checkpoint / "model.safetensors").unlink()
    flags = ["--resume_from_checkpoint", *flags, "--save_total_limit", "9"]
    run_glue.main(command(root, out, *flags))
    assert (checkpoint / "model.safetensors").exists()
    assert f"Resuming from {checkpoint}." in capsys.readouterr().out
    assert_same_model(out, unbroken)
    assert steps_of(unbroken) == kept


def test_a_finished_run_is_not_trained_again(root, tmp_path, unbroken):
    out = shutil.copytree(unbroken, tmp_path / "out")
    results = run_glue.main(command(root, out, "--do_eval"))
    assert results["eval_samples"] == 37
    assert_same_model(out, unbroken)
    assert lines_of(out)[:-1] == lines_of(unbroken)
    assert lines_of(out)[-1]["eval_loss"] == results["eval_loss"]
    before, after = (
        json.loads((directory / "train_results.json").read_text())
        for directory in (unbroken, out)
    )
    for name in ("train_loss", "damp", "num_raised", "epoch"):
        assert before[name] == after[name]


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_saves_and_reports_how_to_resume(
    root, tmp_path, unbroken, monkeypatch, number
):
    take_in = Log.step

    def step(self, step, metrics):
        take_in(self, step, metrics)
        if step == 5:
            os.kill(os.getpid(), number)

    handler = signal.getsignal(number)
    with monkeypatch.context() as patch:
        patch.setattr(Log, "step", step)
        with pytest.raises(
            Interrupted, match=r"step (\d+) of 24. Saved in .*checkpoint-\1."
        ) as caught:
            run_glue.main(command(root, tmp_path))
    assert caught.value.exit_code == 128 + number
    assert signal.getsignal(number) is handler
    run_glue.main(command(root, tmp_path))
    assert_same_model(tmp_path, unbroken)
    assert lines_of(tmp_path) == lines_of(unbroken)


def tear(path):
    """Truncates the largest file of the state."""
    files = [f for f in (path / "state").rglob("*") if f.is_file()]
    largest = max(files, key=lambda file: file.stat().st_size)
    os.truncate(largest, largest.stat().st_size // 2)


def garble(path):
    """Overwrites the files of the state, keeping their sizes."""
    for file in (path / "state").rglob("*"):
        if file.is_file():
            file.write_bytes(b"x" * file.stat().st_size)


def make_foreign(path):
    """Replaces the state by the file of another program."""
    shutil.rmtree(path / "state")
    shutil.rmtree(path / "loop")
    (path / "trainer_state.json").write_text('{"global_step": 14}')


@pytest.mark.parametrize("damage", [tear, garble, make_foreign])
def test_a_bad_checkpoint_is_named_and_skipped(
    root, tmp_path, unbroken, damage, capsys
):
    out = started(unbroken, tmp_path / "out", until=14)
    damage(out / "checkpoint-14")
    run_glue.main(command(root, out))
    captured = capsys.readouterr()
    assert re.search("checkpoint-14 cannot be read and is skipped: ", captured.err)
    assert f"Resuming from {out / 'checkpoint-7'}." in captured.out
    assert_same_model(out, unbroken)
    assert lines_of(out) == lines_of(unbroken)


def test_checkpoints_of_another_run_are_rejected_and_kept(root, tmp_path, unbroken):
    out = shutil.copytree(unbroken, tmp_path / "out")

    def contents():
        return {
            path: path.read_bytes()
            for path in out.rglob("*")
            if path.is_file() and path.name != ".lock"
        }

    before = contents()
    with pytest.raises(
        UserError, match="checkpoint-24 belongs to another run: --seed was"
    ):
        run_glue.main(command(root, out, "--seed", "1"))
    assert contents() == before
    checkpoint = started(unbroken, tmp_path / "other", until=7) / "checkpoint-7"
    with pytest.raises(UserError, match="is not empty"):
        run_glue.main(command(root, out, "--resume_from_checkpoint", str(checkpoint)))
    assert contents() == before
    # The error names a remedy and leaves no directory behind.
    flags = ["--resume_from_checkpoint", str(checkpoint), "--seed", "1"]
    with pytest.raises(
        UserError, match="give it as --model_name_or_path with another --out"
    ):
        run_glue.main(command(root, tmp_path / "new", *flags))
    assert not (tmp_path / "new").exists()
    (tmp_path / "new").mkdir()
    with pytest.raises(UserError, match="belongs to another run"):
        run_glue.main(command(root, tmp_path / "new", *flags))
    assert (tmp_path / "new").is_dir()
    with pytest.raises(UserError, match="there is no checkpoint in"):
        run_glue.main(
            command(root, tmp_path / "new", "--resume_from_checkpoint", "last")
        )
    with pytest.raises(UserError, match="nowhere is not a checkpoint"):
        run_glue.main(
            command(root, tmp_path / "new", "--resume_from_checkpoint", "nowhere")
        )


def test_overwriting_starts_over_and_leaves_no_old_checkpoint(root, tmp_path, unbroken):
    out = shutil.copytree(unbroken, tmp_path / "out")
    flags = ["--overwrite_output_dir", "--save_strategy", "no"]
    run_glue.main(command(root, out, *flags))
    assert steps_of(out) == []
    assert lines_of(out) == lines_of(unbroken)


def test_a_run_killed_before_its_first_checkpoint_starts_over(root, tmp_path, unbroken):
    out = started(unbroken, tmp_path / "out", until=0)
    run_glue.main(command(root, out))
    assert_same_model(out, unbroken)
    assert lines_of(out) == lines_of(unbroken)


def test_without_the_window_a_resumed_run_starts_with_an_empty_one(
    root, tmp_path, unbroken, capsys
):
    flags = ["--save_window", "false", "--save_total_limit", "9"]
    run_glue.main(command(root, tmp_path, *flags))
    out = capsys.readouterr().out
    assert "GB): a resumed run starts with an empty one" in out
    assert_same_model(tmp_path, unbroken)

    def nbytes(directory):
        state = directory / "checkpoint-24" / "state"
        return sum(file.stat().st_size for file in state.rglob("*") if file.is_file())

    assert nbytes(tmp_path) < nbytes(unbroken)
    for step in (21, 24):
        shutil.rmtree(tmp_path / f"checkpoint-{step}")
    run_glue.main(command(root, tmp_path))
    assert "The checkpoint holds no window: M-FAC starts with an empty one." in (
        capsys.readouterr().out
    )
    lines = {line["step"]: line["loss"] for line in lines_of(tmp_path)}
    expected = {line["step"]: line["loss"] for line in lines_of(unbroken)}
    assert lines.keys() == expected.keys()
    assert lines[12] == expected[12]
    assert lines[24] != expected[24]
    assert np.isfinite(lines[24])


def test_a_full_disk_loses_nothing(root, tmp_path, unbroken, monkeypatch, capsys):
    """If a checkpoint cannot be written, training continues; the last one is kept."""
    save = checkpoints.save

    def save_on_a_small_disk(manager, state, *args, **kwargs):
        unlimited = resource.getrlimit(resource.RLIMIT_FSIZE)
        if int(state.step) > 7:
            # The model fits, the window does not.
            resource.setrlimit(resource.RLIMIT_FSIZE, (40_000, unlimited[1]))
        try:
            return save(manager, state, *args, **kwargs)
        finally:
            resource.setrlimit(resource.RLIMIT_FSIZE, unlimited)

    with monkeypatch.context() as patch:
        patch.setattr(checkpoints, "save", save_on_a_small_disk)
        run_glue.main(command(root, tmp_path))
    warnings = capsys.readouterr().err
    for step in (14, 21, 24):
        assert f"checkpoint-{step} cannot be written: " in warnings
    assert "File too large" in warnings
    assert steps_of(tmp_path) == [7]
    assert_same_model(tmp_path, unbroken)
    run_glue.main(command(root, tmp_path))
    assert not list(tmp_path.glob("*tmp*"))
    assert_same_model(tmp_path, unbroken)


def test_divergence_keeps_the_last_good_checkpoint(root, tmp_path, monkeypatch):
    """Also if the loss is still finite but the parameters are not."""
    make_train_step = steps.make_train_step

    def make_diverging(*args, **kwargs):
        train_step = make_train_step(*args, **kwargs)

        def diverging(state, batch):
            state, metrics = train_step(state, batch)
            scale = np.where(state.step == 14, np.nan, 1).astype(np.float32)
            params = {**state.params}
            params["classifier"] = {
                name: scale * leaf for name, leaf in params["classifier"].items()
            }
            return state._replace(params=params), metrics

        return diverging

    monkeypatch.setattr(steps, "make_train_step", make_diverging)
    monkeypatch.setattr(steps, "compile_ahead", lambda step, *_: step)
    with pytest.raises(
        UserError,
        match=r"not finite after step 14: .*checkpoint-7 is the last good checkpoint",
    ):
        run_glue.main(command(root, tmp_path))
    assert steps_of(tmp_path) == [7]
    with pytest.raises(UserError, match=r"the loss is nan at step 15: .* diverged"):
        run_glue.main(command(root, tmp_path / "no", "--save_strategy", "no"))


def test_two_runs_in_one_directory(root, tmp_path, monkeypatch):
    errors = []
    take_in = Log.step

    def step(self, step, metrics):
        take_in(self, step, metrics)
        if step == 5:
            with pytest.raises(UserError, match="another run is using") as caught:
                run_glue.main(command(root, tmp_path))
            errors.append(caught.value)

    monkeypatch.setattr(Log, "step", step)
    run_glue.main(command(root, tmp_path))
    assert len(errors) == 1


@pytest.mark.parametrize(
    ("metric", "save_steps", "values", "best"),
    [
        # The evaluations after steps 7 and 21 have no checkpoint.
        ("loss", 14, [0.0, 2.0, 1.0, 3.0], 14),
        ("accuracy", 7, [0.1, 0.9, 0.2, 0.2], 14),
        ("accuracy", 7, [np.nan] * 4, None),
    ],
)
def test_the_best_checkpoint_is_kept_and_loaded(
    root, tmp_path, monkeypatch, metric, save_steps, values, best
):
    coming, evaluate = iter([*values, 0.0]), Classification.evaluate
    monkeypatch.setattr(
        Classification,
        "evaluate",
        # A non-finite value of another metric changes nothing.
        lambda *args: (
            evaluate(*args) | {"eval_other": np.nan, f"eval_{metric}": next(coming)}
        ),
    )
    flags = ["--do_eval", "--eval_strategy", "steps", "--eval_steps", "7"]
    flags += ["--load_best_model_at_end", "--metric_for_best_model", metric]
    run_glue.main(command(root, tmp_path, *flags, "--save_steps", str(save_steps)))
    evaluations = [line for line in lines_of(tmp_path) if "eval_loss" in line]
    assert [line["step"] for line in evaluations] == [7, 14, 21, 24]
    assert steps_of(tmp_path) == ([24] if best is None else [24, best])
    assert_same_model(tmp_path, tmp_path / f"checkpoint-{best or 24}")


def test_resuming_from_an_earlier_checkpoint_removes_later_ones(
    root, tmp_path, unbroken
):
    out = shutil.copytree(unbroken, tmp_path / "out")
    argv = command(root, out, "--resume_from_checkpoint", str(out / "checkpoint-7"))
    run_glue.main([*argv, "--save_total_limit", "2"])
    assert steps_of(out) == [24, 21]
    assert_same_model(out, unbroken)
    assert lines_of(out) == lines_of(unbroken)
