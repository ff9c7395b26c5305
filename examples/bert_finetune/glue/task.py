"""Fine-tuning on a GLUE task or on files of one's own, from flags to results."""

import functools
import math
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import jax.numpy as jnp
import numpy as np

from bert_finetune import finetune, hub
from bert_finetune.arguments import GlueArguments
from bert_finetune.data.batches import eval_batches, prefetch
from bert_finetune.data.features import Features, tokenize
from bert_finetune.glue import metrics, splits
from bert_finetune.glue.tasks import Task
from bert_finetune.model import bert, pretrained
from bert_finetune.training import loop
from bert_finetune.training.losses import classification_loss, regression_loss
from bert_finetune.training.steps import make_eval_step, predict

_MODEL_CLASS = bert.BertForSequenceClassification


class Classifier(NamedTuple):
    """A model and its task.

    Attributes:
      args: the flags.
      task: of the flags.
      model: as read.
      apply: the model as a function.
      eval_step: from :func:`make_eval_step`.
      model_labels: the model's label for each label of the data. A model that knows the
        task's labels in another order keeps its own.
    """

    args: GlueArguments
    task: Task
    model: pretrained.Pretrained
    apply: bert.Apply
    eval_step: Callable[..., Any]
    model_labels: np.ndarray


def run(args: GlueArguments, command: str) -> dict[str, float]:
    """Trains, evaluates and predicts as the flags say; returns what evaluation found.

    Args:
      args: the flags.
      command: what was typed, for the model card.

    Raises:
      UserError: for anything in the flags, the files or the data that cannot be used.
    """
    classifier = load_classifier(args)
    task = classifier.task
    train_set, eval_sets, test_sets = _load_splits(args, task)
    train_run = None
    if train_set is not None:
        train_run = plan_training(classifier, train_set)
    eval_features, test_features = (
        {name: _features(classifier, split_set) for name, split_set in sets.items()}
        for sets in (eval_sets, test_sets)
    )
    return finetune.run(
        args,
        command,
        classifier.model,
        finetune.Report(
            args.data_name,
            args.train_file or args.dataset_name,
            args.task_name,
            [name for name in _result_names(task) if "combined" not in name],
            "text-classification",
        ),
        train_run=train_run,
        evaluate=functools.partial(_evaluate, classifier, eval_features)
        if eval_features
        else None,
        predict=functools.partial(_write_predictions, classifier, test_features)
        if test_features
        else None,
    )


def _result_names(task: Task) -> list[str]:
    """Returns the names of the metrics over all evaluation splits."""
    names = [*task.metrics, *(["combined_score"] if len(task.metrics) > 1 else [])]
    return [name + ending for ending in task.eval_splits.values() for name in names]


def _load_splits(
    args: GlueArguments, task: Task
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


def load_classifier(args: GlueArguments) -> Classifier:
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
    finetune.check_flags(args, model, ["loss", *_result_names(task)])
    apply = bert.make_apply(
        model.config, _MODEL_CLASS, dtype=jnp.bfloat16 if args.bf16 else None
    )
    return Classifier(
        args,
        task,
        model,
        apply,
        make_eval_step(apply, is_regression=task.is_regression),
        np.array([names.index(name) for name in task.label_names], np.int32),
    )


def _features(classifier: Classifier, split: splits.Split) -> Features:
    args, task, labels = classifier.args, classifier.task, split.labels
    return tokenize(
        split.dataset,
        classifier.model.tokenizer,
        task.text_columns,
        {"labels": labels if task.is_regression else classifier.model_labels[labels]},
        args.max_seq_length,
        overwrite_cache=args.overwrite_cache,
    )


def plan_training(classifier: Classifier, split: splits.Split) -> loop.Run:
    """Tokenises the split, and prepares everything but the first step.

    Raises:
      UserError: for an optimizer that does not exist, cannot be used or does not fit.
    """
    make_loss = (
        regression_loss if classifier.task.is_regression else classification_loss
    )
    return finetune.plan_training(
        classifier.args,
        classifier.model,
        _MODEL_CLASS,
        make_loss(classifier.apply),
        functools.partial(_features, classifier, split),
    )


def _evaluate(
    classifier: Classifier,
    eval_features: Mapping[str, Features],
    params: bert.Params,
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
    classifier: Classifier, params: bert.Params, features: Features
) -> tuple[np.ndarray, np.ndarray]:
    """Returns losses and predictions, these in the labels of the data."""
    batch_size = classifier.args.per_device_eval_batch_size
    lengths = finetune.padded_lengths(classifier.args)
    losses, predictions = predict(
        params,
        classifier.eval_step,
        prefetch(eval_batches(features, batch_size, lengths)),
        features.num_examples,
    )
    return losses, _in_data(classifier, predictions)


def _in_data(classifier: Classifier, labels: np.ndarray) -> np.ndarray:
    """Returns the model's labels, or predictions, as they are in the data."""
    if classifier.task.is_regression:
        return labels
    return np.argsort(classifier.model_labels)[labels]


def _write_predictions(
    classifier: Classifier,
    test_features: Mapping[str, Features],
    params: bert.Params,
) -> None:
    """Writes the predictions as GLUE takes them."""
    task = classifier.task
    for split, features in test_features.items():
        _, predictions = _predict(classifier, params, features)
        if task.is_regression:
            if task.label_range is not None:
                predictions = np.clip(predictions, *task.label_range)
            shown = [f"{value:.6g}" for value in predictions]
        elif task.writes_names:
            shown = [task.label_names[label] for label in predictions]
        else:
            shown = [str(label) for label in predictions]
        rows = [f"{i}\t{value}" for i, value in enumerate(shown)]
        path = Path(classifier.args.output_dir, task.test_splits[split])
        path.write_text("\n".join(["index\tprediction", *rows, ""]), encoding="utf-8")
        print(f"Predictions are in {path}.")
