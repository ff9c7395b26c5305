"""Fine-tuning on a GLUE task or on files of one's own, from flags to results."""

import functools
import json
import math
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from bert_finetune import (
    data,
    hub,
    metrics,
    model_card,
    modeling,
    optimizers,
    output_dir,
    pretrained,
    reporting,
    splits,
    trainer,
    training,
    training_log,
)
from bert_finetune.arguments import Arguments
from bert_finetune.errors import UserError
from bert_finetune.tasks import Task

_MODEL_CLASS = modeling.BertForSequenceClassification


class Classifier(NamedTuple):
    """A model and its task.

    Attributes:
      args: the flags.
      task: of the flags.
      model: as read.
      apply: the model as a function.
      eval_step: from :func:`training.make_eval_step`.
      lengths: to which batches may be padded.
      model_labels: the model's label for each label of the data. A model that knows the
        task's labels in another order keeps its own.
    """

    args: Arguments
    task: Task
    model: pretrained.Pretrained
    apply: modeling.Apply
    eval_step: Callable[..., Any]
    lengths: list[int]
    model_labels: np.ndarray


def run(args: Arguments, command: str) -> dict[str, float]:
    """Trains, evaluates and predicts as the flags say; returns what evaluation found.

    Args:
      args: the flags.
      command: what was typed, for the model card.

    Raises:
      UserError: for anything in the flags, the files or the data that cannot be used.
    """
    classifier = load_classifier(args)
    task = classifier.task
    _check_metric_for_best_model(args, task)
    train_set, eval_sets, test_sets = _load_splits(args, task)
    train_run = None
    if train_set is not None:
        train_run = plan_training(classifier, train_set)
    eval_features, test_features = (
        {name: _features(classifier, split_set) for name, split_set in sets.items()}
        for sets in (eval_sets, test_sets)
    )
    with output_dir.locked(args) as out:
        for note in classifier.model.notes:
            print(note)
        evaluate = None
        if eval_features:
            evaluate = functools.partial(_evaluate, classifier, eval_features)
        params, train_results, results = classifier.model.params, {}, {}
        if train_run is not None:
            params, train_results, results = _train(
                train_run._replace(evaluate=evaluate), out
            )
        elif evaluate is not None:
            results = evaluate(params)
        for kind, values in {"train": train_results, "eval": results}.items():
            if values:
                reporting.write_json(out / f"{kind}_results.json", values)
            for name, value in values.items():
                print(f"{name:28} {value:.4f}")
        for split, features in test_features.items():
            path = out / task.test_splits[split]
            _write_predictions(classifier, params, features, path)
        if train_run is not None:
            _write_reports(classifier, train_run, command, out, results)
        # Last, since it says that nothing is left to do.
        _add_results(out / "all_results.json", train_results | results)
        print(f"Results are in {out}.")
    return results


def _check_metric_for_best_model(args: Arguments, task: Task) -> None:
    name = args.metric_for_best_model
    known = ["loss", *_result_names(task)]
    if name is not None and name.removeprefix("eval_") not in known:
        raise UserError(
            f"--metric_for_best_model must be one of {', '.join(known)}, got {name!r}."
        )


def _result_names(task: Task) -> list[str]:
    """Returns the names of the metrics over all evaluation splits."""
    names = [*task.metrics, *(["combined_score"] if len(task.metrics) > 1 else [])]
    return [name + ending for ending in task.eval_splits.values() for name in names]


def _load_splits(
    args: Arguments, task: Task
) -> tuple[splits.Split | None, dict[str, splits.Split], dict[str, splits.Split]]:
    """Returns the training split, and by name those to evaluate and to predict."""

    def load(names: Mapping[str, str], file: str | None, max_samples: int | None):
        # A file stands for one split, whatever the task has.
        chosen = list(names)[:1] if file is not None else names
        return {
            name: splits.load_split(args, task, name, max_samples) for name in chosen
        }

    train_set, eval_sets, test_sets = None, {}, {}
    if args.do_train:
        train_set = splits.load_split(args, task, "train", args.max_train_samples)
    if args.do_eval:
        eval_sets = load(task.eval_splits, args.validation_file, args.max_eval_samples)
    if args.do_predict:
        test_sets = load(task.test_splits, args.test_file, args.max_predict_samples)
    return train_set, eval_sets, test_sets


def load_classifier(args: Arguments) -> Classifier:
    """Reads the model for the task of the flags.

    Raises:
      UserError: if it cannot be had, does not fit, or the task is unknown.
    """
    directory = hub.resolve_model(args.model_name_or_path)
    config = pretrained.read_config(directory)
    task = splits.find_task(args, config)
    known = list((config.id2label or {}).values())
    names = list(task.label_names)
    if sorted(known) == sorted(names):
        names = known
    model = pretrained.load_pretrained(
        directory, _MODEL_CLASS, label_names=names, seed=args.seed
    )
    if args.task_name is None:
        model.notes.append(
            f"Texts are {' and '.join(task.text_columns)}, labels "
            f"{'numbers' if task.is_regression else ', '.join(names)}."
        )
    if task.is_regression:
        model.config.problem_type = "regression"
    if args.max_seq_length > model.config.max_position_embeddings:
        raise UserError(
            f"--max_seq_length {args.max_seq_length} is more than the "
            f"{model.config.max_position_embeddings} positions of the model."
        )
    apply = modeling.make_apply(
        model.config, _MODEL_CLASS, dtype=jnp.bfloat16 if args.bf16 else None
    )
    return Classifier(
        args,
        task,
        model,
        apply,
        training.make_eval_step(apply, is_regression=task.is_regression),
        [args.max_seq_length]
        if args.pad_to_max_length
        else data.batch_lengths(args.max_seq_length),
        np.array([names.index(name) for name in task.label_names], np.int32),
    )


def _features(classifier: Classifier, split: splits.Split) -> data.Features:
    args, task, labels = classifier.args, classifier.task, split.labels
    return data.tokenize(
        split.dataset,
        classifier.model.tokenizer,
        task.text_columns,
        {"labels": labels if task.is_regression else classifier.model_labels[labels]},
        args.max_seq_length,
        overwrite_cache=args.overwrite_cache,
    )


def plan_training(classifier: Classifier, split: splits.Split) -> trainer.Run:
    """Tokenises the split, and prepares everything but the first step.

    Raises:
      UserError: for an optimizer that does not exist, cannot be used or does not fit.
    """
    args, model = classifier.args, classifier.model
    batch_size = args.per_device_train_batch_size * args.gradient_accumulation_steps
    num_steps = args.max_steps
    if num_steps < 0:
        steps_per_epoch = math.ceil(len(split.labels) / batch_size)
        num_steps = math.ceil(args.num_train_epochs * steps_per_epoch)
    max_rows = {
        "word_embeddings": batch_size * args.max_seq_length,
        "position_embeddings": args.max_seq_length,
    }
    # With the bound that always holds, to refuse a bad flag before a long wait.
    optimizers.make_optimizer(args, num_steps, max_rows)
    features = _features(classifier, split)
    train_data = data.TrainData(
        features, batch_size, num_steps, classifier.lengths, args.seed
    )
    survey = data.survey(train_data)
    max_rows = {
        "word_embeddings": survey.max_distinct_tokens,
        "position_embeddings": survey.lengths[-1],
    }
    optimizer = optimizers.make_optimizer(args, num_steps, max_rows)
    optimizers.check_update(optimizer, model.params)
    optimizers.check_memory(optimizer, model.params)
    if args.report_to == "tensorboard":
        reporting.require_tensorboard()
    make_loss = (
        training.regression_loss
        if classifier.task.is_regression
        else training.classification_loss
    )
    return trainer.Run(
        args,
        model,
        _MODEL_CLASS,
        make_loss(classifier.apply),
        optimizer,
        train_data,
        survey.lengths,
        evaluate=None,
    )


def _train(train_run: trainer.Run, out: Path) -> trainer.Trained:
    args, train_data, optimizer = (
        train_run.args,
        train_run.train_data,
        train_run.optimizer,
    )
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
    resume_from = output_dir.checkpoints_to_resume(args, out)
    return trainer.fit(train_run, out, resume_from)


def _evaluate(
    classifier: Classifier,
    eval_features: Mapping[str, data.Features],
    params: modeling.Params,
) -> dict[str, float]:
    """Evaluates on every example once; returns results under Hugging Face's keys."""
    task, results = classifier.task, {}
    for split, features in eval_features.items():
        started = time.perf_counter()
        losses, predictions = _predict(classifier, params, features)
        labels = _in_data(classifier, features.targets["labels"])
        seconds = time.perf_counter() - started
        size = len(losses)
        num_batches = math.ceil(size / classifier.args.per_device_eval_batch_size)
        values = {
            "loss": float(losses.mean()),
            **metrics.glue_metrics(task.metrics, labels, predictions),
            "samples": size,
            "runtime": seconds,
            "samples_per_second": size / seconds,
            "steps_per_second": num_batches / seconds,
        }
        ending = task.eval_splits[split]
        results |= {f"eval_{name}{ending}": value for name, value in values.items()}
    return results


def _predict(
    classifier: Classifier, params: modeling.Params, features: data.Features
) -> tuple[np.ndarray, np.ndarray]:
    """Returns losses and predictions, these in the labels of the data."""
    batch_size = classifier.args.per_device_eval_batch_size
    losses, predictions = training.predict(
        params,
        classifier.eval_step,
        data.prefetch(data.eval_batches(features, batch_size, classifier.lengths)),
        features.num_examples,
    )
    return losses, _in_data(classifier, predictions)


def _in_data(classifier: Classifier, labels: np.ndarray) -> np.ndarray:
    """Returns the model's labels, or predictions, as they are in the data."""
    if classifier.task.is_regression:
        return labels
    return np.argsort(classifier.model_labels)[labels]


def _add_results(path: Path, results: Mapping[str, float]) -> None:
    """Writes results beside those of earlier runs on the same model."""
    earlier = json.loads(path.read_text()) if path.exists() else {}
    reporting.write_json(path, {**earlier, **results})


def _write_predictions(
    classifier: Classifier,
    params: modeling.Params,
    features: data.Features,
    path: Path,
) -> None:
    """Writes the predictions as GLUE takes them."""
    task = classifier.task
    _, predictions = _predict(classifier, params, features)
    if task.is_regression:
        if task.label_range is not None:
            predictions = np.clip(predictions, *task.label_range)
        shown = [f"{value:.6g}" for value in predictions]
    elif task.writes_names:
        shown = [task.label_names[label] for label in predictions]
    else:
        shown = [str(label) for label in predictions]
    lines = ["index\tprediction", *(f"{i}\t{value}" for i, value in enumerate(shown))]
    path.write_text("\n".join(lines) + "\n", encoding="utf-8")
    print(f"Predictions are in {path}.")


def _write_reports(
    classifier: Classifier,
    train_run: trainer.Run,
    command: str,
    out: Path,
    results: Mapping[str, float],
) -> None:
    args, optimizer = classifier.args, train_run.optimizer
    lines = reporting.read_json_lines(out / training_log.FILE)
    names = [n for n in _result_names(classifier.task) if "combined" not in n]
    reporting.plot_curves(
        out / "curves.png",
        f"{args.task_name or Path(args.train_file or '').stem}, {optimizer.name}",
        {optimizer.name: lines},
        names,
    )
    model_card.write_model_card(
        out / "README.md",
        model_name=args.model_name_or_path,
        dataset=args.train_file or args.dataset_name,
        task=args.task_name,
        optimizer=optimizer.name,
        metrics=names,
        results=results,
        hyperparams={
            **model_card.named_flags(args),
            "learning_rate": optimizer.hyperparams["lr"],
            optimizer.name: optimizer.hyperparams,
        },
        command=command,
        lines=lines,
    )
