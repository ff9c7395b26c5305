"""The training loop: steps, evaluations, checkpoints, interruptions."""

import contextlib
import functools
import hashlib
import itertools
import math
import signal
import sys
import time
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import jax
import orbax.checkpoint as ocp
from jax.experimental import multihost_utils

from bert_finetune.arguments import Arguments
from bert_finetune.data import batches
from bert_finetune.errors import Interrupted, UserError, first_line
from bert_finetune.model import bert, pretrained
from bert_finetune.reporting.log import Log
from bert_finetune.training import (
    checkpoints,
    devices,
    memory,
    optimizers,
    output_dir,
    signals,
    steps,
)
from bert_finetune.training.task import Task, padded_lengths

# First batches whose padded lengths are compiled ahead and whose tokens are counted.
_FIRST_BATCHES = 256


class Run(NamedTuple):
    """A training run before its first step."""

    task: Task
    train_data: batches.TrainData
    first_batches: list[dict[str, Any]]
    optimizer: optimizers.Optimizer


def prepare(task: Task, hyperparams: dict[str, Any]) -> Run:
    """Tokenizes the training data and builds the optimizer."""
    args = task.args
    features = task.train_features()
    batch_size = args.per_device_train_batch_size * devices.count()
    batch_size *= args.gradient_accumulation_steps
    num_steps = args.max_steps
    if num_steps < 0:
        steps_per_epoch = math.ceil(features.num_examples / batch_size)
        num_steps = math.ceil(args.num_train_epochs * steps_per_epoch)
    lengths, params = padded_lengths(args), task.model.params
    train_data = batches.TrainData(features, batch_size, num_steps, lengths, args.seed)
    first = list(itertools.islice(batches.train_batches(train_data), _FIRST_BATCHES))
    max_tokens = batches.max_distinct_tokens(train_data, first)
    rows = bert.touched_rows(max_tokens, train_data.max_length)
    optimizer = optimizers.make_optimizer(args, hyperparams, num_steps, rows, params)
    memory.check_memory(optimizer, params)
    return Run(task, train_data, first, optimizer)


def train(
    run: Run, directory: Path
) -> tuple[bert.Params, dict[str, float], dict[str, float]]:
    """Trains, from the start or from a checkpoint, and saves the model.

    Returns:
      The last parameters, or the best; the training results; the evaluation results,
      empty without an evaluation.

    Raises:
      Interrupted: after SIGINT or SIGTERM; a checkpoint has been written.
      UserError: if training diverges, or if the run cannot resume from a checkpoint.
    """
    args, num_steps = run.task.args, run.train_data.num_steps
    init_state = functools.partial(
        steps.init_state, run.task.model.params, run.optimizer.transformation, args.seed
    )
    best = None
    if args.load_best_model_at_end:
        best = f"eval_{args.metric_for_best_model.removeprefix('eval_')}"
    with checkpoints.open_manager(
        directory, limit=args.save_total_limit, best_metric=best
    ) as manager:
        state, saved = _resume(run, manager, init_state)
        _describe(run, state)
        output_dir.begin(args, directory)
        with Log(
            directory,
            int(state.step),
            num_steps,
            run.train_data.steps_per_epoch,
            args.logging_steps,
            args.report_to == "tensorboard" and jax.process_index() == 0,
            saved.get("log", {}),
        ) as log:
            state, seconds = _take_steps(run, manager, state, log, saved)
            params = state.params
            if best is not None:
                params = _load_best(manager, best, params)
            _save_model(run.task, params, directory)
            results = {}
            if args.do_eval:
                results = run.task.evaluate(params)
                if best is None:
                    log.evaluation(num_steps, results)
    epoch = {"epoch": num_steps / run.train_data.steps_per_epoch}
    speed = {
        "train_runtime": seconds,
        "train_samples": run.train_data.features.num_examples,
        "train_samples_per_second": num_steps * run.train_data.batch_size / seconds,
        "train_steps_per_second": num_steps / seconds,
    }
    train_results = {**log.summary(), **epoch, **speed}
    return params, train_results, results | epoch if results else {}


def _describe(run: Run, state: steps.TrainState) -> None:
    """Prints the data, the model size and the optimizer."""
    train_data, optimizer = run.train_data, run.optimizer
    lengths = sorted({batch["input_ids"].shape[1] for batch in run.first_batches})
    num_params = sum(leaf.size for leaf in jax.tree.leaves(state.params))
    num_devices = devices.count()
    print(
        f"Training on {train_data.features.num_examples:,} examples: "
        f"{train_data.num_steps:,} steps of {train_data.batch_size}, padded to "
        f"{', '.join(map(str, lengths))} tokens; {num_params:,} parameters.\n"
        f"{optimizer.name} with {optimizer.hyperparams}; its state takes "
        f"{memory.nbytes(memory.on_device(state.opt_state)) / 1e9:.2f} GB"
        f"{f' on each of {num_devices} devices' if num_devices > 1 else ''}."
    )
    size = checkpoints.window_nbytes(state)
    if size and not run.task.args.save_window:
        print(
            f"Checkpoints omit the window ({size / 1e9:.2f} GB): a resumed run starts "
            "with an empty one, and its steps differ until it is full again."
        )


def _take_steps(
    run: Run,
    manager: ocp.CheckpointManager,
    state: steps.TrainState,
    log: Log,
    saved: Mapping[str, Any],
) -> tuple[steps.TrainState, float]:
    """Returns the last state and the seconds taken, including before a resume.

    Evaluations and checkpoints wait for all steps before them, so that a diverged state
    is never saved.
    """
    train_step, start = _compiled_step(run, state), int(state.step)
    began = time.perf_counter() - saved.get("seconds", 0.0)
    queue = steps.MetricsQueue(log.step)
    coming = batches.prefetch(batches.train_batches(run.train_data, start))
    with _named_last_good(manager), signals.caught() as stop_signal:
        for step, batch in enumerate(coming, start + 1):
            state, metrics = train_step(state, batch)
            queue.put(step, metrics)
            eval_due, save_due = _due(run, step)
            signal_number = stop_signal(step)
            if not (eval_due or save_due or signal_number):
                continue
            queue.flush()
            steps.check_finite(state)
            results = {}
            if eval_due:
                results = run.task.evaluate(state.params)
                log.evaluation(step, results)
            if save_due or signal_number:
                seconds = time.perf_counter() - began
                path = _save_checkpoint(run, manager, state, log, seconds, results)
                if signal_number:
                    raise _interrupted(signal_number, step, run, path)
        queue.flush()
        steps.check_finite(state)
    return state, time.perf_counter() - began


def _compiled_step(run: Run, state: steps.TrainState) -> Callable[..., Any]:
    train_step = steps.make_train_step(
        run.task.loss,
        run.optimizer.transformation,
        schedule=run.optimizer.schedule,
        accumulation_steps=run.task.args.gradient_accumulation_steps,
        shardings=steps.shardings_of(state),
    )
    return steps.compile_ahead(train_step, state, run.first_batches)


def _due(run: Run, step: int) -> tuple[bool, bool]:
    """Returns whether an evaluation and a checkpoint are due after a step."""
    args, data = run.task.args, run.train_data

    def is_due(strategy: str, every: int) -> bool:
        every = data.steps_per_epoch if strategy == "epoch" else every
        return strategy != "no" and step % every == 0

    if step == data.num_steps:
        # Evaluated after the loop, unless the best parameters may replace the last.
        return args.load_best_model_at_end, args.save_strategy != "no"
    eval_steps = args.eval_steps or args.logging_steps
    return is_due(args.eval_strategy, eval_steps), is_due(
        args.save_strategy, args.save_steps
    )


def _save_checkpoint(
    run: Run,
    manager: ocp.CheckpointManager,
    state: steps.TrainState,
    log: Log,
    seconds: float,
    results: Mapping[str, float],
) -> Path | None:
    saved = {"fingerprint": _fingerprint(run), "log": log.state(), "seconds": seconds}
    keep = run.task.args.save_window
    try:
        path = checkpoints.save(manager, state, saved, results, with_window=keep)
        _save_model(run.task, state.params, path)
        return path
    except Exception as error:  # A lost checkpoint must not end the run.
        if jax.process_count() > 1:  # The others wait for this process to save.
            raise
        what = f"checkpoint-{int(state.step)} cannot be written"
        print(f"warning: {what}: {type(error).__name__}: {error}", file=sys.stderr)
        return None


def _resume(
    run: Run,
    manager: ocp.CheckpointManager,
    init_state: Callable[[], steps.TrainState],
) -> tuple[steps.TrainState, Mapping[str, Any]]:
    """Returns the state to start from, and the loop state saved with it.

    Without `--resume_from_checkpoint`, the run resumes from the newest readable
    checkpoint in the output directory, as in Hugging Face's scripts, or starts over
    with `--overwrite_output_dir`.
    """
    args = run.task.args
    wanted = args.resume_from_checkpoint
    if wanted not in (None, "last"):
        path = Path(wanted)
        step = checkpoints.step_of(path)
        if step is None or not path.is_dir():
            raise UserError(f"--resume_from_checkpoint {wanted} is not a checkpoint.")
        if path.parent.resolve() == Path(manager.directory).resolve():
            return _restore(run, manager, [step], init_state)
        with checkpoints.open_manager(path.parent, read_only=True) as source:
            return _restore(run, source, [step], init_state)
    found = sorted(manager.all_steps(), reverse=True)
    if wanted is None and args.overwrite_output_dir:
        for step in found:
            manager.delete(step)
        return init_state(), {}
    if found:
        return _restore(run, manager, found, init_state)
    if wanted == "last":
        where = manager.directory
        raise UserError(f"--resume_from_checkpoint: there is no checkpoint in {where}.")
    return init_state(), {}


def _restore(
    run: Run,
    manager: ocp.CheckpointManager,
    candidates: list[int],
    init_state: Callable[[], steps.TrainState],
) -> tuple[steps.TrainState, Mapping[str, Any]]:
    for step in candidates:
        path = Path(manager.directory, f"checkpoint-{step}")
        try:
            saved = checkpoints.read_loop_state(manager, step)
            _check_same_run(run, saved["fingerprint"], path)
            has_window = saved["has_window"]
            shapes = steps.state_shapes(
                run.task.model.params, run.optimizer.transformation
            )
            state = checkpoints.read_state(
                manager, step, shapes, init_state, has_window
            )
        except (UserError, jax.errors.JaxRuntimeError):
            raise
        except Exception as error:  # Orbax raises many types for a damaged checkpoint.
            reason = first_line(error)
            if jax.process_count() > 1:  # Others may have read their part.
                what = f"{path} cannot be read ({reason})"
                raise UserError(f"{what}. Remove it to resume from another.") from error
            print(f"{path} cannot be read and is skipped: {reason}", file=sys.stderr)
            continue
        print(f"Resuming from {path}.")
        if path.parent == Path(run.task.args.output_dir).absolute():
            # Later ones are written again, and must not count as the newest.
            for later in [other for other in manager.all_steps() if other > step]:
                manager.delete(later)
            if not (path / "model.safetensors").exists():  # Killed before that.
                _save_model(run.task, state.params, path)
        if not saved["has_window"]:
            print("The checkpoint holds no window: M-FAC starts with an empty one.")
        return state, saved
    raise UserError(
        f"no checkpoint in {manager.directory} can be read. Give another --output_dir, "
        "or --overwrite_output_dir to start over."
    )


def _fingerprint(run: Run) -> dict[str, Any]:
    """Returns what a resumed run must share with the run it resumes."""
    features = run.train_data.features
    examples = hashlib.sha256()
    for array in (features.tokens, features.starts, *features.targets.values()):
        examples.update(array.tobytes())
    return {
        **run.task.args.fixed,
        "the batch size of all devices": run.train_data.batch_size,
        "the hyperparameters": run.optimizer.hyperparams,
        "the hash of the training examples": examples.hexdigest()[:16],
    }


def _check_same_run(run: Run, saved: Mapping[str, Any], path: Path) -> None:
    for name, value in _fingerprint(run).items():
        if saved.get(name, value) != value:
            raise UserError(
                f"{path} belongs to another run: {name} was {saved[name]!r} and is "
                f"now {value!r}. To start a new run from its weights, give it as "
                "--model_name_or_path with another --output_dir and without "
                "--resume_from_checkpoint."
            )


def _load_best(
    manager: ocp.CheckpointManager, metric: str, params: bert.Params
) -> bert.Params:
    step = manager.best_step()
    if step is None or metric not in (manager.metrics(step) or {}):
        print(f"No checkpoint has {metric}: keeping the last parameters.")
        return params
    path = Path(manager.directory, f"checkpoint-{step}")
    print(f"Loading the best model from {path}.")
    # The first process may still be writing it.
    multihost_utils.sync_global_devices("best model")
    tensors = pretrained.read_tensors(path)
    return devices.put(pretrained.params_from_tensors(tensors, params, path)[0])


def _save_model(task: Task, params: bert.Params, directory: Path) -> None:
    if jax.process_index() == 0:
        pretrained.save_pretrained(directory, task.model._replace(params=params))


@contextlib.contextmanager
def _named_last_good(manager: ocp.CheckpointManager) -> Iterator[None]:
    """Adds the last good checkpoint to the error when training diverges."""
    try:
        yield
    except steps.Diverged as error:
        step = manager.latest_step()
        if step is None:
            raise
        good = f"checkpoint-{step} is the last good checkpoint."
        raise UserError(f"{error} {good}") from error


def _interrupted(number: int, step: int, run: Run, path: Path | None) -> Interrupted:
    args: Arguments = run.task.args
    kept = "It could not be saved." if path is None else f"Saved in {path}."
    how = "Rerun the same command"
    if args.overwrite_output_dir or args.resume_from_checkpoint is not None:
        how += " with --resume_from_checkpoint last"
    return Interrupted(
        f"stopped by {signal.Signals(number).name} after step {step} of "
        f"{run.train_data.num_steps}. {kept} {how} to resume from the last checkpoint.",
        exit_code=128 + number,
    )
