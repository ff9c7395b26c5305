"""The task of run_qa: extractive question answering."""

import time
from collections.abc import Sequence
from pathlib import Path

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
from bert_finetune.reporting.model_card import Description
from bert_finetune.squad import metrics
from bert_finetune.squad.answers import Answer, find_answers
from bert_finetune.squad.chunks import Chunks, answer_positions, cut
from bert_finetune.squad.questions import Questions, full_name, load_split
from bert_finetune.training import devices, losses
from bert_finetune.training.task import (
    check_flags,
    eval_batch_size,
    padded_lengths,
    speed,
)

_MODEL_CLASS = bert.BertForQuestionAnswering
_METRICS = {False: ["exact_match", "f1"], True: ["exact", "f1"]}
# Metrics of SQuAD 2 that can also select the best model.
_GROUPS = ["HasAns_exact", "HasAns_f1", "NoAns_exact", "NoAns_f1"]


class QuestionAnswering:
    """Question answering with its data; implements `training.task.Task`."""

    def __init__(self, args: QaArguments):
        directory = hub.resolve_model(args.model_name_or_path)
        model = pretrained.load_pretrained(
            directory,
            _MODEL_CLASS,
            seed=args.seed,
            ignore_mismatched_sizes=args.ignore_mismatched_sizes,
        )
        pretrained.check_pairs(model.config, directory)
        model.config.problem_type = None
        self.args, self.model = args, model
        groups = _GROUPS if args.version_2_with_negative else []
        check_flags(args, model, [*_METRICS[args.version_2_with_negative], *groups])
        apply = bert.make_apply(
            model.config, _MODEL_CLASS, dtype=jnp.bfloat16 if args.bf16 else None
        )
        self.loss = losses.span_loss(apply)
        self._span_logits = devices.spread(losses.span_logits(apply))
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
        for group, has_answer in {"HasAns_": True, "NoAns_": False}.items():
            if group in name and has_answer not in map(bool, questions.answers):
                raise UserError(
                    f"--metric_for_best_model {name} needs questions "
                    f"{'with' if has_answer else 'without'} answers in the evaluation "
                    "data, which has none."
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
        """Returns the names that reports use for the run."""
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

        ``samples`` counts chunks, as in their scripts; ``total`` counts questions.
        """
        args, (questions, chunks) = self.args, self._eval
        started = time.perf_counter()
        found = self._answers(questions, chunks, params)
        seconds = time.perf_counter() - started
        self._write(questions, found, "")
        golds, texts = questions.answers, [answer.text for answer in found]
        if args.version_2_with_negative:
            best_texts = [answer.best_text for answer in found]
            odds = [a.null_odds for a in found if a.null_odds is not None]
            values = metrics.squad_v2_metrics(golds, texts, best_texts, odds)
        else:
            values = metrics.squad_metrics(golds, texts)
        num_chunks = chunks.features.num_examples
        values |= speed(seconds, num_chunks, eval_batch_size(args))
        return {f"eval_{name}": value for name, value in values.items()}

    def predict(self, params: bert.Params) -> None:
        """Writes the answers to the test questions."""
        questions, chunks = self._test
        self._write(questions, self._answers(questions, chunks, params), "predict_")
        path = Path(self.args.output_dir, "predict_predictions.json")
        print(f"Predictions are in {path}.")

    def _answers(
        self, questions: Questions, chunks: Chunks, params: bert.Params
    ) -> list[Answer]:
        args = self.args
        batch_size, lengths = eval_batch_size(args), padded_lengths(args)
        is_token, outputs = [], []
        for batch in prefetch(eval_batches(chunks.features, batch_size, lengths)):
            is_row = batch["weights"][:, None] == 1
            is_token.append((batch["attention_mask"] == 1) & is_row)
            outputs.append(self._span_logits(params, batch))
        # Logits of all tokens without padding, in the order of the chunks.
        logits = [
            np.concatenate([p[m] for p, m in zip(parts, is_token, strict=True)])
            for parts in zip(*jax.device_get(outputs), strict=True)
        ]
        if not np.all(np.isfinite(logits)):
            raise UserError("the model's logits are not finite; it cannot be used.")
        threshold = args.null_score_diff_threshold
        return find_answers(
            questions.dataset["context"][:],
            chunks,
            *logits,
            n_best_size=args.n_best_size,
            max_answer_length=args.max_answer_length,
            null_threshold=threshold if args.version_2_with_negative else None,
        )

    def _write(
        self, questions: Questions, found: Sequence[Answer], prefix: str
    ) -> None:
        """Writes the answers by question id, in the files of Hugging Face's script."""
        contents = {
            "predictions": [answer.text for answer in found],
            "nbest_predictions": [answer.n_best for answer in found],
        }
        if self.args.version_2_with_negative:
            contents["null_odds"] = [answer.null_odds for answer in found]
        for name, values in contents.items():
            path = Path(self.args.output_dir, f"{prefix}{name}.json")
            write_json(path, dict(zip(questions.dataset["id"], values, strict=True)))
