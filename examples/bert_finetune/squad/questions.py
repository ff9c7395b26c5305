"""Questions about texts, in the form of SQuAD: loading and checking them."""

import collections
import itertools
import json
import sys
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import datasets

from bert_finetune.arguments import QaArguments
from bert_finetune.data import sources
from bert_finetune.errors import UserError

# Names that the hub no longer has, as published commands give them.
_HUB_IDS = {"squad": "rajpurkar/squad", "squad_v2": "rajpurkar/squad_v2"}
_TEXTS = ("id", "question", "context")


def full_name(name: str) -> str:
    """Returns the data set's directory, or its id on the hub as it is today."""
    return name if Path(name).is_dir() else _HUB_IDS.get(name, name)


class Questions(NamedTuple):
    """The questions of a split: columns id, question, context and answers.

    For training, ``spans`` says where in its context each answer begins and ends, or
    ``None`` for a question without one; otherwise it is empty.
    """

    dataset: datasets.Dataset
    spans: list[tuple[int, int] | None]

    def answers(self) -> list[list[str]]:
        """Returns the texts of the answers, for each question any number."""
        return [answers["text"] for answers in self.dataset["answers"]]


def load_split(args: QaArguments, split: str, max_samples: int | None) -> Questions:
    """Loads the first questions of a split and checks them.

    Questions that cannot be trained on are reported and left out of the training split.
    The test split needs no answers.
    """
    file: str | None = getattr(args, f"{split}_file")
    if file is not None:
        dataset, where = _load_file(file), file
    else:
        assert args.dataset_name is not None, "the flags have been checked"
        where = f"the {split} split of {args.dataset_name}"
        name = full_name(args.dataset_name)
        dataset = sources.load(name, args.dataset_config_name, split)
    others = [] if split == "test" else ["answers"]
    dataset = sources.select(dataset, _TEXTS, others, max_samples, where)
    if split != "test":
        _check_answers(dataset, where, args.version_2_with_negative)
    [(id_, count)] = collections.Counter(dataset["id"]).most_common(1)
    if count > 1 and split != "train":
        raise UserError(f"{where} has more than one question with the id {id_!r}.")
    contexts = zip(dataset["id"], dataset["context"], strict=True)
    blank = [id_ for id_, context in contexts if not context.strip()]
    fate = "out" if split == "train" else "unanswered"
    _report(blank, dataset, where, f"are left {fate}: their context has no text")
    return _trainable(dataset, where) if split == "train" else Questions(dataset, [])


def _check_answers(dataset: datasets.Dataset, where: str, with_negative: bool) -> None:
    unanswered = []
    for id_, answers in zip(dataset["id"], dataset["answers"], strict=True):
        if not _are_answers(answers):
            raise UserError(
                f"the answers to question {id_!r} of {where} must be two lists of one "
                "length, 'text' of texts and 'answer_start' of integers, got "
                f"{str(answers)[:80]}."
            )
        if not answers["text"]:
            unanswered.append(id_)
    if unanswered and not with_negative:
        raise UserError(
            f"{len(unanswered)} of {len(dataset)} questions of {where} have no answer, "
            f"{unanswered[0]!r} for example: give --version_2_with_negative."
        )


def _are_answers(answers: Any) -> bool:
    match answers:
        case {"text": [*texts], "answer_start": [*starts]}:
            pairs = itertools.zip_longest(texts, starts)
            return all(isinstance(t, str) and isinstance(s, int) for t, s in pairs)
    return False


def _trainable(dataset: datasets.Dataset, where: str) -> Questions:
    """Returns the questions that can be trained on, each with its first answer."""
    kept, spans, mismatched = [], [], []
    rows = zip(dataset["id"], dataset["context"], dataset["answers"], strict=True)
    for i, (id_, context, answers) in enumerate(rows):
        span = None
        if not context.strip():
            continue
        if answers["text"]:
            text, first = answers["text"][0], answers["answer_start"][0]
            span = (first, first + len(text))
            if not text or first < 0 or context[slice(*span)] != text:
                mismatched.append(id_)
                continue
        kept.append(i)
        spans.append(span)
    problem = "their answer does not stand in the context at answer_start"
    _report(mismatched, dataset, where, f"are left out: {problem}")
    if not kept:
        raise UserError(f"nothing is left of {where} to train on.")
    return Questions(dataset.select(kept), spans)


def _report(ids: list[str], dataset: Any, where: str, what: str) -> None:
    if ids:
        examples = ", ".join(ids[:5]) + (", ..." if len(ids) > 5 else "")
        count = f"{len(ids)} of {len(dataset)} questions of {where}"
        print(f"warning: {count} {what} ({examples}).", file=sys.stderr)


def _load_file(path: str) -> datasets.Dataset:
    if Path(path).suffix in (".jsonl", ".parquet"):
        return sources.load_files([path])
    if Path(path).suffix != ".json":
        raise UserError(f"{path} must end in .json, .jsonl or .parquet.")
    try:
        content = json.loads(Path(path).read_text(encoding="utf-8-sig"))
    except FileNotFoundError as error:
        raise UserError(f"there is no file {path}.") from error
    except (ValueError, RecursionError) as error:
        raise UserError(
            f"{path} cannot be read: {error}. (A question on each line is .jsonl.)"
        ) from error
    if not isinstance(content, dict) or not isinstance(content.get("data"), list):
        raise UserError(f"{path} is not in the form of SQuAD: it has no list 'data'.")
    rows = []
    for number, article in enumerate(content["data"], start=1):
        try:
            rows += _questions_of(article)
        except (AttributeError, KeyError, TypeError, ValueError) as error:
            what = f"entry {number} of 'data' in {path} is not in the form of SQuAD"
            raise UserError(f"{what}: {type(error).__name__}: {error}.") from error
    if not rows:
        raise UserError(f"{path} is empty.")
    try:
        return datasets.Dataset.from_list(rows)
    except (ValueError, OverflowError) as error:  # Of pyarrow and Unicode, too.
        raise UserError(f"{path} cannot be read: {error}") from error


def _questions_of(article: Mapping[str, Any]) -> Iterator[dict[str, Any]]:
    """Yields the questions of an article, or the one of a row as the hub has it."""
    if "paragraphs" not in article:
        yield _row(article, article["context"], article.get("answers"))
        return
    for paragraph in article["paragraphs"]:
        for question in paragraph["qas"]:
            answers, names = question.get("answers"), ("text", "answer_start")
            if answers is not None:
                answers = {name: [answer[name] for answer in answers] for name in names}
            yield _row(question, paragraph["context"], answers)


def _row(question: Mapping[str, Any], context: Any, answers: Any) -> dict[str, Any]:
    row = {"id": question["id"], "question": question["question"], "context": context}
    for name, text in row.items():
        if not isinstance(text, str):
            raise ValueError(f"{name} of question {question['id']!r} is not a text")
    if answers is not None and not _are_answers(answers):
        raise ValueError(f"answers of question {question['id']!r} are {answers!r:.80}")
    return {**row, "answers": answers}
