"""A training run: its loop, evaluations, checkpoints, interruptions and reports."""

import contextlib
import functools
import hashlib
import math
import signal
import sys
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import jax

from bert_finetune.arguments import Arguments
from bert_finetune.data.batches import TrainData, prefetch, train_batches
from bert_finetune.errors import Interrupted, UserError
from bert_finetune.model import bert, pretrained
from bert_finetune.reporting.log import Progress, TrainingLog, tensorboard
from bert_finetune.training import checkpoints, optimizers
from bert_finetune.training.losses import LossFn
from bert_finetune.training.output_dir import begin
from bert_finetune.training.steps import (
    Diverged,
    MetricsQueue,
    TrainState,
    check_finite,
    compile_for_lengths,
    init_state,
    make_train_step,
)

# Flags that a run may change when it is resumed: what it trains on, and how, stays. The
# optimizer's are compared as the hyper-parameters that they result in.
_FREE_FLAGS = frozenset(
    "output_dir overwrite_output_dir resume_from_checkpoint model_name_or_path "
    "dataset_name dataset_config_name train_file validation_file test_file do_train "
    "do_eval do_predict overwrite_cache max_eval_samples max_predict_samples "
    "per_device_eval_batch_size logging_steps eval_strategy eval_steps save_strategy "
    "save_steps save_total_limit save_window load_best_model_at_end "
    "metric_for_best_model report_to optim_args learning_rate weight_decay n_best_size "
    "max_answer_length null_score_diff_threshold version_2_with_negative".split()
)


class Run(NamedTuple):
    """What a training run is made of.

    Attributes:
      args: the flags.
      model: to start from.
      model_class: of the model.
      loss_fn: to minimise.
      optimizer: with its schedule.
      train_data: the batches.
      lengths: to which they are padded, all that occur.
      evaluate: from parameters to results, under names with ``eval_``; or ``None``.
    """

    args: Arguments
    model: pretrained.Pretrained
    model_class: bert.ModelClass
    loss_fn: LossFn
    optimizer: optimizers.Optimizer
    train_data: TrainData
    lengths: list[int]
    evaluate: Callable[[bert.Params], dict[str, float]] | None


class Trained(NamedTuple):
    """What a training run ends with.

    Attributes:
      params: the last ones, or the best.
      train_results: under Hugging Face's keys.
      eval_results: likewise; empty without an evaluation.
    """

    params: bert.Params
    train_results: dict[str, float]
    eval_results: dict[str, float]


def fit(run: Run, output_dir: Path, resume_from: list[Path]) -> Trained:
    """Trains, from the start or from a checkpoint, saves the model and evaluates it.

    Args:
      run: what to do.
      output_dir: where everything is written.
      resume_from: checkpoints to go on from; the first that can be used is.

    Raises:
      Interrupted: after SIGINT or SIGTERM; a checkpoint has been written.
      UserError: if training diverges, or something cannot be read or written.
    """
    args, train_data = run.args, run.train_data
    num_steps, steps_per_epoch = train_data.num_steps, train_data.steps_per_epoch
    new_state = functools.partial(
        init_state,
        run.model.params,
        run.optimizer.transformation,
        args.seed,
    )
    state, saved = _resume(run, output_dir, resume_from, new_state)
    start = int(state.step)
    begin(args, output_dir)
    train_step = compile_for_lengths(
        make_train_step(
            run.loss_fn,
            run.optimizer.transformation,
            schedule=run.optimizer.schedule,
            accumulation_steps=args.gradient_accumulation_steps,
        ),
        jax.eval_shape(new_state),
        next(train_batches(train_data)),
        run.lengths,
    )
    if not args.save_window and (size := checkpoints.window_nbytes(state)):
        print(
            f"The window's {size / 1e9:.2f} GB are not kept in checkpoints: a resumed "
            "run starts with an empty one, and its steps differ until it is full again."
        )
    with contextlib.ExitStack() as stack:
        write_tensorboard = stack.enter_context(
            tensorboard(output_dir / "runs", start)
            if args.report_to == "tensorboard"
            else contextlib.nullcontext(lambda line: None)
        )
        progress = stack.enter_context(Progress(num_steps, start))
        log = TrainingLog(
            output_dir,
            num_steps,
            steps_per_epoch,
            args.logging_steps,
            progress,
            write_tensorboard,
            saved.get("log"),
        )
        try:
            params, seconds = _take_steps(
                run, output_dir, train_step, state, log, saved
            )
        except Diverged as error:
            good = checkpoints.find_checkpoints(output_dir, up_to=error.step)
            kept = f"{good[0]} is the last good checkpoint." if good else ""
            raise UserError(f"{error} {kept}") from None
        epoch = {"epoch": num_steps / steps_per_epoch}
        eval_results = {}
        if run.evaluate is not None:
            eval_results = {**run.evaluate(params), **epoch}
            if not args.load_best_model_at_end:
                log.evaluation(num_steps, eval_results)
    train_results = {
        **log.summary(),
        **epoch,
        "train_runtime": seconds,
        "train_samples": train_data.features.num_examples,
        "train_samples_per_second": num_steps * train_data.batch_size / seconds,
        "train_steps_per_second": num_steps / seconds,
    }
    return Trained(params, train_results, eval_results)


def _take_steps(
    run: Run,
    output_dir: Path,
    train_step: Callable[..., Any],
    state: TrainState,
    log: TrainingLog,
    saved: Mapping[str, Any],
) -> tuple[bert.Params, float]:
    """Saves and returns the last parameters, or the best, and the seconds it took.

    Evaluations and checkpoints wait for the steps before them, and see what these have
    led to: nothing that has diverged is saved.
    """
    args, num_steps = run.args, run.train_data.num_steps
    start = int(state.step)
    best = _still_best(args, output_dir, saved.get("best"))
    began = time.perf_counter() - saved.get("seconds", 0.0)
    queue = MetricsQueue(log.step)
    with _stop_signals() as stop_signals:
        batches = prefetch(train_batches(run.train_data, start))
        for step, batch in enumerate(batches, start + 1):
            state, metrics = train_step(state, batch)
            queue.put(step, metrics)
            eval_due = _is_due(args.eval_strategy, _eval_steps(args), step, run)
            save_due = _is_due(args.save_strategy, args.save_steps, step, run)
            if not (eval_due or save_due or stop_signals):
                continue
            queue.flush()
            check_finite(state)
            better = best
            # The last parameters are evaluated in any case, after this.
            if eval_due and (step < num_steps or args.load_best_model_at_end):
                assert run.evaluate is not None, "--eval_strategy implies --do_eval"
                results = run.evaluate(state.params)
                log.evaluation(step, results)
                # What is not saved cannot be loaded at the end.
                better = _better(args, best, step, results) if save_due else best
            if save_due or stop_signals:
                trainer_state = {
                    "fingerprint": _fingerprint(run),
                    "best": better,
                    "log": log.state(),
                    "seconds": time.perf_counter() - began,
                }
                saved_to = _save_checkpoint(run, output_dir, state, trainer_state)
                best = better if saved_to else best
                if stop_signals:
                    raise _interrupted(stop_signals[0], step, run, saved_to)
        queue.flush()
        check_finite(state)
        params = state.params
        if best is not None:
            params = _load_best(output_dir, params, best)
        elif args.load_best_model_at_end:
            print("No checkpoint is the best: these are the last parameters.")
        _save_model(run, params, output_dir)
    return params, time.perf_counter() - began


def _save_checkpoint(
    run: Run,
    output_dir: Path,
    state: TrainState,
    trainer_state: Mapping[str, Any],
) -> Path | None:
    try:
        path = checkpoints.save(
            output_dir,
            state,
            trainer_state,
            functools.partial(_save_model, run, state.params),
            with_window=run.args.save_window,
        )
    except checkpoints.CheckpointError as error:
        # A run is worth more than its checkpoint.
        print(f"warning: {error}", file=sys.stderr)
        return None
    best = trainer_state["best"]
    checkpoints.remove_old(
        output_dir,
        int(state.step),
        run.args.save_total_limit,
        best and best["checkpoint"],
    )
    return path


def _resume(
    run: Run,
    output_dir: Path,
    candidates: list[Path],
    init_state: Callable[[], TrainState],
) -> tuple[TrainState, Mapping[str, Any]]:
    checkpoints.clean_up(output_dir)
    for path in candidates:
        try:
            state, saved = checkpoints.restore(path, init_state, _fingerprint(run))
        except checkpoints.CheckpointError as error:
            print(f"{error} It is skipped.", file=sys.stderr)
            continue
        print(f"Going on from {path}.")
        if not saved["has_window"]:
            print("It holds no window: M-FAC starts with an empty one.")
        return state, saved
    if candidates:
        raise UserError(
            f"no checkpoint can be used, of {', '.join(map(str, candidates))}. Give "
            "another --output_dir, or --overwrite_output_dir to start anew."
        )
    return init_state(), {}


def _fingerprint(run: Run) -> dict[str, Any]:
    """Returns what must not change for a resumed run to be the same run."""
    flags = {
        f"--{name}": value
        for name, value in vars(run.args).items()
        if name not in _FREE_FLAGS
    }
    features = run.train_data.features
    examples = hashlib.sha256()
    for array in (features.tokens, features.starts, *features.targets.values()):
        examples.update(array.tobytes())
    return {
        **flags,
        "the hyper-parameters": run.optimizer.hyperparams,
        "the hash of the training examples": examples.hexdigest()[:16],
    }


def _is_due(strategy: str, steps: int, step: int, run: Run) -> bool:
    if strategy == "no":
        return False
    every = steps if strategy == "steps" else run.train_data.steps_per_epoch
    return step % every == 0 or step == run.train_data.num_steps


def _eval_steps(args: Arguments) -> int:
    return args.eval_steps or args.logging_steps


def _metric_for_best_model(args: Arguments) -> str:
    return args.metric_for_best_model.removeprefix("eval_")


def _still_best(
    args: Arguments, output_dir: Path, best: dict[str, Any] | None
) -> dict[str, Any] | None:
    """Returns the best so far of a resumed run, if the flags still ask for it."""
    if best is None or not args.load_best_model_at_end:
        return None
    if best["metric"] != _metric_for_best_model(args):
        return None
    return best if (output_dir / best["checkpoint"]).exists() else None


def _better(
    args: Arguments,
    best: dict[str, Any] | None,
    step: int,
    results: Mapping[str, float],
) -> dict[str, Any] | None:
    if not args.load_best_model_at_end:
        return None
    name = _metric_for_best_model(args)
    value = results[f"eval_{name}"] * (-1 if name.endswith("loss") else 1)
    if math.isnan(value) or (best is not None and value <= best["value"]):
        return best
    return {"metric": name, "value": value, "checkpoint": f"checkpoint-{step}"}


def _load_best(
    output_dir: Path, params: bert.Params, best: Mapping[str, Any]
) -> bert.Params:
    path = output_dir / best["checkpoint"]
    tensors = pretrained.read_tensors(path)
    print(f"The best model is that of {path}.")
    return pretrained.params_from_tensors(tensors, params, path)[0]


def _save_model(run: Run, params: bert.Params, directory: Path) -> None:
    model = run.model
    pretrained.save_pretrained(
        directory, params, model.config, model.tokenizer, run.model_class
    )


@contextlib.contextmanager
def _stop_signals() -> Iterator[list[int]]:
    """Yields a list that gets the number of a signal to stop; a second one kills."""
    received: list[int] = []
    if threading.current_thread() is not threading.main_thread():
        yield received  # Only the main thread may handle signals.
        return
    previous: dict[int, Any] = {}

    def receive(number: int, _: Any) -> None:
        received.append(number)
        signal.signal(number, previous[number])

    for number in (signal.SIGINT, signal.SIGTERM):
        previous[number] = signal.signal(number, receive)
    try:
        yield received
    finally:
        for number, handler in previous.items():
            signal.signal(number, handler)


def _interrupted(number: int, step: int, run: Run, path: Path | None) -> Interrupted:
    kept = "It could not be saved." if path is None else f"It is saved in {path}."
    how = "The same command"
    if run.args.overwrite_output_dir or run.args.resume_from_checkpoint is not None:
        how += " with --resume_from_checkpoint last"
    return Interrupted(
        f"stopped by {signal.Signals(number).name} after step {step} of "
        f"{run.train_data.num_steps}. {kept} {how} goes on from the last checkpoint.",
        exit_code=128 + number,
    )
