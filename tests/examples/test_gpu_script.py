"""Runs the GPU benchmark scripts in tiny shapes."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import toy_bert

BENCHMARKS = Path(__file__).parents[2] / "benchmarks"
MEASURED = "tests step_time train_throughput traces kernels solve_time".split()


def run(script, *arguments):
    return subprocess.run(
        [BENCHMARKS / script, *map(str, arguments)],
        env=os.environ | {"PYTHON": sys.executable, "SMALL": "1"},
        capture_output=True,
        text=True,
    )


@pytest.fixture(scope="module")
def inputs(tmp_path_factory):
    root = tmp_path_factory.mktemp("inputs")
    model = toy_bert.write_model(root / "model", max_position_embeddings=128)
    return model, toy_bert.write_task(root / "data", "qqp", num_train=64)


@pytest.mark.usefixtures("quick_compilation")
def test_every_measurement_runs_and_none_twice(tmp_path, inputs):
    first = run("gpu.sh", tmp_path, *inputs)
    assert first.returncode == 0, first.stdout + first.stderr
    assert not list(tmp_path.glob("*.unfinished.log"))
    lines = (tmp_path / "step_time.jsonl").read_text().splitlines()
    assert len(lines) == 6
    assert all(json.loads(line)["copy_gb_per_s"] > 0 for line in lines)
    assert (tmp_path / "kernels.log").read_text().count(" launches, ") == 6
    again = run("gpu.sh", tmp_path, *inputs)
    assert again.returncode == 0, again.stderr
    done = [line for line in again.stdout.splitlines() if "done before" in line]
    for name in MEASURED:
        assert f"{name}: done before." in done


@pytest.mark.usefixtures("quick_compilation")
def test_the_published_experiment_keeps_results_not_models(tmp_path, inputs):
    done = run("qqp.sh", tmp_path, *inputs, 1, 1)
    assert done.returncode == 0, done.stdout + done.stderr
    assert not list(tmp_path.glob("*/*/model.safetensors"))
    again = run("qqp.sh", tmp_path, *inputs, 1, 1)
    assert again.stdout.count("is finished in") == 2
