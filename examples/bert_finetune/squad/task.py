"""The task of run_qa: questions about texts."""

import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from bert_finetune import hub
from bert_finetune.arguments import QaArguments
from bert_finetune.data.batches import eval_batches, prefetch
from bert_finetune.data.features import Features
from bert_finetune.errors import UserError
from bert_finetune.files import write_json
from bert_finetune.model import bert, pretrained
from bert_finetune.squad import metrics
from bert_finetune.squad.answers import Answer, find_answers
from bert_finetune.squad.chunks import Chunks, answer_positions, cut
from bert_finetune.squad.questions import Questions, full_name, load_split
from bert_finetune.training import losses
from bert_finetune.training.task import (
    Description,
    check_flags,
    padded_lengths,
    speed,
)

_MODEL_CLASS = bert.BertForQuestionAnswering
_METRICS = {False: ["exact_match", "f1"], True: ["exact", "f1"]}
# What else of an evaluation the best model may be chosen by.
_GROUPS = ["HasAns_exact", "HasAns_f1", "NoAns_exact", "NoAns_f1"]


class QuestionAnswering:
    """A model that finds answers, with its data; implements `training.task.Task`.

    Args:
      args: the flags.

    Raises:
      UserError: for a model, files or data that cannot be used.
    """

    def __init__(self, args: QaArguments):
        directory = hub.resolve_model(args.model_name_or_path)
        model = pretrained.load_pretrained(directory, _MODEL_CLASS, seed=args.seed)
        self.args, self.model = args, model
        groups = _GROUPS if args.version_2_with_negative else []
        check_flags(args, model, [*_METRICS[args.version_2_with_negative], *groups])
        apply = bert.make_apply(
            model.config, _MODEL_CLASS, dtype=jnp.bfloat16 if args.bf16 else None
        )
        self.loss = losses.span_loss(apply)
        self._span_step = make_span_step(apply)
        if args.do_train:
            self._train = load_split(args, "train", args.max_train_samples)
        if args.do_eval:
            questions = load_split(args, "validation", args.max_eval_samples)
            self._check_group_of_best_metric(questions)
            self._eval = questions, self._cut(questions)
        if args.do_predict:
            questions = load_split(args, "test", args.max_predict_samples)
            self._test = questions, self._cut(questions)

    def _check_group_of_best_metric(self, questions: Questions) -> None:
        name = self.args.metric_for_best_model
        group = name.removeprefix("eval_").split("_")[0]
        wanted = {"HasAns": True, "NoAns": False}.get(group)
        if wanted is not None and wanted not in map(bool, questions.answers()):
            raise UserError(
                f"--metric_for_best_model {name}: no question of the evaluation data "
                f"has {'an' if wanted else 'no'} answer."
            )

    def _cut(self, questions: Questions) -> Chunks:
        return cut(
            questions.dataset,
            self.model.tokenizer,
            self.args.max_seq_length,
            self.args.doc_stride,
            overwrite_cache=self.args.overwrite_cache,
        )

    def train_features(self) -> Features:
        """Returns the tokenized chunks of the training split, with their answers."""
        chunks = self._cut(self._train)
        targets = answer_positions(chunks, self._train.spans)
        return chunks.features._replace(targets=targets)

    def describe(self) -> Description:
        """Returns what to call the run in its reports."""
        args = self.args
        return Description(
            args.data_name,
            args.train_file or full_name(args.dataset_name or ""),
            args.dataset_config_name,
            _METRICS[args.version_2_with_negative],
            "question-answering",
        )

    def evaluate(self, params: bert.Params) -> dict[str, float]:
        """Answers every question once; returns results under Hugging Face's keys.

        ``samples`` are the chunks, as there; ``total`` are the questions.
        """
        started = time.perf_counter()
        questions, chunks = self._eval
        found = self._answers(questions, chunks, params)
        seconds = time.perf_counter() - started
        _write(questions, found, Path(self.args.output_dir), "")
        golds, texts = questions.answers(), [answer.text for answer in found]
        if self.args.version_2_with_negative:
            values = metrics.squad_v2_metrics(
                golds,
                texts,
                [answer.best_text for answer in found],
                [a.null_odds for a in found if a.null_odds is not None],
            )
        else:
            values = metrics.squad_metrics(golds, texts)
        num_chunks = chunks.features.num_examples
        values |= speed(seconds, num_chunks, self.args.per_device_eval_batch_size)
        return {f"eval_{name}": value for name, value in values.items()}

    def predict(self, params: bert.Params) -> None:
        """Writes the answers to the test questions."""
        questions, chunks = self._test
        directory = Path(self.args.output_dir)
        found = self._answers(questions, chunks, params)
        _write(questions, found, directory, "predict_")
        print(f"Predictions are in {directory / 'predict_predictions.json'}.")

    def _answers(
        self, questions: Questions, chunks: Chunks, params: bert.Params
    ) -> list[Answer]:
        args = self.args
        start_logits, end_logits = self._logits(chunks.features, params)
        threshold = args.null_score_diff_threshold
        return find_answers(
            questions.dataset["context"][:],
            chunks,
            start_logits,
            end_logits,
            n_best_size=args.n_best_size,
            max_answer_length=args.max_answer_length,
            null_threshold=threshold if args.version_2_with_negative else None,
        )

    def _logits(self, features: Features, params: bert.Params) -> list[np.ndarray]:
        """Returns start and end logits of all tokens, in the order of the features."""
        batch_size = self.args.per_device_eval_batch_size
        batches = eval_batches(features, batch_size, padded_lengths(self.args))
        is_token, outputs = [], []
        for batch in prefetch(batches):
            weights = batch["weights"][:, None]
            is_token.append((batch["attention_mask"] == 1) & (weights == 1))
            outputs.append(self._span_step(params, batch))
        logits = [
            np.concatenate(
                [np.asarray(part)[m] for part, m in zip(parts, is_token, strict=True)]
            )
            for parts in zip(*outputs, strict=True)
        ]
        if not np.all(np.isfinite(logits)):
            raise UserError(
                "the logits of the model are not finite: it finds no answers."
            )
        return logits


def _write(
    questions: Questions, found: Sequence[Answer], directory: Path, prefix: str
) -> None:
    """Writes the answers as Hugging Face's script does, an object by question."""
    contents = {
        "predictions": [answer.text for answer in found],
        "nbest_predictions": [answer.n_best for answer in found],
        "null_odds": [answer.null_odds for answer in found],
    }
    if found[0].null_odds is None:
        del contents["null_odds"]
    for name, values in contents.items():
        path = directory / f"{prefix}{name}.json"
        write_json(path, dict(zip(questions.dataset["id"], values, strict=True)))


def make_span_step(apply: bert.Apply) -> Callable[..., Any]:
    """Returns the jitted ``(params, batch) -> (start_logits, end_logits)``."""

    @jax.jit
    def span_step(params, batch):
        return jax.tree.map(losses.full_precision, apply(params, batch, None))

    return span_step
