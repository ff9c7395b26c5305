"""Questions about texts, in the form of SQuAD: loading and checking them."""

import json
import sys
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import datasets

from bert_finetune.arguments import QaArguments
from bert_finetune.data import sources
from bert_finetune.errors import UserError

# Names that the hub no longer has, as published commands give them.
_HUB_IDS = {"squad": "rajpurkar/squad", "squad_v2": "rajpurkar/squad_v2"}
_TEXTS = ("id", "question", "context")
_FEATURES = datasets.Features(
    {
        **{name: datasets.Value("string") for name in _TEXTS},
        "answers": {
            "text": datasets.List(datasets.Value("string")),
            "answer_start": datasets.List(datasets.Value("int32")),
        },
    }
)


def full_name(name: str) -> str:
    """Returns the data set's directory, or its id on the hub as it is today."""
    return name if Path(name).is_dir() else _HUB_IDS.get(name, name)


class Questions(NamedTuple):
    """The questions of a split.

    Attributes:
      dataset: ``id``, ``question``, ``context`` and, but for a test split, ``answers``,
        each a mapping of the lists ``text`` and ``answer_start``.
      spans: for training, where in its context each answer begins and ends, ``None``
        for a question without one; otherwise empty.
    """

    dataset: datasets.Dataset
    spans: list[tuple[int, int] | None]

    def answers(self) -> list[list[str]]:
        """Returns the texts of the answers, for each question any number."""
        return [answers["text"] for answers in self.dataset["answers"]]


def load_split(args: QaArguments, split: str, max_samples: int | None) -> Questions:
    """Loads the questions of a split and checks them.

    What cannot be trained on is named, counted and left out. In evaluation nothing is.

    Args:
      args: the flags, which say where they are.
      split: ``train``, ``validation`` or ``test``; the last needs no answers.
      max_samples: keep the first questions only.

    Raises:
      UserError: if there is no such split, or it cannot be used.
    """
    file: str | None = getattr(args, f"{split}_file")
    if file is not None:
        dataset, where = _load_file(file), file
    else:
        assert args.dataset_name is not None, "the flags have been checked"
        where = f"the {split} split of {args.dataset_name}"
        name = full_name(args.dataset_name)
        dataset = sources.load(name, args.dataset_config_name, split)
    columns = [*_TEXTS, *([] if split == "test" else ["answers"])]
    sources.check_columns(dataset, columns, where)
    dataset = dataset.select_columns(columns)
    if max_samples is not None:
        dataset = dataset.select(range(min(max_samples, len(dataset))))
    sources.check_texts(dataset, _TEXTS, where)
    if split != "test":
        _check_answers(dataset, where, args.version_2_with_negative)
    if split == "train":
        return _trainable(dataset, where)
    _check_ids(dataset["id"][:], where)
    blank = [id_ for id_, text in _column_pairs(dataset, "context") if not text.strip()]
    _report(blank, dataset, where, "are left unanswered: their context has no text")
    return Questions(dataset, [])


def _column_pairs(dataset: datasets.Dataset, column: str) -> Iterator[tuple[str, Any]]:
    return zip(dataset["id"], dataset[column], strict=True)


def _check_ids(ids: Sequence[str], where: str) -> None:
    seen: set[str] = set()
    for id_ in ids:
        if id_ in seen:
            raise UserError(f"{where} has more than one question with the id {id_!r}.")
        seen.add(id_)


def _check_answers(dataset: datasets.Dataset, where: str, with_negative: bool) -> None:
    unanswered = []
    for id_, answers in _column_pairs(dataset, "answers"):
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
    if not isinstance(answers, Mapping):
        return False
    texts, starts = answers.get("text"), answers.get("answer_start")
    return (
        isinstance(texts, list)
        and isinstance(starts, list)
        and len(texts) == len(starts)
        and all(isinstance(text, str) for text in texts)
        and all(isinstance(start, int) for start in starts)
    )


def _trainable(dataset: datasets.Dataset, where: str) -> Questions:
    """Returns the questions that can be trained on, each with its first answer."""
    kept, spans, blank, mismatched = [], [], [], []
    rows = zip(dataset["id"], dataset["context"], dataset["answers"], strict=True)
    for i, (id_, context, answers) in enumerate(rows):
        span = None
        if not context.strip():
            blank.append(id_)
            continue
        if answers["text"]:
            text, first = answers["text"][0], answers["answer_start"][0]
            span = (first, first + len(text))
            if not text or first < 0 or context[slice(*span)] != text:
                mismatched.append(id_)
                continue
        kept.append(i)
        spans.append(span)
    _report(blank, dataset, where, "are left out: their context has no text")
    _report(
        mismatched,
        dataset,
        where,
        "are left out: their answer does not stand in the context at answer_start",
    )
    if not kept:
        raise UserError(f"nothing is left of {where} to train on.")
    return Questions(
        dataset.select(kept) if len(kept) < len(dataset) else dataset, spans
    )


def _report(ids: list[str], dataset: Any, where: str, what: str) -> None:
    if ids:
        examples = ", ".join(ids[:5]) + (", ..." if len(ids) > 5 else "")
        print(
            f"warning: {len(ids)} of {len(dataset)} questions of {where} {what} "
            f"({examples}).",
            file=sys.stderr,
        )


def _load_file(path: str) -> datasets.Dataset:
    if Path(path).suffix == ".json":
        rows = _read_json(path)
        try:
            return datasets.Dataset.from_list(rows, features=_FEATURES)
        except (ValueError, OverflowError) as error:  # Of pyarrow and Unicode, too.
            raise UserError(f"{path} cannot be read: {error}") from None
    if Path(path).suffix not in (".jsonl", ".parquet"):
        raise UserError(f"{path} must end in .json, .jsonl or .parquet.")
    return sources.load_files([path])


def _read_json(path: str) -> list[dict[str, Any]]:
    """Reads a file of SQuAD itself, or one with rows as the hub has them in `data`."""
    try:
        content = json.loads(Path(path).read_text(encoding="utf-8-sig"))
    except FileNotFoundError:
        raise UserError(f"there is no file {path}.") from None
    except (ValueError, RecursionError) as error:
        raise UserError(
            f"{path} cannot be read: {error}. (A question on each line is .jsonl.)"
        ) from None
    if not isinstance(content, dict) or not isinstance(content.get("data"), list):
        raise UserError(f"{path} is not in the form of SQuAD: it has no list 'data'.")
    rows = []
    for number, article in enumerate(content["data"], start=1):
        try:
            rows += _questions_of(article)
        except (AttributeError, KeyError, TypeError, ValueError) as error:
            raise UserError(
                f"entry {number} of 'data' in {path} is not in the form of SQuAD: "
                f"{type(error).__name__}: {error}."
            ) from None
    if not rows:
        raise UserError(f"{path} is empty.")
    return rows


def _questions_of(article: Mapping[str, Any]) -> Iterator[dict[str, Any]]:
    if "paragraphs" not in article:
        yield _row(article, article["context"], article.get("answers"))
        return
    for paragraph in article["paragraphs"]:
        for question in paragraph["qas"]:
            answers = question.get("answers")
            if answers is not None:
                answers = {
                    name: [answer[name] for answer in answers]
                    for name in ("text", "answer_start")
                }
            yield _row(question, paragraph["context"], answers)


def _row(question: Mapping[str, Any], context: Any, answers: Any) -> dict[str, Any]:
    row = {"id": question["id"], "question": question["question"], "context": context}
    for name, text in row.items():
        if not isinstance(text, str):
            raise ValueError(f"{name} of question {question['id']!r} is not a text")
    if answers is not None and not _are_answers(answers):
        raise ValueError(f"answers of question {question['id']!r} are {answers!r:.80}")
    return {**row, "answers": answers}
