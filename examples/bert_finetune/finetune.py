"""Task-independent driver: train, evaluate, predict, report."""

import contextlib
import json
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import jax

from bert_finetune.arguments import Arguments
from bert_finetune.errors import UserError, first_line
from bert_finetune.files import read_json_lines, write_json
from bert_finetune.reporting.log import METRICS_FILE
from bert_finetune.reporting.model_card import write_model_card
from bert_finetune.reporting.plots import plot_curves
from bert_finetune.training import devices, loop, optimizers, output_dir
from bert_finetune.training.task import Task


def finetune(
    args: Arguments, load_task: Callable[[Any], Task], command: str
) -> dict[str, float]:
    """Trains, evaluates and predicts as flagged; returns the evaluation results.

    ``command`` is the command line, for the model card.
    """
    # Validates before anything slow.
    hyperparams = optimizers.parse_hyperparams(args) if args.do_train else {}
    devices.join(args)
    mesh = devices.make_mesh(args.num_devices)
    optimizers.check_num_grads(hyperparams, mesh.size)
    with devices.one_console(), _explained():
        task = load_task(args)
        with jax.set_mesh(mesh):
            return _finetune(task, hyperparams, command)


def _finetune(
    task: Task, hyperparams: dict[str, Any], command: str
) -> dict[str, float]:
    args = task.args
    run = loop.prepare(task, hyperparams) if args.do_train else None
    with output_dir.locked(args) as directory:
        for note in task.model.notes:
            print(note)
        train_results, results = {}, {}
        if run is not None:
            params, train_results, results = loop.train(run, directory)
        else:
            params = devices.put(task.model.params)
            if args.do_eval:
                results = task.evaluate(params)
        for kind, values in {"train": train_results, "eval": results}.items():
            if values:
                write_json(directory / f"{kind}_results.json", values)
            for name, value in values.items():
                print(f"{name:28} {value:.4f}")
        if args.do_predict:
            task.predict(params)
        if run is not None and jax.process_index() == 0:
            _write_reports(run, command, directory, results)
        # Written last: it marks the run as finished.
        path = directory / "all_results.json"
        earlier = json.loads(path.read_text()) if path.exists() else {}
        write_json(path, {**earlier, **train_results, **results})
        print(f"Results are in {directory}.")
    return results


@contextlib.contextmanager
def _explained() -> Iterator[None]:
    """Turns an out-of-memory error or a lost process into a user error."""
    try:
        yield
    except jax.errors.JaxRuntimeError as error:
        if "RESOURCE_EXHAUSTED" not in str(error):
            if jax.process_count() == 1:
                raise
            raise UserError(
                f"process {jax.process_index()} lost another process, whose output "
                f"shows why ({first_line(error)}). Once all have ended, rerun the same "
                "command to resume from the last checkpoint."
            ) from error
        raise UserError(
            "the device is out of memory: lower --per_device_train_batch_size and "
            "raise --gradient_accumulation_steps for the same total batch size; for "
            "MFAC and adam_mfac also lower num_grads in --optim_args."
        ) from error


def _write_reports(
    run: loop.Run, command: str, directory: Path, results: Mapping[str, float]
) -> None:
    name, hyperparams = run.optimizer.name, run.optimizer.hyperparams
    described, lines = run.task.describe(), read_json_lines(directory / METRICS_FILE)
    title = f"{described.title}, {name}"
    plot_curves(directory / "curves.png", title, {name: lines}, described.metrics)
    card = directory / "README.md"
    write_model_card(
        card, run.task.args, described, hyperparams, results, lines, command
    )
