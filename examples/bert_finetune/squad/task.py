"""Fine-tuning on questions about texts, from flags to results."""

import functools
import math
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import jax.numpy as jnp
import numpy as np

from bert_finetune import finetune, hub
from bert_finetune.arguments import QaArguments
from bert_finetune.data.batches import eval_batches, prefetch
from bert_finetune.data.features import Features
from bert_finetune.errors import UserError
from bert_finetune.files import write_json
from bert_finetune.model import bert, pretrained
from bert_finetune.squad import answers, chunks, metrics
from bert_finetune.squad.questions import Questions, full_name, load_split
from bert_finetune.training.losses import span_loss
from bert_finetune.training.steps import make_span_step

_MODEL_CLASS = bert.BertForQuestionAnswering
_METRICS = {False: ["exact_match", "f1"], True: ["exact", "f1"]}
# What else of an evaluation the best model may be chosen by.
_GROUPS = ["HasAns_exact", "HasAns_f1", "NoAns_exact", "NoAns_f1"]


class Reader(NamedTuple):
    """A model that finds answers.

    Attributes:
      args: the flags.
      model: as read.
      apply: the model as a function.
      span_step: from :func:`make_span_step`.
    """

    args: QaArguments
    model: pretrained.Pretrained
    apply: bert.Apply
    span_step: Callable[..., Any]


def run(args: QaArguments, command: str) -> dict[str, float]:
    """Trains, evaluates and predicts as the flags say; returns what evaluation found.

    Args:
      args: the flags.
      command: what was typed, for the model card.

    Raises:
      UserError: for anything in the flags, the files or the data that cannot be used.
    """
    reader = _load_reader(args)
    train_set, eval_set, test_set = (
        load_split(args, split, max_samples) if wanted else None
        for split, wanted, max_samples in (
            ("train", args.do_train, args.max_train_samples),
            ("validation", args.do_eval, args.max_eval_samples),
            ("test", args.do_predict, args.max_predict_samples),
        )
    )
    if eval_set is not None:
        _check_group_of_best_metric(args, eval_set)
    train_run = None
    if train_set is not None:
        train_run = finetune.plan_training(
            args,
            reader.model,
            _MODEL_CLASS,
            span_loss(reader.apply),
            functools.partial(_train_features, reader, train_set),
        )
    evaluate = predict = None
    if eval_set is not None:
        evaluate = functools.partial(
            _evaluate, reader, eval_set, _cut(reader, eval_set)
        )
    if test_set is not None:
        predict = functools.partial(_predict, reader, test_set, _cut(reader, test_set))
    return finetune.run(
        args,
        command,
        reader.model,
        _report(args),
        train_run=train_run,
        evaluate=evaluate,
        predict=predict,
    )


def _load_reader(args: QaArguments) -> Reader:
    """Reads the model that the flags name.

    Raises:
      UserError: if it cannot be had or does not fit the flags.
    """
    directory = hub.resolve_model(args.model_name_or_path)
    model = pretrained.load_pretrained(directory, _MODEL_CLASS, seed=args.seed)
    known = _METRICS[args.version_2_with_negative]
    if args.version_2_with_negative:
        known = known + _GROUPS
    finetune.check_flags(args, model, known)
    apply = bert.make_apply(
        model.config, _MODEL_CLASS, dtype=jnp.bfloat16 if args.bf16 else None
    )
    return Reader(args, model, apply, make_span_step(apply))


def _check_group_of_best_metric(args: QaArguments, eval_set: Questions) -> None:
    group = args.metric_for_best_model.removeprefix("eval_").split("_")[0]
    wanted = {"HasAns": True, "NoAns": False}.get(group)
    if wanted is not None and wanted not in map(bool, eval_set.answers()):
        raise UserError(
            f"--metric_for_best_model {args.metric_for_best_model}: no question of the "
            f"evaluation data has {'an' if wanted else 'no'} answer."
        )


def _report(args: QaArguments) -> finetune.Report:
    return finetune.Report(
        args.data_name,
        args.train_file or full_name(args.dataset_name or ""),
        args.dataset_config_name,
        _METRICS[args.version_2_with_negative],
        "question-answering",
    )


def _cut(reader: Reader, questions: Questions) -> chunks.Chunks:
    args = reader.args
    return chunks.cut(
        questions.dataset,
        reader.model.tokenizer,
        args.max_seq_length,
        args.doc_stride,
        overwrite_cache=args.overwrite_cache,
    )


def _train_features(reader: Reader, questions: Questions) -> Features:
    pieces = _cut(reader, questions)
    targets = chunks.answer_positions(pieces, questions.spans)
    return pieces.features._replace(targets=targets)


def _evaluate(
    reader: Reader,
    questions: Questions,
    pieces: chunks.Chunks,
    params: bert.Params,
) -> dict[str, float]:
    """Answers every question once; returns results under Hugging Face's keys.

    ``samples`` are the chunks, as there; ``total`` are the questions.
    """
    args = reader.args
    started = time.perf_counter()
    found = _answer(reader, questions, pieces, params)
    seconds = time.perf_counter() - started
    _write(questions, found, Path(args.output_dir), "")
    golds, texts = questions.answers(), [answer.text for answer in found]
    if args.version_2_with_negative:
        values = metrics.squad_v2_metrics(
            golds,
            texts,
            [answer.best_text for answer in found],
            [a.null_odds for a in found if a.null_odds is not None],
        )
    else:
        values = metrics.squad_metrics(golds, texts)
    num_chunks = pieces.features.num_examples
    num_batches = math.ceil(num_chunks / args.per_device_eval_batch_size)
    values |= {
        "samples": num_chunks,
        "runtime": seconds,
        "samples_per_second": num_chunks / seconds,
        "steps_per_second": num_batches / seconds,
    }
    return {f"eval_{name}": value for name, value in values.items()}


def _predict(
    reader: Reader,
    questions: Questions,
    pieces: chunks.Chunks,
    params: bert.Params,
) -> None:
    directory = Path(reader.args.output_dir)
    found = _answer(reader, questions, pieces, params)
    _write(questions, found, directory, "predict_")
    print(f"Predictions are in {directory / 'predict_predictions.json'}.")


def _answer(
    reader: Reader,
    questions: Questions,
    pieces: chunks.Chunks,
    params: bert.Params,
) -> list[answers.Answer]:
    args = reader.args
    start_logits, end_logits = _logits(reader, pieces.features, params)
    return answers.find_answers(
        questions.dataset["context"][:],
        pieces,
        start_logits,
        end_logits,
        n_best_size=args.n_best_size,
        max_answer_length=args.max_answer_length,
        null_threshold=args.null_score_diff_threshold
        if args.version_2_with_negative
        else None,
    )


def _logits(
    reader: Reader, features: Features, params: bert.Params
) -> list[np.ndarray]:
    """Returns start and end logits of all tokens, as they lie in the features."""
    args = reader.args
    batches = eval_batches(
        features, args.per_device_eval_batch_size, finetune.padded_lengths(args)
    )
    is_token, outputs = [], []
    for batch in prefetch(batches):
        is_token.append(
            (batch["attention_mask"] == 1) & (batch["weights"][:, None] == 1)
        )
        outputs.append(reader.span_step(params, batch))
    logits = [
        np.concatenate(
            [np.asarray(part)[mask] for part, mask in zip(parts, is_token, strict=True)]
        )
        for parts in zip(*outputs, strict=True)
    ]
    if not np.all(np.isfinite(logits)):
        raise UserError("the logits of the model are not finite: it finds no answers.")
    return logits


def _write(
    questions: Questions,
    found: Sequence[answers.Answer],
    directory: Path,
    prefix: str,
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
