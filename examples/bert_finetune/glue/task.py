"""The task of run_glue: classification or regression, on GLUE or your own files."""

import time
from collections.abc import Mapping
from pathlib import Path

import jax.numpy as jnp
import numpy as np
from transformers import BertConfig

from bert_finetune import hub
from bert_finetune.arguments import GlueArguments
from bert_finetune.data.batches import eval_batches, prefetch
from bert_finetune.data.features import Features, tokenize
from bert_finetune.errors import UserError
from bert_finetune.files import write_text
from bert_finetune.glue import labels, splits
from bert_finetune.glue.metrics import glue_metrics
from bert_finetune.glue.tasks import GlueTask
from bert_finetune.model import bert, pretrained
from bert_finetune.reporting.model_card import Description
from bert_finetune.training import devices, losses
from bert_finetune.training.task import (
    check_flags,
    eval_batch_size,
    padded_lengths,
    speed,
)

_MODEL_CLASS = bert.BertForSequenceClassification
# Hugging Face's names for the loss.
_PROBLEM_TYPES = {False: "single_label_classification", True: "regression"}


class Classification:
    """Classification or regression with its data; implements `training.task.Task`."""

    def __init__(self, args: GlueArguments):
        directory = hub.resolve_model(args.model_name_or_path)
        config = pretrained.read_config(directory)
        task = splits.find_task(args, config)
        names, order, notes = _labels_of_model(args, config, task)
        model = pretrained.load_pretrained(
            directory,
            _MODEL_CLASS,
            label_names=names,
            seed=args.seed,
            task=f"{_data_of(args)} ({len(names)} label{'s' * (len(names) > 1)})",
            ignore_mismatched_sizes=args.ignore_mismatched_sizes,
        )
        model.notes.extend(notes)
        if len(task.text_columns) > 1:
            pretrained.check_pairs(model.config, directory)
        # Later evaluations and predictions need these.
        model.config.update(
            {
                "problem_type": _PROBLEM_TYPES[task.is_regression],
                "finetuning_task": args.task_name,
                "text_columns": list(task.text_columns),
            }
        )
        self.args, self.model, self._task = args, model, task
        check_flags(args, model, ["loss", *self._result_names()])
        apply = bert.make_apply(
            model.config, _MODEL_CLASS, dtype=jnp.bfloat16 if args.bf16 else None
        )
        options = {"is_regression": task.is_regression}
        self.loss = losses.label_loss(apply, **options)
        self._scores = devices.spread(losses.label_scores(apply, **options))
        # Index of the model's label, by the data's label index.
        self._model_labels = np.array(order)
        self._load_splits()

    def _load_splits(self) -> None:
        """Loads the splits that the flags need, so that bad data fails early."""
        args, task = self.args, self._task

        def load(names: Mapping[str, str], file: str | None, max_samples: int | None):
            # A file is a single split, even if the task has several.
            chosen = list(names)[:1] if file is not None else names
            return {
                name: splits.load_split(args, task, name, max_samples)
                for name in chosen
            }

        self._eval_features, self._test_features = {}, {}
        if args.do_train:
            self._train = splits.load_split(args, task, "train", args.max_train_samples)
        if args.do_eval:
            found = load(task.eval_splits, args.validation_file, args.max_eval_samples)
            self._eval_features = {k: self._features(v) for k, v in found.items()}
        if args.do_predict:
            found = load(task.test_splits, args.test_file, args.max_predict_samples)
            self._test_features = {k: self._features(v) for k, v in found.items()}

    def _features(self, split: splits.Split) -> Features:
        targets = split.labels
        if not self._task.is_regression:
            targets = self._model_labels[targets].astype(np.int32)
        return tokenize(
            split.dataset,
            self.model.tokenizer,
            self._task.text_columns,
            {"labels": targets},
            self.args.max_seq_length,
            overwrite_cache=self.args.overwrite_cache,
        )

    def train_features(self) -> Features:
        """Returns the tokenized training split."""
        return self._features(self._train)

    def _result_names(self) -> list[str]:
        """Returns the metric names of all evaluation splits."""
        names, task = list(self._task.metrics), self._task
        names += ["combined_score"] if len(names) > 1 else []
        return [name + ending for ending in task.eval_splits.values() for name in names]

    def describe(self) -> Description:
        """Returns the names that reports use for the run."""
        return Description(
            self.args.data_name,
            self.args.train_file or self.args.dataset_name or "",
            self.args.task_name,
            [name for name in self._result_names() if "combined" not in name],
            "text-classification",
        )

    def evaluate(self, params: bert.Params) -> dict[str, float]:
        """Evaluates every example once; returns results under Hugging Face's keys."""
        task, results = self._task, {}
        for split, features in self._eval_features.items():
            started = time.perf_counter()
            losses_, predictions = self._predictions(params, features)
            labels = self._in_data(features.targets["labels"])
            seconds = time.perf_counter() - started
            batch_size = eval_batch_size(self.args)
            values = {
                "loss": float(losses_.mean()),
                **glue_metrics(task.metrics, labels, predictions),
                **speed(seconds, features.num_examples, batch_size),
            }
            ending = task.eval_splits[split]
            results |= {f"eval_{name}{ending}": value for name, value in values.items()}
        return results

    def _predictions(
        self, params: bert.Params, features: Features
    ) -> tuple[np.ndarray, np.ndarray]:
        """Returns losses, and predictions as label indices of the data."""
        batch_size, lengths = eval_batch_size(self.args), padded_lengths(self.args)
        batches = eval_batches(features, batch_size, lengths)
        found = [self._scores(params, batch) for batch in prefetch(batches)]
        # The last batch is padded.
        losses_, predictions = (
            np.concatenate(column)[: features.num_examples]
            for column in zip(*found, strict=True)
        )
        if not np.all(np.isfinite(losses_)):
            raise UserError("the model's logits are not finite; it cannot be used.")
        return losses_, self._in_data(predictions)

    def _in_data(self, labels: np.ndarray) -> np.ndarray:
        """Converts the model's label indices to the data's; keeps regression values."""
        if self._task.is_regression:
            return labels
        return np.argsort(self._model_labels)[labels]

    def predict(self, params: bert.Params) -> None:
        """Writes the predictions in GLUE's format."""
        task = self._task
        for split, features in self._test_features.items():
            _, predictions = self._predictions(params, features)
            if task.is_regression:
                if task.label_range is not None:
                    predictions = np.clip(predictions, *task.label_range)
                shown = [f"{value:.6g}" for value in predictions]
            elif task.writes_names:
                shown = [task.label_names[label] for label in predictions]
            else:
                shown = [str(label) for label in predictions]
            rows = [f"{i}\t{value}" for i, value in enumerate(shown)]
            path = Path(self.args.output_dir, task.test_splits[split])
            write_text(path, "\n".join(["index\tprediction", *rows, ""]))
            print(f"Predictions are in {path}.")


def _data_of(args: GlueArguments) -> str:
    files = (args.validation_file, args.test_file)
    return args.data_name or next(file for file in files if file is not None)


def _labels_of_model(
    args: GlueArguments, config: BertConfig, task: GlueTask
) -> tuple[list[str], list[int], list[str]]:
    """Returns the model's label names, the index of each task label in them, and notes.

    A model that has the task's labels in another order or case keeps its own.
    """
    known, names, notes = labels.names_of(config), list(task.label_names), []
    labels.check_names(names, _data_of(args))
    if args.task_name is None:
        shown = "numbers" if task.is_regression else ", ".join(names)
        texts = " and ".join(task.text_columns)
        notes.append(f"Text columns: {texts}. Labels: {shown}.")
    order, is_generic = labels.match(names, known), labels.are_generic(known)
    if task.is_regression and len(known) == 1:  # Its name does not matter.
        order = [0]
    if order is None and not is_generic:
        notes.append(
            f"The labels of the model ({', '.join(known)}) differ from the labels of "
            f"{_data_of(args)} ({', '.join(names)})."
        )
    if order is None:
        return names, list(range(len(names))), notes
    return [names[i] for i in np.argsort(order)] if is_generic else known, order, notes
