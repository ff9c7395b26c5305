"""The table of GLUE tasks, and the loading of splits from files."""

import csv
import json

import numpy as np
import pytest
import toy_bert
from bert_finetune.arguments import GlueArguments, parse_arguments
from bert_finetune.errors import UserError
from bert_finetune.glue import splits, tasks
from transformers import BertConfig

TEXTS = {"sentence1": ["good film", "bad", "no"], "sentence2": ["a", "null", "NA"]}


def args_of(*flags):
    return parse_arguments(
        GlueArguments, ["--model_name_or_path=m", "--output_dir=o", *flags]
    )


def write(path, columns):
    """Writes columns in the format of the file's extension."""
    rows = [
        dict(zip(columns, row, strict=True))
        for row in zip(*columns.values(), strict=True)
    ]
    if path.suffix == ".parquet":
        toy_bert.write_parquet(path, columns)
    elif path.suffix == ".json":
        path.write_text(json.dumps(rows))
    elif path.suffix == ".jsonl":
        path.write_text("\n".join(map(json.dumps, rows)))
    else:
        delimiter = "\t" if path.suffix == ".tsv" else ","
        with open(path, "w", newline="") as file:
            writer = csv.DictWriter(file, list(columns), delimiter=delimiter)
            writer.writeheader()
            writer.writerows(rows)
    return str(path)


@pytest.mark.parametrize("name", tasks.TASKS)
def test_every_task_is_consistent(name):
    task = tasks.TASKS[name]
    assert len(task.text_columns) in (1, 2)
    assert len(set(task.label_names)) == len(task.label_names)
    assert task.is_regression == (name == "stsb")
    assert len(task.test_splits) == len(task.eval_splits)
    assert all(file.endswith(".tsv") for file in task.test_splits.values())


@pytest.mark.parametrize("extension", [".csv", ".tsv", ".json", ".jsonl", ".parquet"])
@pytest.mark.parametrize(
    ("labels", "names", "expected"),
    [
        (["yes", "no", "yes"], ["no", "yes"], [1, 0, 1]),
        ([7, 3, 7], ["3", "7"], [1, 0, 1]),
        ([0.5, 1.5, -2.0], ["score"], [0.5, 1.5, -2.0]),
    ],
)
def test_custom_files(tmp_path, extension, labels, names, expected):
    path = write(tmp_path / f"train{extension}", {**TEXTS, "label": labels})
    args = args_of("--do_train", "--train_file", path)
    task = splits.find_task(args, BertConfig())
    assert list(task.text_columns) == ["sentence1", "sentence2"]
    assert list(task.label_names) == names
    split = splits.load_split(args, task, "train", None)
    assert split.labels.tolist() == expected
    assert split.dataset["sentence2"][:] == TEXTS["sentence2"]


def test_without_training_the_labels_come_from_the_model(tmp_path):
    columns = {"review": ["good", "bad"], "label": ["yes", "no"]}
    path = write(tmp_path / "validation.csv", columns)
    args = args_of("--do_eval", "--validation_file", path)
    config = BertConfig(id2label={0: "yes", 1: "no", 2: "maybe"})
    task = splits.find_task(args, config)
    assert list(task.text_columns) == ["review"]
    assert task.label_names == ["yes", "no", "maybe"]
    assert splits.load_split(args, task, "validation", None).labels.tolist() == [0, 1]


def test_a_file_can_replace_a_split_of_a_task(tmp_path):
    columns = {"question": ["a", "b"], "sentence": ["c", "d"]}
    names = {**columns, "label": ["not_entailment", "entailment"]}
    path = write(tmp_path / "train.tsv", names)
    args = args_of("--task_name=qnli", "--do_train", "--train_file", path)
    task = splits.find_task(args, BertConfig())
    assert splits.load_split(args, task, "train", None).labels.tolist() == [1, 0]


def test_quotes_in_a_tsv_are_characters(tmp_path):
    path = tmp_path / "train.tsv"
    path.write_text('sentence\tlabel\n"good\t1\nit is 12" long\t0\n')
    args = args_of("--task_name=sst2", "--do_train", "--train_file", str(path))
    split = splits.load_split(args, tasks.TASKS["sst2"], "train", None)
    assert split.dataset["sentence"][:] == ['"good', 'it is 12" long']


def test_a_test_split_needs_no_labels(tmp_path):
    path = write(tmp_path / "test.csv", {"sentence": ["good", "bad"]})
    args = args_of("--task_name=sst2", "--do_predict", "--test_file", path)
    split = splits.load_split(args, tasks.TASKS["sst2"], "test", None)
    assert split.labels.shape == (2,)


def load(tmp_path, task, columns, kind="train"):
    path = write(tmp_path / "data.parquet", columns)
    action = {"train": "do_train", "validation": "do_eval"}[kind]
    args = args_of(f"--task_name={task}", f"--{action}", f"--{kind}_file", path)
    return splits.load_split(args, tasks.TASKS[task], kind, None)


@pytest.mark.parametrize(
    ("columns", "message"),
    [
        ({"sentence": None, "text": ["a", "b", "c"]}, "no column 'sentence'.*text"),
        ({"label": None}, "no column 'label'; it has 'sentence'"),
        (
            {"label": [0, 1, 2]},
            r"label 2 at row 3 of .*data.parquet must be an integer from 0 to 1 or one "
            "of negative, positive",
        ),
        (
            {"label": [-1, -1, -1]},
            r"label -1 at row 1 .* \(-1 marks labels",
        ),
        ({"label": [0.0, 0.5, 1.0]}, "label 0.5 at row 2 of .* an integer from 0 to 1"),
        ({"label": ["no", "yes", "no"]}, "label 'no' at row 1 of .* an integer from 0"),
        ({"label": [0, None, 1]}, "label None at row 2 of .* an integer from 0"),
        ({"label": [[0], [1], [0]]}, r"label \[0\] at row 1 of .* an integer from"),
        (
            {"sentence": ["a", None, "c"]},
            "'sentence' must contain text, but row 2 .*None",
        ),
        (
            {"sentence": [["a"], [], []]},
            r"contain text, but row 1 of .* has \['a'\]: replace",
        ),
        ({"sentence": [], "label": []}, "is empty"),
    ],
)
def test_bad_data_is_one_clear_error(tmp_path, columns, message):
    defaults = {"sentence": ["a", "b", "c"], "label": [0, 1, 0]} | columns
    kept = {name: column for name, column in defaults.items() if column is not None}
    with pytest.raises(UserError, match=message):
        load(tmp_path, "sst2", kept)


@pytest.mark.parametrize("labels", [[0.0, 5.5], [-0.1, 1.0], [1.0, None], ["a", "b"]])
def test_scores_out_of_range_are_rejected(tmp_path, labels):
    columns = {"sentence1": ["a", "b"], "sentence2": ["c", "d"], "label": labels}
    with pytest.raises(UserError, match="must be a number from 0 to 5"):
        load(tmp_path, "stsb", columns)


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("train.txt", "a,label\n", "must end in one of .csv, .tsv, .json"),
        ("train.json", "not json", "line 1 of .*train.json is not JSON"),
        ("train.csv", "label\n1\n0\n", "no text column; it has 'label'"),
        ("train.csv", "text,label\n", "train.csv is empty"),
        ("train.csv", "", "train.csv is empty"),
        ("train.json", "[]", "train.json is empty"),
        ("train.jsonl", "", "train.jsonl is empty"),
        ("train.csv", "text,class\na,1\n", "no column 'label'; it has 'text', 'class'"),
        ("train.csv", "text,label\na,1\nb,1\n", "two or more names .* all are '1'"),
        (
            "train.csv",
            "text,label\na,0.5\nb,\nc,1.5\n",
            "row 3 of .*train.csv has the label '': fill it in",
        ),
        (
            "train.json",
            '[{"text": "a", "label": [1]}]',
            r"label \[1\] at row 1 .* must be a name",
        ),
        (None, None, "there is no file"),
    ],
)
def test_a_bad_file_is_one_clear_error(tmp_path, name, content, message):
    path = tmp_path / (name or "train.csv")
    if content is not None:
        path.write_text(content)
    args = args_of("--do_train", "--train_file", str(path))
    with pytest.raises(UserError, match=message):
        splits.find_task(args, BertConfig())


def test_labels_are_in_the_order_of_the_hub():
    """As in GLUE on the Hub."""
    expected = {"mnli": "entailment", "rte": "entailment", "wnli": "not_entailment"}
    for name, first in expected.items():
        assert tasks.TASKS[name].label_names[0] == first
    assert np.array_equal(tasks.TASKS["stsb"].label_range, (0, 5))
