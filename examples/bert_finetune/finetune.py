"""From a model and its data to results on disk: what is the same for every task."""

import json
import math
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

import jax

from bert_finetune.arguments import Arguments
from bert_finetune.data.batches import TrainData, batch_lengths, survey
from bert_finetune.data.features import Features
from bert_finetune.errors import UserError
from bert_finetune.files import read_json_lines, write_json
from bert_finetune.model import bert, pretrained
from bert_finetune.reporting import model_card
from bert_finetune.reporting.log import METRICS_FILE, require_tensorboard
from bert_finetune.reporting.plots import plot_curves
from bert_finetune.training import loop, optimizers, output_dir
from bert_finetune.training.losses import LossFn


class Report(NamedTuple):
    """What a run is called, and which of its results count.

    Attributes:
      title: of the curves.
      dataset: a hub id, a directory or a file.
      config: of the data set, if it has several.
      metrics: the names, without ``eval_``, that count beside the loss.
      pipeline_tag: the hub's name for what the model does.
    """

    title: str
    dataset: str
    config: str | None
    metrics: Sequence[str]
    pipeline_tag: str


def check_flags(args: Arguments, model: pretrained.Pretrained, known: Sequence[str]):
    """Checks what depends on the model and the task.

    Args:
      args: the flags.
      model: that they name.
      known: what ``--metric_for_best_model`` may be.

    Raises:
      UserError: naming the flag.
    """
    name = args.metric_for_best_model
    if name.removeprefix("eval_") not in known:
        raise UserError(
            f"--metric_for_best_model must be one of {', '.join(known)}, got {name!r}."
        )
    if args.max_seq_length > model.config.max_position_embeddings:
        raise UserError(
            f"--max_seq_length {args.max_seq_length} is more than the "
            f"{model.config.max_position_embeddings} positions of the model."
        )


def padded_lengths(args: Arguments) -> list[int]:
    """Returns the lengths to which batches may be padded."""
    if args.pad_to_max_length:
        return [args.max_seq_length]
    return batch_lengths(args.max_seq_length)


def plan_training(
    args: Arguments,
    model: pretrained.Pretrained,
    model_class: bert.ModelClass,
    loss_fn: LossFn,
    make_features: Callable[[], Features],
) -> loop.Run:
    """Tokenises the training data, and prepares everything but the first step.

    Args:
      args: the flags.
      model: to start from.
      model_class: of the model.
      loss_fn: to minimise.
      make_features: tokenises the data.

    Raises:
      UserError: for an optimizer that does not exist, cannot be used or does not fit.
    """
    batch_size = args.per_device_train_batch_size * args.gradient_accumulation_steps
    max_rows = {
        "word_embeddings": batch_size * args.max_seq_length,
        "position_embeddings": args.max_seq_length,
    }
    # With bounds that always hold, to refuse a bad flag before a long wait.
    optimizers.make_optimizer(args, max(1, args.max_steps), max_rows)
    features = make_features()
    num_steps = args.max_steps
    if num_steps < 0:
        steps_per_epoch = math.ceil(features.num_examples / batch_size)
        num_steps = math.ceil(args.num_train_epochs * steps_per_epoch)
    train_data = TrainData(
        features, batch_size, num_steps, padded_lengths(args), args.seed
    )
    surveyed = survey(train_data)
    max_rows = {
        "word_embeddings": surveyed.max_distinct_tokens,
        "position_embeddings": surveyed.lengths[-1],
    }
    optimizer = optimizers.make_optimizer(args, num_steps, max_rows)
    optimizers.check_update(optimizer, model.params)
    optimizers.check_memory(optimizer, model.params)
    if args.report_to == "tensorboard":
        require_tensorboard()
    return loop.Run(
        args,
        model,
        model_class,
        loss_fn,
        optimizer,
        train_data,
        surveyed.lengths,
        evaluate=None,
    )


def run(
    args: Arguments,
    command: str,
    model: pretrained.Pretrained,
    report: Report,
    *,
    train_run: loop.Run | None,
    evaluate: Callable[[bert.Params], dict[str, float]] | None,
    predict: Callable[[bert.Params], None] | None,
) -> dict[str, float]:
    """Trains, evaluates, predicts and reports; returns what evaluation found.

    Args:
      args: the flags.
      command: what was typed, for the model card.
      model: as read.
      report: what to call all this.
      train_run: from :func:`plan_training`; ``None`` without training.
      evaluate: from parameters to results under names with ``eval_``, or ``None``.
      predict: from parameters to files, or ``None``.

    Raises:
      UserError: if something cannot be read or written, or training diverges.
    """
    with output_dir.locked(args) as out:
        for note in model.notes:
            print(note)
        params, train_results, results = model.params, {}, {}
        if train_run is not None:
            train_run = train_run._replace(evaluate=evaluate)
            params, train_results, results = _train(train_run, out)
        elif evaluate is not None:
            results = evaluate(params)
        for kind, values in {"train": train_results, "eval": results}.items():
            if values:
                write_json(out / f"{kind}_results.json", values)
            for name, value in values.items():
                print(f"{name:28} {value:.4f}")
        if predict is not None:
            predict(params)
        if train_run is not None:
            _write_reports(train_run, command, report, out, results)
        # Last, since it says that nothing is left to do.
        _add_results(out / "all_results.json", train_results | results)
        print(f"Results are in {out}.")
    return results


def _train(train_run: loop.Run, out: Path) -> loop.Trained:
    train_data, optimizer = train_run.train_data, train_run.optimizer
    params = train_run.model.params
    num_params = sum(leaf.size for leaf in jax.tree.leaves(params))
    state_bytes = optimizers.nbytes(
        jax.eval_shape(optimizer.transformation.init, params)
    )
    print(
        f"Training on {train_data.features.num_examples:,} examples: "
        f"{train_data.num_steps:,} steps of {train_data.batch_size}, padded to "
        f"{', '.join(map(str, train_run.lengths))} tokens; {num_params:,} parameters.\n"
        f"{optimizer.name} with {optimizer.hyperparams}; its state takes "
        f"{state_bytes / 1e9:.2f} GB."
    )
    resume_from = output_dir.checkpoints_to_resume(train_run.args, out)
    return loop.fit(train_run, out, resume_from)


def _add_results(path: Path, results: Mapping[str, float]) -> None:
    """Writes results beside those of earlier runs on the same model."""
    earlier = json.loads(path.read_text()) if path.exists() else {}
    write_json(path, {**earlier, **results})


def _write_reports(
    train_run: loop.Run,
    command: str,
    report: Report,
    out: Path,
    results: Mapping[str, float],
) -> None:
    args, optimizer = train_run.args, train_run.optimizer
    lines = read_json_lines(out / METRICS_FILE)
    plot_curves(
        out / "curves.png",
        f"{report.title}, {optimizer.name}",
        {optimizer.name: lines},
        report.metrics,
    )
    model_card.write_model_card(
        out / "README.md",
        model_name=args.model_name_or_path,
        dataset=report.dataset,
        task=report.config,
        optimizer=optimizer.name,
        metrics=report.metrics,
        results=results,
        hyperparams={
            **model_card.named_flags(args),
            "learning_rate": optimizer.hyperparams["lr"],
            optimizer.name: optimizer.hyperparams,
        },
        command=command,
        lines=lines,
        pipeline_tag=report.pipeline_tag,
    )
