import json

import datasets
import pytest
import toy_bert
from bert_finetune.arguments import QaArguments, parse_arguments
from bert_finetune.errors import UserError
from bert_finetune.squad.questions import load_split

ROWS = toy_bert.questions(12, with_negative=True)


def arguments(*flags, with_negative=True):
    required = ["--model_name_or_path=m", "--output_dir=o", "--do_train"]
    negative = ["--version_2_with_negative"] * with_negative
    return parse_arguments(QaArguments, [*required, *negative, *flags])


def load(path, split="train", max_samples=None, **options):
    args = arguments(f"--{split}_file={path}", f"--train_file={path}", **options)
    return load_split(args, split, max_samples)


def write_json(path, content):
    path.write_text(json.dumps(content))
    return path


def write_rows(path, rows):
    """Writes rows in the Hub's layout, in the format of the file's extension."""
    if path.suffix == ".jsonl":
        path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    elif path.suffix == ".parquet":
        toy_bert.write_parquet(path, {k: [row[k] for row in rows] for k in rows[0]})
    else:
        write_json(path, {"data": rows})
    return path


def assert_holds(questions, rows):
    columns = ("id", "question", "context")
    assert list(questions.dataset) == [{k: row[k] for k in columns} for row in rows]
    assert questions.answers == [row["answers"]["text"] for row in rows]


@pytest.mark.parametrize("name", ["a.json", "a.jsonl", "a.parquet"])
def test_rows_in_the_layout_of_the_hub(tmp_path, name):
    assert_holds(load(write_rows(tmp_path / name, ROWS)), ROWS)


def test_the_official_file(tmp_path):
    questions = load(write_json(tmp_path / "a.json", toy_bert.as_squad_file(ROWS)))
    assert_holds(questions, ROWS)
    for row, span in zip(ROWS, questions.spans, strict=True):
        text = None if span is None else row["context"][slice(*span)]
        assert text == next(iter(row["answers"]["text"]), None)


def test_a_test_file_needs_no_answers(tmp_path):
    content = toy_bert.as_squad_file(ROWS)
    for article in content["data"]:
        del article["paragraphs"][0]["qas"][0]["answers"]
    path = write_json(tmp_path / "a.json", content)
    assert load(path, "test").dataset.column_names == ["id", "question", "context"]
    with pytest.raises(UserError, match=r"'q000' of .*a.json must be two lists.*None"):
        load(path, "validation")


def test_directories_in_the_layout_of_the_hub(tmp_path):
    toy_bert.write_squad(tmp_path, num_train=5)
    for directory in (tmp_path, tmp_path / "squad_v2"):
        args = arguments(f"--dataset_name={directory}")
        assert len(load_split(args, "train", None).dataset) == 5
    args = arguments(f"--dataset_name={tmp_path}")
    assert len(load_split(args, "validation", 3).dataset) == 3
    with pytest.raises(UserError, match=r"has no \*/test-\*\.parquet"):
        load_split(args, "test", None)
    toy_bert.write_squad(tmp_path, num_train=6, with_negative=False)
    with pytest.raises(UserError, match=r"more than one folder: pass one of them"):
        load_split(args, "train", None)
    args = arguments(f"--dataset_name={tmp_path}", "--dataset_config_name=plain_text")
    assert len(load_split(args, "train", None).dataset) == 6


@pytest.mark.parametrize(
    ("name", "hub_id"),
    [
        ("squad", "rajpurkar/squad"),
        ("squad_v2", "rajpurkar/squad_v2"),
        ("someone/questions", "someone/questions"),
    ],
)
def test_short_names_become_ids_of_the_hub(tmp_path, monkeypatch, name, hub_id):
    asked = []

    def load_dataset(name, config, split):
        asked.append((name, config, split))
        return datasets.Dataset.from_list(ROWS)

    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(datasets, "load_dataset", load_dataset)
    load_split(arguments(f"--dataset_name={name}"), "train", None)
    assert asked == [(hub_id, None, "train")]


def changed(row, **entries):
    return {**row, **entries}


def answers(*pairs):
    texts, starts = zip(*pairs, strict=True)
    return {"text": list(texts), "answer_start": list(starts)}


def test_what_cannot_be_trained_on_is_reported_and_left_out(tmp_path, capsys):
    row = {"question": "yes", "context": "red good film"}
    rows = [
        changed(row, id="right", answers=answers(("good film", 4), ("red", 7))),
        changed(row, id="shifted", answers=answers(("good film", 3))),
        changed(row, id="negative", answers=answers(("film", -4))),
        changed(row, id="empty", answers=answers(("", 4))),
        changed(row, id="none", answers={"text": [], "answer_start": []}),
        changed(row, id="blank", context=" \n", answers=answers((" ", 0))),
    ]
    path = write_json(tmp_path / "a.json", {"data": rows})
    questions = load(path)
    assert questions.dataset["id"][:] == ["right", "empty", "none"]
    assert questions.spans == [(4, 13), None, None]
    lines = capsys.readouterr().err.splitlines()
    assert lines == [
        f"warning: 1 of 6 questions of {path} are left out: their context has no text "
        "(blank).",
        f"warning: 2 of 6 questions of {path} are left out: their answer is not in the "
        "context at answer_start (shifted, negative).",
    ]
    # Evaluation ignores answer_start.
    assert len(load(path, "validation").dataset) == 6
    assert "are left unanswered: their context has no text (blank)" in (
        capsys.readouterr().err
    )


ROW = ROWS[0]


@pytest.mark.parametrize("name", ["a.json", "a.jsonl", "a.parquet"])
def test_integers_can_be_ids(tmp_path, name):
    rows = [changed(row, id=i) for i, row in enumerate(ROWS)]
    assert load(write_rows(tmp_path / name, rows)).dataset["id"][:3] == ["0", "1", "2"]


@pytest.mark.parametrize("split", ["train", "validation"])
@pytest.mark.parametrize("official", [False, True])
@pytest.mark.parametrize(
    "changes",
    [
        {"answers": {"text": ["red"], "answer_start": [-1]}},
        {"answers": {"text": [""], "answer_start": [-1]}},
        {"answers": {"text": [""], "answer_start": [0]}},
        {"answers": {"text": [], "answer_start": []}},
        {"answers": {"text": ["red"], "answer_start": [0]}, "is_impossible": True},
        {"answers": {"text": ["red"], "answer_start": [0]}, "is_impossible": 1},
    ],
)
def test_no_answer_is_written_in_several_ways(tmp_path, split, official, changes):
    row = {"id": "none", "question": "yes", "context": "red good film", **changes}
    content = toy_bert.as_squad_file([row]) if official else {"data": [row]}
    questions = load(write_json(tmp_path / "a.json", content), split)
    assert questions.answers == [[]]
    assert questions.spans == ([None] if split == "train" else [])
    with pytest.raises(UserError, match=r"1 of 1 questions .*--version_2_with"):
        load(tmp_path / "a.json", split, with_negative=False)


@pytest.mark.parametrize(
    ("rows", "message"),
    [
        (
            [changed(ROW, context=None)],
            "'context' must contain text, but row 1 of .* None",
        ),
        (
            [changed(ROW, question=[])],
            r"'question' must contain text, but row 1 of .* \[\]",
        ),
        ([{"context": "red"}], "entry 1 of 'data' .*KeyError: 'id'"),
        (["red"], "entry 1 of 'data' in .*a.json is not in the format of SQuAD"),
        ([{"paragraphs": [{"context": "", "qas": ["x"]}]}], "entry 1 of 'data' in"),
        (
            [changed(ROW, answers=answers(("red", 2**70)))],
            "no question of .*a.json can be trained on",
        ),
        (
            [changed(ROW, context="\ud83d")],
            "row 1 of .*a.json, contains an unpaired surrogate",
        ),
        ([changed(ROW, answers=answers(("red", 0.5)))], "answers to question 'q000'"),
        ([changed(ROW, answers=answers(("red", "one")))], "answers to question 'q000'"),
        ([changed(ROW, answers=answers(("red", True)))], "answers to question 'q000'"),
        (
            [changed(ROW, is_impossible="no")],
            "question 'q000' .* true or false",
        ),
        ([changed(ROW, answers={"text": ["a"]})], "answers to question 'q000'"),
        ([changed(ROW, context="")], "no question of .*a.json can be trained on"),
        ([], "a.json is empty"),
    ],
)
def test_files_that_cannot_be_used(tmp_path, rows, message):
    path = write_json(tmp_path / "a.json", {"data": rows})
    with pytest.raises(UserError, match=message):
        load(path)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("{", "a.json cannot be read: "),
        ('{"id": 1}\n{"id": 2}', "Use .jsonl for a question per line"),
        ("[" * 100_000, "a.json cannot be read: "),
        ("[]", "not in the format of SQuAD: it has no list 'data'"),
        ('{"data": 1}', "not in the format of SQuAD: it has no list 'data'"),
    ],
)
def test_what_is_not_squad(tmp_path, text, message):
    path = tmp_path / "a.json"
    path.write_text(text)
    with pytest.raises(UserError, match=message):
        load(path)


def test_only_evaluation_needs_unique_ids(tmp_path):
    rows = [ROW, changed(ROWS[1], id="q000")]
    path = write_json(tmp_path / "a.json", {"data": rows})
    assert len(load(path).dataset) == 2
    with pytest.raises(UserError, match="more than one question with the id 'q000'"):
        load(path, "validation")


def test_other_formats_are_rejected(tmp_path):
    path = tmp_path / "a.csv"
    path.write_text("id,question,context,answers\n")
    with pytest.raises(UserError, match=r"a.csv must end in .json, .jsonl or .parquet"):
        load(path)


def test_configurations_of_the_hub_are_named(tmp_path, monkeypatch):
    def load_dataset(name, config, split):
        raise ValueError("Config name is missing.\nPlease pick one of ['fi', 'ko']")

    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(datasets, "load_dataset", load_dataset)
    message = (
        r"Config name is missing\. .*\['fi', 'ko'\]\)\. Set --dataset_config_name\."
    )
    with pytest.raises(UserError, match=message):
        load_split(arguments("--dataset_name=someone/qa"), "train", None)


def test_columns_of_other_files_are_checked(tmp_path):
    columns = {k: [row[k] for row in ROWS] for k in ROW}
    path = tmp_path / "a.parquet"
    toy_bert.write_parquet(path, columns | {"context": [None] * len(ROWS)})
    with pytest.raises(
        UserError, match="column 'context' must contain text, but row 1"
    ):
        load(path)
    toy_bert.write_parquet(path, columns | {"answers": [["red"]] * len(ROWS)})
    with pytest.raises(UserError, match=r"'q000' .* two lists .* got \['red'\]"):
        load(path)
    del columns["answers"]
    toy_bert.write_parquet(path, columns)
    with pytest.raises(UserError, match="no column 'answers'; it has 'id', 'title'"):
        load(path)


def test_version_1_has_an_answer_to_every_question(tmp_path):
    unanswered = [row["id"] for row in ROWS if not row["answers"]["text"]]
    path = write_json(tmp_path / "a.json", {"data": ROWS})
    message = (
        f"{len(unanswered)} of 12 questions of .* have no answer, for example "
        f"'{unanswered[0]}': pass --version_2_with_negative"
    )
    for split in ("train", "validation"):
        with pytest.raises(UserError, match=message):
            load(path, split, with_negative=False)
