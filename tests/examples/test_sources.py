"""Reads user files: every cell is kept unchanged, or an error names its row."""

import datetime
import decimal
import json

import pyarrow as pa
import pyarrow.parquet
import pytest
from bert_finetune.arguments import GlueArguments, parse_arguments
from bert_finetune.data import sources
from bert_finetune.errors import UserError
from bert_finetune.glue import splits
from transformers import BertConfig

TEXTS = [
    *("1984", "01", "1.50", "-3e5", "1_000", "9" * 30),
    *("null", "None", "NA", "nan", "true", "False", "2020-01-02"),
    *("", " ", "  padded ", "naïve 中文 🙂", "it's 5\" long", "a, b; c", "x" * 100_000),
]


def quoted(text):
    return '"' + text.replace('"', '""') + '"'


def table_text(extension, rows, newline):
    if extension == ".tsv":
        return newline.join("\t".join(row) for row in rows) + newline
    return newline.join(",".join(map(quoted, row)) for row in rows) + newline


@pytest.mark.parametrize("bom", [b"", b"\xef\xbb\xbf"])
@pytest.mark.parametrize("newline", ["\n", "\r\n"])
@pytest.mark.parametrize("extension", [".csv", ".tsv", ".json", ".jsonl"])
def test_texts_stay_as_they_are(tmp_path, extension, newline, bom):
    path = tmp_path / f"a{extension}"
    if extension == ".json":
        rows = [{"sentence": text} for text in TEXTS]
        content = json.dumps(rows, indent=1).replace("\n", newline)
    elif extension == ".jsonl":
        content = newline.join(json.dumps({"sentence": text}) for text in TEXTS)
    else:
        rows = [("sentence", "other"), *((text, "x") for text in TEXTS)]
        content = table_text(extension, rows, newline)
    path.write_bytes(bom + content.encode())
    assert sources.load_file(str(path)).texts("sentence") == TEXTS


def test_unquoted_cells_and_quoted_lines(tmp_path):
    path = tmp_path / "a.csv"
    path.write_bytes(b'a,label\r\nfine,0\r\n"two\nlines, ""quoted""",1\r\n\r\n\r\n')
    source = sources.load_file(str(path))
    assert source.texts("a") == ["fine", 'two\nlines, "quoted"']
    assert source.texts("label") == ["0", "1"]


def test_an_empty_line_is_an_empty_text_where_there_is_one_column(tmp_path):
    for name in ("a.csv", "a.tsv"):
        (tmp_path / name).write_bytes(b"a\nx\n\ny\n\n")
        assert sources.load_file(str(tmp_path / name)).texts("a") == ["x", "", "y", ""]


def test_lines_that_end_in_carriage_returns_alone(tmp_path):
    for name, content in (("a.csv", b"a,b\r1,2\r"), ("a.tsv", b"a\tb\r1\t2\r")):
        (tmp_path / name).write_bytes(content)
        assert sources.load_file(str(tmp_path / name)).texts("b") == ["2"]


def test_a_carriage_return_in_a_tsv_is_part_of_the_text(tmp_path):
    path = tmp_path / "a.tsv"
    path.write_bytes(b"a\tlabel\none\rtwo\t0\nthree\t1\n")
    assert sources.load_file(str(path)).texts("a") == ["one\rtwo", "three"]


@pytest.mark.parametrize("as_parquet", [False, True])
def test_numbers_and_dates_become_strings(tmp_path, as_parquet):
    expected = {"1984": 1984, "-0.5": -0.5, "true": True, "30": 30.0}
    if as_parquet:
        expected |= {
            "2020-01-02": datetime.date(2020, 1, 2),
            "2020-01-02T03:04:05": datetime.datetime(2020, 1, 2, 3, 4, 5),
            "1.50": decimal.Decimal("1.50"),
        }
    for text, value in expected.items():
        path = tmp_path / f"a{'.parquet' if as_parquet else '.jsonl'}"
        if as_parquet:
            pyarrow.parquet.write_table(pa.table({"a": [value]}), path)
        else:
            path.write_text(json.dumps({"a": value}))
        assert sources.load_file(str(path)).texts("a") == [text.replace("30", "30.0")]


def test_huge_integers_in_json_are_texts_and_labels(tmp_path):
    path = tmp_path / "a.jsonl"
    path.write_text("".join(f'{{"a": {10**k}, "label": {10**k}}}\n' for k in (40, 3)))
    assert sources.load_file(str(path)).texts("a") == [str(10**40), "1000"]
    args = args_of("--do_train", f"--train_file={path}")
    assert splits.find_task(args, BertConfig()).label_names == ["1000", str(10**40)]


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        (
            "a.csv",
            b"a,label\nx, y, z,1\n",
            "row 2 of .*a.csv has 4 fields, the header 2",
        ),
        ("a.csv", b"a,label\nx,1\ny\n", "row 3 of .*a.csv has 1 field, the header 2"),
        (
            "a.tsv",
            b"a\tlabel\nx\ty\t1\n",
            "row 2 of .*a.tsv has 3 fields, the header 2",
        ),
        ("a.csv", b"a,label\nx,1\n\ny,0\n", "row 3 of .*a.csv is blank: remove it"),
        ("a.tsv", b"a\tlabel\r\n\r\ny\t0\r\n", "row 2 of .*a.tsv is blank"),
        ("a.jsonl", b'{"a": 1}\n\n{"a": 2}\n', "line 2 of .*a.jsonl is blank"),
        ("a.csv", b"a,label\nx\ry,1\n", "line 2 of .*a.csv: a carriage return inside"),
        ("a.csv", b'a,label\n"x,1\ny,0\n', "line 3 of .*a.csv: unexpected end of data"),
        ("a.csv", b'a,label\n"x" y,1\n', "line 2 of .*a.csv: ',' expected after '\"'"),
        ("a.csv", b"a,a\nx,1\n", "the header of .*a.csv names the column 'a' twice"),
        ("a.csv", b"a;label\nx;1\n", "has no column 'label'; it has 'a;label'"),
        ("a.csv", "a,label\né,1\n".encode("utf-16"), "a.csv is UTF-16 .*as UTF-8"),
        ("a.csv", "a,label\né,1\n".encode("utf-16-le"), "is UTF-16 or binary"),
        (
            "a.csv",
            b"a,label\nx,0\ncaf\xe9,1\n",
            "line 3 of .*Latin-1.*: save the file as",
        ),
        (
            "a.jsonl",
            b'{"a": "\xe9"}\n',
            "line 1 of .*a.jsonl is not valid UTF-8 .*0xe9",
        ),
        (
            "a.jsonl",
            b'{"a": "x"}\n[1]\n',
            r"row 2 of .*a.jsonl is not a JSON object: \[1\]",
        ),
        ("a.jsonl", b'{"a": "x"}\n{"a":\n', "line 2 of .*a.jsonl is not JSON"),
        ("a.json", b'[{"a": "x"}', "a.json is not JSON"),
        (
            "a.json",
            b'[{"a": "x", "a": "y"}]',
            "not JSON .an object has a duplicate key",
        ),
        ("a.jsonl", b'{"a\\ud800": "x"}', "a column name in .* unpaired surrogate"),
        ("a.csv", b"\na,label\nx,1\n", "the first line of .*a.csv is blank"),
        ("a.parquet", b"PAR1 and no more", "a.parquet cannot be read: "),
        ("a.csv", b"", "a.csv is empty: it has no rows"),
        ("a.tsv", b"a\tlabel\n", "a.tsv is empty"),
        ("a.xlsx", b"", "a.xlsx must end in one of .csv, .tsv, .json"),
    ],
)
def test_a_malformed_file_is_rejected(tmp_path, capfd, name, content, message):
    path = tmp_path / name
    path.write_bytes(content)
    with pytest.raises(UserError, match=message) as caught:
        sources.load_file(str(path)).values("label")
    assert "\n" not in str(caught.value)
    assert capfd.readouterr() == ("", "")


@pytest.mark.parametrize("value", [None, [], {}, float("nan"), float("inf"), "\ud83d"])
def test_cells_without_text_are_reported_by_row(tmp_path, value):
    path = tmp_path / "a.jsonl"
    path.write_text('{"a": "x"}\n' + json.dumps({"a": value}))
    with pytest.raises(UserError, match=r"column 'a'.* row 2 of .*a.jsonl"):
        sources.load_file(str(path)).texts("a")


def test_an_unwritable_cache_is_reported(monkeypatch):
    monkeypatch.setattr("datasets.config.HF_DATASETS_CACHE", "/proc/nowhere")
    with pytest.raises(UserError, match=r"/proc/nowhere.*: set HF_DATASETS_CACHE"):
        sources.check_cache()


def args_of(*flags):
    return parse_arguments(
        GlueArguments, ["--model_name_or_path=m", "--output_dir=o", *flags]
    )


def task_of(tmp_path, extension, columns):
    """Returns the task that a training file defines, and its training split."""
    path = tmp_path / f"train{extension}"
    rows = [
        dict(zip(columns, r, strict=True)) for r in zip(*columns.values(), strict=True)
    ]
    if extension == ".parquet":
        pyarrow.parquet.write_table(pa.table(columns), path)
    elif extension == ".jsonl":
        path.write_text("\n".join(map(json.dumps, rows)))
    else:
        cells = [list(columns), *([str(v) for v in row.values()] for row in rows)]
        path.write_text(table_text(extension, cells, "\n"))
    args = args_of("--do_train", f"--train_file={path}")
    task = splits.find_task(args, BertConfig())
    return task, splits.load_split(args, task, "train", None)


@pytest.mark.parametrize("extension", [".csv", ".tsv", ".jsonl", ".parquet"])
@pytest.mark.parametrize(
    ("columns", "expected"),
    [
        (["sentence1", "sentence2"], ["sentence1", "sentence2"]),
        (["question", "answer"], ["question", "answer"]),
        (["idx", "sentence"], ["sentence"]),
        (["id", "sentence2", "sentence1"], ["sentence1", "sentence2"]),
        (["a", "b", "c"], ["a", "b"]),
        (["id"], None),
    ],
)
def test_columns_of_numbers_are_texts(tmp_path, capsys, extension, columns, expected):
    table = {name: [i, 1984] for i, name in enumerate(columns)} | {"label": [0, 1]}
    if expected is None:
        with pytest.raises(UserError, match="has no text column; it has 'id', 'la"):
            task_of(tmp_path, extension, table)
        return
    task, split = task_of(tmp_path, extension, table)
    assert list(task.text_columns) == expected
    for name in expected:
        assert split.dataset[name][:] == [str(columns.index(name)), "1984"]
    unused = set(columns) - set(expected)
    assert ("Unused columns of " in capsys.readouterr().out) == bool(unused)


@pytest.mark.parametrize("extension", [".csv", ".tsv", ".jsonl", ".parquet"])
@pytest.mark.parametrize(
    ("labels", "names", "found"),
    [
        (["01", "02", "01"], ["01", "02"], [0, 1, 0]),
        ([10, 9, 10], ["9", "10"], [1, 0, 1]),
        ([True, False, True], ["False", "True"], [1, 0, 1]),
        (["nan", "None", "nan"], ["None", "nan"], [1, 0, 1]),
        (["yes", "Yes", "yes"], ["Yes", "yes"], [1, 0, 1]),
        ([1.5, -2.0, 3.0], ["score"], [1.5, -2.0, 3.0]),
        ([1.0, 0.0, 1.0], ["score"], [1.0, 0.0, 1.0]),
    ],
)
def test_labels_are_names_integers_or_numbers(
    tmp_path, extension, labels, names, found
):
    task, split = task_of(tmp_path, extension, {"a": ["x", "y", "z"], "label": labels})
    assert list(task.label_names) == names
    assert split.labels.tolist() == found


def test_labels_of_two_types_are_one_class(tmp_path):
    columns = {"a": list("wxyz"), "label": [0, "0", 1, "1"]}
    task, split = task_of(tmp_path, ".jsonl", columns)
    assert task.label_names == ["0", "1"]
    assert split.labels.tolist() == [0, 0, 1, 1]


@pytest.mark.parametrize("odd", ["nan", "3.5x", "inf", "", "1,5"])
def test_one_bad_number_does_not_make_classes(tmp_path, odd):
    columns = {"a": list("xyz"), "label": ["0.5", odd, "2"]}
    with pytest.raises(UserError, match=r"row 3 of .*train\.csv"):
        task_of(tmp_path, ".csv", columns)


@pytest.mark.parametrize(
    ("labels", "names"),
    [
        ([" 0", "1 ", "0"], ["0", "1"]),
        (["a", " a", "b"], ["a", "b"]),
    ],
)
def test_whitespace_around_labels_is_ignored(tmp_path, labels, names):
    task, _ = task_of(tmp_path, ".csv", {"a": list("xyz"), "label": labels})
    assert task.label_names == names


@pytest.mark.parametrize(
    "labels", [["Yes", "yes"], ["1", "+1"], ["01", "1"], ["caf\u00e9", "cafe\u0301"]]
)
def test_spellings_of_a_class_are_reported(tmp_path, capsys, labels):
    task_of(tmp_path, ".csv", {"a": list("xyz"), "label": [*labels, "2"]})
    assert "are different classes of" in capsys.readouterr().err


def test_whole_numbers_to_predict_are_reported(tmp_path, capsys):
    columns = {"a": list("xyz"), "label": ["0", "1", "1.0"]}
    task, _ = task_of(tmp_path, ".csv", columns)
    assert task.is_regression
    assert "whole numbers" in capsys.readouterr().err


def test_classes_with_decimal_names_are_reported(tmp_path, capsys):
    columns = {"a": ["x", "y"], "label": ["0.5", "1.0"]}
    assert task_of(tmp_path, ".jsonl", columns)[0].label_names == ["0.5", "1.0"]
    assert "the 2 class names of" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("labels", "message"),
    [
        (
            [[1, 0], [0, 1]],
            r"label \[1, 0\] at row 1 of .*train.jsonl must be a name or",
        ),
        (["a", None], "row 2 of .*train.jsonl has the label None: fill it in"),
        (["a", ""], "row 2 of .*train.jsonl has the label '': fill it in"),
        ([0.5, float("nan")], "row 2 of .*train.jsonl has the label nan: fill it in"),
        ([0.5, "x"], "label 'x' at row 2 of .*train.jsonl is not a number, but other"),
        (["0.5", "n/a"], "label 'n/a' at row 2 of .*train.jsonl is not a number, but"),
        (
            ["a", "\ud83d"],
            "the label at row 2 of .*train.jsonl contains an unpaired surr",
        ),
        ([1.0, 1e300], r"label 1e\+300 at row 2 of .*train.jsonl must be a number"),
        (["a\tb", "c"], r"label 'a\\tb' of .*train.jsonl contains a tab or a line"),
        (["a", "a"], "must be two or more names or integers.* all are 'a'"),
    ],
)
def test_labels_that_cannot_be_used(tmp_path, labels, message):
    with pytest.raises(UserError, match=message):
        task_of(tmp_path, ".jsonl", {"a": ["x", "y"], "label": labels})
