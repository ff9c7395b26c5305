"""Compares runs on several devices or processes with runs on one device."""

import json
import os
import pathlib
import shutil
import signal
import socket
import subprocess
import sys
import textwrap

import jax
import numpy as np
import pytest
import run_glue
import toy_bert
from bert_finetune.arguments import GlueArguments, parse_arguments
from bert_finetune.errors import UserError
from bert_finetune.glue.task import Classification
from bert_finetune.training import (
    checkpoints,
    devices,
    loop,
    memory,
    optimizers,
    steps,
)
from safetensors.numpy import load_file

import mfac_jax

pytestmark = [
    pytest.mark.usefixtures("quick_compilation"),
    pytest.mark.eight_devices,
]

MICRO = pathlib.Path(__file__).parents[1] / "reference" / "bert_micro"
ADAMW = ["--optim", "adamw", "--learning_rate", "1e-2"]
ACCUMULATED = ["--gradient_accumulation_steps", "2"]


def command(root, output_dir, num_devices, batch_size, *flags):
    """Returns the flags of a run whose batch is split over these devices."""
    return [
        *("--model_name_or_path", str(root / "model"), "--task_name", "sst2"),
        *("--dataset_name", str(root / "glue"), "--output_dir", str(output_dir)),
        *("--max_seq_length", "24", "--pad_to_max_length", "--do_train"),
        *("--logging_steps", "1", "--save_strategy", "steps"),
        *("--save_total_limit", "9", "--num_devices", str(num_devices)),
        *("--per_device_train_batch_size", str(batch_size // num_devices), *flags),
    ]


def losses_of(output_dir):
    lines = map(json.loads, (output_dir / "metrics.jsonl").read_text().splitlines())
    return {line["step"]: line["loss"] for line in lines if "loss" in line}


def assert_same_losses(output_dir, other, num_steps):
    found, expected = losses_of(output_dir), losses_of(other)
    assert [*found] == [*expected] == [*range(1, num_steps + 1)]
    np.testing.assert_allclose(
        [*found.values()], [*expected.values()], rtol=0, atol=1e-5
    )


def cut_off(output_dir, step):
    """Removes what a run killed after this checkpoint would not have written."""
    for path in output_dir.iterdir():
        if (checkpoints.step_of(path) or 0) > step or path.name == "model.safetensors":
            shutil.rmtree(path) if path.is_dir() else path.unlink()


@pytest.fixture(scope="module")
def toy(tmp_path_factory):
    root = tmp_path_factory.mktemp("toy")
    toy_bert.write_model(root / "model")
    toy_bert.write_task(root / "glue", "sst2", num_train=40)
    return root


MFAC = ["--optim", "MFAC", "--optim_args", '{"lr": 1e-2, "num_grads": 8}']


@pytest.mark.parametrize(
    ("flags", "resumed_on"),
    [
        ([*ADAMW, *ACCUMULATED, "--do_eval"], {}),
        # Resumes step 2 on two devices, then step 4 on eight again.
        (MFAC, {2: 2, 4: 8}),
    ],
    ids=["adamw", "MFAC"],
)
def test_eight_devices_train_evaluate_and_resume_as_one(
    toy, tmp_path, flags, resumed_on
):
    flags = ["--max_steps", "6", "--save_steps", "2", *flags]
    flags += ["--per_device_eval_batch_size", "2"]

    def run(num_devices, name, batch_size=16):
        argv = command(toy, tmp_path / name, num_devices, batch_size, *flags)
        return run_glue.main(argv)

    expected, found = run(1, "one"), run(8, "eight")
    assert found.keys() == expected.keys()
    for name in found.keys() & {"eval_loss", "eval_accuracy", "eval_samples"}:
        assert found[name] == pytest.approx(expected[name], abs=1e-5)
    for step, num_devices in resumed_on.items():
        cut_off(tmp_path / "eight", step)
        run(num_devices, "eight")
    assert_same_losses(tmp_path / "eight", tmp_path / "one", 6)
    with pytest.raises(UserError, match="the batch size of all devices was"):
        run(8, "eight", batch_size=32)


def test_no_device_holds_the_whole_window(toy):
    argv = command(toy, "out", 8, 16, *MFAC)
    args = parse_arguments(GlueArguments, argv)
    with jax.set_mesh(devices.make_mesh(8)):
        run = loop.prepare(Classification(args), optimizers.parse_hyperparams(args))
        optimizer, params = run.optimizer.transformation, run.task.model.params
        state = steps.init_state(params, optimizer, seed=0)
    whole = mfac_jax.window_nbytes(state)
    assert mfac_jax.window_nbytes(memory.on_device(state)) == whole / 8
    first = [x.addressable_shards[0].data for x in jax.tree.leaves(state.opt_state)]
    assert memory.nbytes(first) == memory.nbytes(memory.on_device(state.opt_state))


@pytest.fixture(scope="module")
def micro(tmp_path_factory):
    """Writes the recorded BERT with dropout, and sentences for it."""
    root = tmp_path_factory.mktemp("micro")
    shutil.copytree(MICRO, root / "model")
    config = json.loads((MICRO / "config.json").read_text())
    config |= dict.fromkeys(
        ("hidden_dropout_prob", "attention_probs_dropout_prob"), 0.1
    )
    (root / "model" / "config.json").write_text(json.dumps(config))
    special = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]"]
    words = [f"w{i}" for i in range(config["vocab_size"] - len(special))]
    (root / "model" / "vocab.txt").write_text("\n".join([*special, *words]) + "\n")
    rng = np.random.default_rng(0)
    columns = {
        "sentence": [" ".join(rng.choice(words, 12)) for _ in range(64)],
        "label": rng.integers(0, 2, 64).tolist(),
    }
    file = root / "glue" / "sst2" / "train-00000-of-00001.parquet"
    toy_bert.write_parquet(file, columns)
    return root


MICRO_FLAGS = [
    "--optim",
    "MFAC",
    "--optim_args",
    '{"num_grads": 16}',
    "--max_steps",
    "30",
    "--save_steps",
    "10",
]


@pytest.fixture(scope="module")
def micro_alone(micro):
    run_glue.main(command(micro, micro / "alone", 1, 16, *MICRO_FLAGS))
    return micro / "alone"


def start_processes(argv, victim=None):
    """Starts two processes of four devices; the victim kills itself at step 14."""
    script = f"""
        import os, signal, sys
        import run_glue
        from bert_finetune import cli
        from bert_finetune.reporting.log import Log
        take_in = Log.step
        def step(self, step, metrics):
            take_in(self, step, metrics)
            if step == 14 and {victim} == int(sys.argv[-1]):
                os.kill(os.getpid(), signal.SIGKILL)
        Log.step = step
        cli.run_script(run_glue.main, "")
    """
    examples = pathlib.Path(run_glue.__file__).parent
    with socket.create_server(("127.0.0.1", 0)) as server:
        address = f"127.0.0.1:{server.getsockname()[1]}"
    argv = [*argv, "--coordinator_address", address, "--num_processes", "2"]
    argv += ["--heartbeat_timeout_seconds", "10", "--process_id"]
    return [
        subprocess.Popen(
            [sys.executable, "-c", textwrap.dedent(script), *argv, str(number)],
            env={
                **os.environ,
                "PYTHONPATH": f"{examples}{os.pathsep}{examples.parent}",
                "JAX_PLATFORMS": "cpu",
                "JAX_NUM_CPU_DEVICES": "4",
            },
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )
        for number in range(2)
    ]


def outputs_of(processes):
    """Waits for all processes to end; returns their outputs."""
    try:
        return [process.communicate(timeout=300)[0] for process in processes]
    finally:
        for process in processes:
            process.kill()


def assert_close_models(output_dir, other):
    found, expected = (load_file(d / "model.safetensors") for d in (output_dir, other))
    flat = [np.concatenate([t.ravel() for t in x.values()]) for x in (found, expected)]
    error = np.linalg.norm(flat[0] - flat[1])
    assert error <= 1e-4 * np.linalg.norm(flat[1])


def test_two_processes_train_as_one(micro, micro_alone, tmp_path):
    processes = start_processes(command(micro, tmp_path, 4, 8, *MICRO_FLAGS))
    outputs = outputs_of(processes)
    assert [process.returncode for process in processes] == [0, 0], outputs
    assert ["step 30/30" in output for output in outputs] == [True, False]
    assert_same_losses(tmp_path, micro_alone, 30)
    assert_close_models(tmp_path, micro_alone)


@pytest.mark.parametrize("victim", [0, pytest.param(1, marks=pytest.mark.slow)])
def test_when_a_process_dies_the_other_ends(micro, micro_alone, tmp_path, victim):
    """One process on one device resumes the run."""
    processes = start_processes(command(micro, tmp_path, 4, 8, *MICRO_FLAGS), victim)
    outputs = outputs_of(processes)
    assert processes[victim].returncode == -signal.SIGKILL, outputs
    assert processes[1 - victim].returncode not in (0, -signal.SIGKILL)
    output = outputs[1 - victim]
    assert "rerun the same command to resume from the last checkpoint" in output
    assert "another task died" in output
    assert [path.name for path in tmp_path.glob("checkpoint-*")] == ["checkpoint-10"]
    run_glue.main(command(micro, tmp_path, 1, 16, *MICRO_FLAGS))
    assert_same_losses(tmp_path, micro_alone, 30)
    assert_close_models(tmp_path, micro_alone)


def test_devices_that_do_not_fit_are_named(toy, tmp_path):
    with pytest.raises(UserError, match=r"--num_devices must be at most 8, .* got 16"):
        run_glue.main(command(toy, tmp_path, 16, 16))
    flags = ["--optim", "MFAC", "--optim_args", '{"num_grads": 12}']
    with pytest.raises(UserError, match=r"must be a multiple of 8, .* got 12: give 16"):
        run_glue.main(command(toy, tmp_path, 8, 16, *flags))
