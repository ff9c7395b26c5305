"""Loads and validates questions in the format of SQuAD."""

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

# Names in published commands that the Hub no longer has -> current ids.
_HUB_IDS = {"squad": "rajpurkar/squad", "squad_v2": "rajpurkar/squad_v2"}
_TEXTS = ("id", "question", "context")


def full_name(name: str) -> str:
    """Returns the dataset's directory, or its current id on the Hub."""
    return name if Path(name).is_dir() else _HUB_IDS.get(name, name)


class Questions(NamedTuple):
    """Questions of a split (columns id, question and context) and their answers.

    For training, ``spans`` holds the start and end character of each question's first
    answer, or ``None`` without one; otherwise it is empty.
    """

    dataset: datasets.Dataset
    answers: list[list[str]]  # Any number per question; empty for test.
    spans: list[tuple[int, int] | None]


def load_split(args: QaArguments, split: str, max_samples: int | None) -> Questions:
    """Loads the first questions of a split and validates them.

    Questions that cannot be trained on are reported and left out of the training split.
    The test split needs no answers.
    """
    file: str | None = getattr(args, f"{split}_file")
    if file is not None:
        source = _load_file(file)
    else:
        assert args.dataset_name is not None, "the flags have been checked"
        name = full_name(args.dataset_name)
        source = sources.load(name, args.dataset_config_name, split)
    texts = {name: source.texts(name, max_samples) for name in _TEXTS}
    dataset = sources.dataset_of(texts)
    answers, where = [], source.where
    if split != "test":
        answers = _load_answers(dataset, source, max_samples)
        _check_answered(dataset, answers, where, args.version_2_with_negative)
    [(id_, count)] = collections.Counter(dataset["id"]).most_common(1)
    if count > 1 and split != "train":
        raise UserError(f"{where} has more than one question with the id {id_!r}.")
    if split == "train":
        return _trainable(dataset, answers, where)
    contexts = zip(dataset["id"], dataset["context"], strict=True)
    blank = [id_ for id_, context in contexts if not context.strip()]
    _report(blank, dataset, where, "are left unanswered: their context has no text")
    return Questions(dataset, [[text for text, _ in pairs] for pairs in answers], [])


# Texts of a question's answers, and their first characters in its context.
_Answers = list[tuple[str, int]]


def _load_answers(
    dataset: datasets.Dataset, source: sources.Source, max_samples: int | None
) -> list[_Answers]:
    """Returns the answers, without the ones that mark an unanswerable question."""
    found = []
    ids, flags = dataset["id"][:], [None] * len(dataset)
    if "is_impossible" in source.columns:
        values = source.values("is_impossible", max_samples)
        flags = [flag for _, flag in source.numbered(values)]
    rows = source.numbered(source.values("answers", max_samples))
    for id_, is_impossible, (_, value) in zip(ids, flags, rows, strict=True):
        if is_impossible not in (None, False, True):
            what = f"is_impossible of question {id_!r} of {source.where}"
            raise UserError(f"{what} must be true or false, got {is_impossible!r:.80}.")
        if is_impossible:
            found.append([])
            continue
        if not _are_answers(value):
            raise UserError(
                f"the answers to question {id_!r} of {source.where} must be two lists "
                "of equal length, 'text' (strings) and 'answer_start' (integers), got "
                f"{str(value)[:80]}."
            )
        pairs = zip(value["text"], value["answer_start"], strict=True)
        found.append([(text, start) for text, start in pairs if text and start != -1])
    return found


def _check_answered(
    dataset: datasets.Dataset, answers: list[_Answers], where: str, with_negative: bool
) -> None:
    pairs = zip(dataset["id"], answers, strict=True)
    unanswered = [id_ for id_, found in pairs if not found]
    if unanswered and not with_negative:
        raise UserError(
            f"{len(unanswered)} of {len(dataset)} questions of {where} have no answer, "
            f"for example {unanswered[0]!r}: pass --version_2_with_negative."
        )


def _are_answers(answers: Any) -> bool:
    match answers:
        case {"text": [*texts], "answer_start": [*starts]}:
            pairs = itertools.zip_longest(texts, starts)
            return all(isinstance(t, str) and type(s) is int for t, s in pairs)
    return False


def _trainable(
    dataset: datasets.Dataset, answers: list[_Answers], where: str
) -> Questions:
    """Returns the questions that can be trained on, each with its first answer."""
    kept, spans, blank, mismatched = [], [], [], []
    rows = zip(dataset["id"], dataset["context"], answers, strict=True)
    for i, (id_, context, found) in enumerate(rows):
        span = None
        if not context.strip():
            blank.append(id_)
            continue
        if found:
            text, first = found[0]
            span = (first, first + len(text))
            if first < 0 or context[slice(*span)] != text:
                mismatched.append(id_)
                continue
        kept.append(i)
        spans.append(span)
    if not kept:
        raise UserError(
            f"no question of {where} can be trained on: {len(blank)} contexts have no "
            f"text, {len(mismatched)} answers are not in the context at answer_start."
        )
    problem = "their answer is not in the context at answer_start"
    _report(blank, dataset, where, "are left out: their context has no text")
    _report(mismatched, dataset, where, f"are left out: {problem}")
    texts = [[text for text, _ in answers[i]] for i in kept]
    return Questions(dataset.select(kept), texts, spans)


def _report(ids: list[str], dataset: Any, where: str, what: str) -> None:
    if ids:
        examples = ", ".join(ids[:5]) + (", ..." if len(ids) > 5 else "")
        count = f"{len(ids)} of {len(dataset)} questions of {where}"
        print(f"warning: {count} {what} ({examples}).", file=sys.stderr)


def _load_file(path: str) -> sources.Source:
    kind = Path(path).suffix.lower()
    if kind in (".jsonl", ".parquet"):
        return sources.load_file(path)
    if kind != ".json":
        raise UserError(f"{path} must end in .json, .jsonl or .parquet.")
    try:
        content = json.loads(sources.read_text(path))
    except (ValueError, RecursionError) as error:
        if isinstance(error, UserError):
            raise
        raise UserError(
            f"{path} cannot be read: {error}. (Use .jsonl for a question per line.)"
        ) from error
    if not isinstance(content, dict) or not isinstance(content.get("data"), list):
        raise UserError(f"{path} is not in the format of SQuAD: it has no list 'data'.")
    rows = []
    for number, article in enumerate(content["data"], start=1):
        try:
            rows += _questions_of(article)
        except (AttributeError, KeyError, TypeError, ValueError) as error:
            what = f"entry {number} of 'data' in {path} is not in the format of SQuAD"
            raise UserError(f"{what}: {type(error).__name__}: {error}.") from error
    if not rows:
        raise UserError(f"{path} is empty.")
    names = (*_TEXTS, "answers", "is_impossible")
    return sources.Source(
        {name: [row.get(name) for row in rows] for name in names}, path
    )


def _questions_of(article: Mapping[str, Any]) -> Iterator[dict[str, Any]]:
    """Yields the questions of an article, or of a row in the Hub's layout."""
    if "paragraphs" not in article:
        yield {**article, "id": article["id"]}
        return
    for paragraph in article["paragraphs"]:
        for question in paragraph["qas"]:
            answers, names = question.get("answers"), ("text", "answer_start")
            if answers is not None:
                answers = {name: [answer[name] for answer in answers] for name in names}
            row = {"id": question["id"], "context": paragraph["context"]}
            yield {**question, **row, "answers": answers}
