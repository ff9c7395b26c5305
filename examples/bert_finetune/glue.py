"""Fine-tuning on a GLUE task, from flags to results."""

import collections
import math
import tempfile
import time
from pathlib import Path
from typing import NamedTuple

import datasets
import jax
import numpy as np

from bert_finetune import (
    data,
    hub,
    metrics,
    modeling,
    optimizers,
    pretrained,
    reporting,
    training,
)
from bert_finetune.arguments import Arguments
from bert_finetune.errors import UserError


class Task(NamedTuple):
    """A GLUE task.

    Attributes:
      text_columns: one or two.
      label_names: in the order of the labels.
      metrics: as GLUE reports them.
    """

    text_columns: tuple[str, ...]
    label_names: tuple[str, ...]
    metrics: tuple[str, ...]


TASKS = {
    "mrpc": Task(
        ("sentence1", "sentence2"),
        ("not_equivalent", "equivalent"),
        ("accuracy", "f1"),
    ),
    "qqp": Task(
        ("question1", "question2"),
        ("not_duplicate", "duplicate"),
        ("accuracy", "f1"),
    ),
    "sst2": Task(("sentence",), ("negative", "positive"), ("accuracy",)),
}


def run(args: Arguments) -> dict[str, float]:
    """Trains and evaluates as the flags say; returns the results of the evaluation.

    Raises:
      UserError: for anything in the flags, the files or the data that cannot be used.
    """
    if args.task_name not in TASKS:
        raise UserError(
            f"--task_name must be one of {', '.join(TASKS)}, got {args.task_name!r}."
        )
    task = TASKS[args.task_name]
    directory = hub.resolve_model(args.model_name_or_path)
    train_set = eval_set = None
    if args.do_train:
        train_set = load_split(args, "train", args.max_train_samples)
    if args.do_eval:
        eval_set = load_split(args, "validation", args.max_eval_samples)
    model = pretrained.load_pretrained(
        directory,
        modeling.BertForSequenceClassification,
        label_names=list(task.label_names),
        seed=args.seed,
    )
    if args.max_seq_length > model.config.max_position_embeddings:
        raise UserError(
            f"--max_seq_length {args.max_seq_length} is more than the "
            f"{model.config.max_position_embeddings} positions of the model."
        )
    plan = None
    if train_set is not None:
        plan = _plan_training(args, model, train_set)
    output_dir = prepare_output_dir(args)
    # From here on nothing is left to refuse.
    for note in model.notes:
        print(note)
    history = results = {}
    if plan is not None:
        model, history, results = _train(args, plan, output_dir, model)
    if eval_set is not None:
        results = results | _evaluate(args, model, eval_set)
        reporting.write_json(output_dir / "eval_results.json", results)
        for name, value in results.items():
            print(f"{name:24} {value:.4f}")
    if history:
        reporting.plot_curves(
            output_dir / "curves.png",
            f"{args.task_name}, {args.optim}",
            {args.optim: history},
            {args.optim: results},
        )
    print(f"Results are in {output_dir}.")
    return results


def load_split(
    args: Arguments, split: str, max_samples: int | None
) -> datasets.Dataset:
    """Loads a split of the task from a directory or the hub, and checks it.

    Raises:
      UserError: if the split or one of its columns is not there or of the wrong kind.
    """
    datasets.disable_progress_bars()
    task = TASKS[args.task_name]
    if Path(args.dataset_name).is_dir():
        dataset = _load_from_directory(Path(args.dataset_name), args.task_name, split)
    else:
        dataset = _load_from_hub(args.dataset_name, args.task_name, split)
    where = f"the {split} split of {args.task_name} in {args.dataset_name}"
    if len(dataset) == 0:
        raise UserError(f"{where} is empty.")
    for column in (*task.text_columns, "label"):
        if column not in dataset.column_names:
            raise UserError(
                f"{where} has no column {column!r}; it has "
                f"{', '.join(dataset.column_names)}."
            )
    if max_samples is not None:
        dataset = dataset.select(range(min(max_samples, len(dataset))))
    for column in task.text_columns:
        texts = dataset.data.column(column)
        if str(texts.type) not in ("string", "large_string") or texts.null_count:
            raise UserError(
                f"column {column!r} of {where} must hold a text in every row; it has "
                f"type {texts.type} and {texts.null_count} empty entries."
            )
    labels, num_labels = np.asarray(dataset["label"]), len(task.label_names)
    if not (
        np.issubdtype(labels.dtype, np.integer)
        and labels.min() >= 0
        and labels.max() < num_labels
    ):
        raise UserError(
            f"the labels of {where} must be integers from 0 to {num_labels - 1}, got "
            f"{sorted(set(labels.tolist()), key=str)[:5]}."
        )
    return dataset


def _load_from_directory(directory: Path, task: str, split: str) -> datasets.Dataset:
    pattern = f"{task}/{split}-*.parquet"
    files = sorted(str(file) for file in directory.glob(pattern))
    if not files:
        raise UserError(f"there is no {pattern} in {directory}.")
    try:
        # One unnamed split, which datasets calls "train".
        return datasets.load_dataset("parquet", data_files=files, split="train")
    except Exception as error:
        raise UserError(f"{', '.join(files)} cannot be read: {error}") from None


def _load_from_hub(name: str, task: str, split: str) -> datasets.Dataset:
    reachable = hub.hub_is_reachable()
    try:
        return datasets.load_dataset(name, task, split=split)
    except Exception as error:
        raise UserError(
            f"data set {name!r} is not a directory here, and "
            f"{hub.hub_failure(reachable, error)} Give --dataset_name a directory that "
            f"holds {task}/train-*.parquet and validation-*.parquet."
        ) from None


def prepare_output_dir(args: Arguments) -> Path:
    """Makes the output directory, or says why it cannot be used.

    Raises:
      UserError: if it cannot be written, or is not empty where training would mix with
        what is there.
    """
    output_dir = Path(args.output_dir)
    try:
        output_dir.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=output_dir):
            pass
    except OSError as error:
        raise UserError(
            f"--output_dir {output_dir} cannot be written: {error.strerror}."
        ) from None
    if args.do_train and not args.overwrite_output_dir and any(output_dir.iterdir()):
        raise UserError(
            f"--output_dir {output_dir} is not empty: give another one, or "
            "--overwrite_output_dir to train into it."
        )
    return output_dir


class _Plan(NamedTuple):
    features: data.Features
    num_steps: int
    steps_per_epoch: int
    optimizer: optimizers.Optimizer


def _plan_training(
    args: Arguments, model: pretrained.Pretrained, dataset: datasets.Dataset
) -> _Plan:
    batch_size = args.per_device_train_batch_size
    steps_per_epoch = math.ceil(len(dataset) / batch_size)
    num_steps = math.ceil(args.num_train_epochs * steps_per_epoch)
    if args.max_steps > 0:
        num_steps = args.max_steps
    max_rows = {
        "word_embeddings": batch_size * args.max_seq_length,
        "position_embeddings": args.max_seq_length,
    }
    # With the bound that always holds, to refuse a bad flag before a long wait.
    optimizers.make_optimizer(args, num_steps, max_rows)
    features = _tokenize(args, model, dataset)
    max_rows["word_embeddings"] = data.max_distinct_tokens(
        features, batch_size, num_steps, args.seed
    )
    optimizer = optimizers.make_optimizer(args, num_steps, max_rows)
    optimizers.check_memory(optimizer, model.params)
    return _Plan(features, num_steps, steps_per_epoch, optimizer)


def _tokenize(
    args: Arguments, model: pretrained.Pretrained, dataset: datasets.Dataset
) -> data.Features:
    texts = [dataset[column] for column in TASKS[args.task_name].text_columns]
    return data.tokenize(model.tokenizer, texts, dataset["label"], args.max_seq_length)


def _train(
    args: Arguments,
    plan: _Plan,
    output_dir: Path,
    model: pretrained.Pretrained,
) -> tuple[pretrained.Pretrained, dict[str, list[float]], dict[str, float]]:
    """Trains and saves; returns the model, metrics by step, and what was reached."""
    features, num_steps, steps_per_epoch, optimizer = plan
    batch_size = args.per_device_train_batch_size
    loss_fn = training.classification_loss(
        modeling.make_apply(model.config, modeling.BertForSequenceClassification)
    )
    state = training.init_state(model.params, optimizer.transformation)
    num_params = sum(leaf.size for leaf in jax.tree.leaves(model.params))
    print(
        f"Training {args.task_name}: {len(features):,} examples, {num_steps:,} steps "
        f"of {batch_size}, {num_params:,} parameters.\n"
        f"{optimizer.name} with {optimizer.hyperparams}; its state takes "
        f"{optimizers.nbytes(state.opt_state) / 1e9:.2f} GB."
    )
    log = output_dir / "metrics.jsonl"
    log.unlink(missing_ok=True)
    history: dict[str, list[float]] = collections.defaultdict(list)

    def record(step: int, values: dict[str, float]) -> None:
        for name, value in values.items():
            history[name].append(value)
        if step % args.logging_steps == 0 or step in (1, num_steps):
            start = (step - 1) // args.logging_steps * args.logging_steps
            means = {
                n: float(np.mean(history[n][start:])) for n in ("loss", "accuracy")
            }
            line = {"step": step, "epoch": step / steps_per_epoch, **values, **means}
            reporting.append_json_line(log, line)

    started = time.perf_counter()
    state = training.train(
        state,
        training.make_train_step(loss_fn, optimizer.transformation, args.seed),
        data.train_batches(features, batch_size, num_steps, args.seed),
        num_steps,
        optimizer.schedule,
        record,
    )
    seconds = time.perf_counter() - started
    model = model._replace(params=state.params)
    pretrained.save_pretrained(
        output_dir,
        model.params,
        model.config,
        model.tokenizer,
        modeling.BertForSequenceClassification,
    )
    reached = {"epoch": num_steps / steps_per_epoch}
    last = {
        name: history[name][-1]
        for name in ("damp", "num_raised", "num_refused", "num_dropped")
        if name in history
    }
    reporting.write_json(
        output_dir / "train_results.json",
        {
            "train_loss": float(np.mean(history["loss"])),
            "train_runtime": seconds,
            "train_samples": len(features),
            "train_samples_per_second": num_steps * batch_size / seconds,
            "train_steps_per_second": num_steps / seconds,
            **last,
            **reached,
        },
    )
    return model, history, reached


def _evaluate(
    args: Arguments, model: pretrained.Pretrained, dataset: datasets.Dataset
) -> dict[str, float]:
    """Evaluates on every example once; returns results under Hugging Face's keys."""
    features = _tokenize(args, model, dataset)
    batch_size = args.per_device_eval_batch_size
    apply = modeling.make_apply(model.config, modeling.BertForSequenceClassification)
    started = time.perf_counter()
    losses, predictions = training.predict(
        model.params,
        training.make_eval_step(apply),
        data.eval_batches(features, batch_size),
        len(features),
    )
    seconds = time.perf_counter() - started
    names = TASKS[args.task_name].metrics
    results = {
        "loss": float(losses.mean()),
        **metrics.glue_metrics(names, features.labels, predictions),
        "samples": len(features),
        "runtime": seconds,
        "samples_per_second": len(features) / seconds,
        "steps_per_second": math.ceil(len(features) / batch_size) / seconds,
    }
    return {f"eval_{name}": value for name, value in results.items()}
