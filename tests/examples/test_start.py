"""Models and data that a run starts from, and what it saves for the next run."""

import json

import numpy as np
import pyarrow.parquet
import pytest
import run_glue
import toy_bert
from bert_finetune.arguments import GlueArguments, parse_arguments
from bert_finetune.errors import UserError
from bert_finetune.glue.task import Classification
from bert_finetune.model import pretrained
from bert_finetune.training import optimizers
from bert_finetune.training.loop import prepare
from safetensors.numpy import load_file, save_file
from transformers import BertConfig

pytestmark = pytest.mark.usefixtures("quick_compilation")


@pytest.fixture(scope="module")
def root(tmp_path_factory):
    root = tmp_path_factory.mktemp("root")
    toy_bert.write_model(root / "model")
    for task in ("mrpc", "rte", "stsb"):
        toy_bert.write_task(root / "glue", task, 32, 16)
    return root


def start(root, *flags, model="model", output_dir="out"):
    required = {"model_name_or_path": root / model, "output_dir": root / output_dir}
    argv = [f"--{name}={value}" for name, value in required.items()]
    if any("--task_name" in flag for flag in flags):
        argv.append(f"--dataset_name={root / 'glue'}")
    args = parse_arguments(GlueArguments, [*argv, "--max_seq_length=20", *flags])
    return Classification(args)


def with_labels(root, name, labels, **config):
    """Writes a model with these labels."""
    by_number = {"id2label": {str(i): label for i, label in enumerate(labels)}}
    weights = toy_bert.tensors(num_labels=len(labels))
    return toy_bert.write_model(root / name, weights, **by_number, **config).name


def write(path, text):
    path.write_text(text)
    return path


def test_a_model_keeps_what_it_was_trained_on(root, tmp_path):
    """Numbers are read as text in training, and later by the trained model."""
    rows = [f"what is it?,{k % 2 + 1},{['no', 'yes'][k % 2]}" for k in range(32)]
    train = write(tmp_path / "train.csv", "\n".join(["q,a,label", *rows]))
    test = write(tmp_path / "test.csv", "a,n,q\n2,0,good\n1,0,bad\n")
    output_dir = tmp_path / "out"
    common = [f"--output_dir={output_dir}", "--max_seq_length=20"]
    argv = [
        *(f"--model_name_or_path={root / 'model'}", f"--train_file={train}"),
        *("--do_train", "--learning_rate=1e-2", "--per_device_train_batch_size=16"),
        *("--num_train_epochs=20", f"--validation_file={train}", "--do_eval"),
    ]
    vocabulary = (root / "model" / "vocab.txt").read_text().split()
    assert "1" not in vocabulary
    run_glue.main([*argv, *common, "--save_strategy=no"])
    config = json.loads((output_dir / "config.json").read_text())
    assert config["text_columns"] == ["q", "a"]
    assert config["problem_type"] == "single_label_classification"
    assert config["dtype"] == "float32"
    predict = ["--model_name_or_path", str(output_dir), "--do_predict", *common]
    run_glue.main([*predict, f"--test_file={test}"])
    lines = (output_dir / "predictions.tsv").read_text().splitlines()
    assert [line.partition("\t")[2] in ("no", "yes") for line in lines[1:]] == [
        True
    ] * 2
    one = write(tmp_path / "one.csv", "sentence\n1984\n")
    with pytest.raises(UserError, match="has no column 'q', which the model was trai"):
        run_glue.main([*predict, f"--test_file={one}"])


def test_texts_of_numbers_reach_the_model(root, tmp_path):
    test = write(tmp_path / "test.csv", "sentence1,sentence2\ngood,1984\nbad,1999\n")
    task = start(root, "--do_predict", f"--test_file={test}")
    [features] = task._test_features.values()
    assert np.diff(features.starts).tolist() == [5, 5]
    assert features.token_types.tolist() == [0, 0, 0, 1, 1] * 2


@pytest.mark.parametrize("train", [False, True])
@pytest.mark.parametrize(
    "names", [["EQUIVALENT", "NOT_EQUIVALENT"], ["equivalent", "not_equivalent"]]
)
def test_case_does_not_matter_in_labels(root, names, train):
    model = with_labels(root, f"{names[0]}", names)
    action = "--do_train" if train else "--do_eval"
    task = start(root, "--task_name=mrpc", action, model=model)
    assert list(task.model.config.id2label.values()) == names
    features = task.train_features() if train else task._eval_features["validation"]
    split = "train" if train else "validation"
    [file] = (root / "glue" / "mrpc").glob(f"{split}-*")
    data = pyarrow.parquet.read_table(file)["label"].to_pylist()
    assert features.targets["labels"].tolist() == [1 - label for label in data]


def test_numbers_are_the_labels_of_a_model_without_names(root, tmp_path):
    model = with_labels(root, "generic", ["LABEL_0", "LABEL_1"])
    path = write(tmp_path / "a.csv", "sentence,label\ngood,1\nbad,0\n")
    task = start(root, "--do_eval", f"--validation_file={path}", model=model)
    assert task._eval_features["validation"].targets["labels"].tolist() == [1, 0]
    task = start(root, "--do_train", f"--train_file={path}", model=model)
    assert task.model.config.id2label == {0: "0", 1: "1"}


def test_labels_of_another_task_are_reported(root):
    model = with_labels(root, "mrpc", ["not_equivalent", "equivalent"])
    task = start(root, "--task_name=rte", "--do_eval", model=model)
    assert any(
        "(not_equivalent, equivalent) differ from the labels of rte" in note
        for note in task.model.notes
    )
    task = start(root, "--task_name=mrpc", "--do_eval", model=model)
    assert not any("differ from" in note for note in task.model.notes)


@pytest.mark.parametrize(("name", "number"), [("rte", 2), ("stsb", 1)])
def test_the_head_of_another_task(root, name, number):
    """GLUE's usual recipe: RTE and STS-B start from MNLI."""
    model = with_labels(root, "mnli", ["entailment", "neutral", "contradiction"])
    flags = [f"--task_name={name}", "--do_train"]
    message = (
        rf"do not fit {name} \({number} label.*has shape \(3, 16\), expected "
        rf"\({number}, 16\).* --ignore_mismatched_sizes"
    )
    with pytest.raises(UserError, match=message):
        start(root, *flags, model=model)
    task = start(root, *flags, "--ignore_mismatched_sizes", model=model)
    assert task.model.params["classifier"]["kernel"].shape == (16, number)
    assert sum("initialized from the seed" in note for note in task.model.notes) == 2
    assert prepare(task, optimizers.parse_hyperparams(task.args))


def test_a_model_of_single_texts_gets_no_pairs(root):
    weights = toy_bert.tensors(type_vocab_size=1)
    toy_bert.write_model(root / "single", weights, type_vocab_size=1)
    with pytest.raises(UserError, match=r"single texts, not pairs.*type_vocab_size 1"):
        start(root, "--task_name=rte", "--do_eval", model="single")


def test_datasets_other_than_glue(root, tmp_path):
    for split in ("train", "validation"):
        columns = {"text": ["good", "bad film"], "label": [3, 7]}
        toy_bert.write_parquet(tmp_path / f"{split}-00000-of-00001.parquet", columns)
    flags = [f"--dataset_name={tmp_path}", "--do_train", "--do_eval"]
    task = start(root, *flags)
    assert task.model.config.id2label == {0: "3", 1: "7"}
    assert task.train_features().num_examples == 2
    assert task.describe().title == tmp_path.name


def test_a_regression_reports_the_mean_squared_error(root, tmp_path):
    path = write(tmp_path / "a.csv", "sentence,label\ngood,0.5\nbad,2\nfilm,4\n")
    flags = [f"--train_file={path}", f"--validation_file={path}", "--do_eval"]
    others = ["--metric_for_best_model=mse", "--ignore_mismatched_sizes"]
    task = start(root, "--do_train", *flags, *others)
    results = task.evaluate(task.model.params)
    assert results["eval_mse"] == pytest.approx(results["eval_loss"], rel=1e-6)
    assert task.model.config.problem_type == "regression"


def test_a_saved_config_describes_the_model(root, tmp_path):
    weights = toy_bert.tensors()
    problem = "multi_label_classification"
    options = {"problem_type": problem, "dtype": "bfloat16"}
    toy_bert.write_model(root / "narrow", weights, **options)
    task = start(root, "--task_name=mrpc", "--do_train", model="narrow")
    pretrained.save_pretrained(tmp_path, task.model)
    config = json.loads((tmp_path / "config.json").read_text())
    assert config["dtype"] == "float32"
    assert config["problem_type"] == "single_label_classification"
    assert config["finetuning_task"] == "mrpc"
    assert BertConfig.from_pretrained(tmp_path).text_columns == [
        *("sentence1", "sentence2")
    ]


def test_weights_in_several_files(root):
    weights, directory = toy_bert.tensors(), root / "sharded"
    toy_bert.write_model(directory, weights)
    whole = load_file(directory / "model.safetensors")
    (directory / "model.safetensors").unlink()
    names = sorted(whole)
    parts = {"model-00001-of-00002": names[:9], "model-00002-of-00002": names[9:]}
    for part, held in parts.items():
        save_file({k: whole[k] for k in held}, directory / f"{part}.safetensors")
    index = {k: f"{part}.safetensors" for part, held in parts.items() for k in held}
    path = directory / "model.safetensors.index.json"
    path.write_text(json.dumps({"weight_map": index}))
    found = pretrained.read_tensors(directory)
    assert found.keys() == whole.keys()
    (directory / "model-00002-of-00002.safetensors").unlink()
    with pytest.raises(UserError, match=r"model-00002-of-00002.* cannot be read"):
        pretrained.read_tensors(directory)
    path.write_text("{}")
    with pytest.raises(UserError, match=r"index\.json cannot be used"):
        pretrained.read_tensors(directory)


@pytest.mark.parametrize("value", [np.nan, np.inf])
def test_a_model_that_is_not_finite_is_rejected(root, value):
    weights = toy_bert.tensors()
    weights["classifier.bias"] = np.full_like(weights["classifier.bias"], value)
    toy_bert.write_model(root / f"is {value}", weights)
    task = start(root, "--task_name=mrpc", "--do_eval", model=f"is {value}")
    with pytest.raises(UserError, match="not finite; it cannot be used"):
        task.evaluate(task.model.params)


def test_integer_weights_are_rejected(root):
    weights = {k: x.astype(np.int8) for k, x in toy_bert.tensors().items()}
    toy_bert.write_model(root / "int8", weights)
    with pytest.raises(UserError, match=r"word_embeddings.* has dtype int8"):
        start(root, "--task_name=mrpc", "--do_eval", model="int8")


def test_the_prefix_of_data_parallel_training_is_left_out(root):
    weights = {f"module.{name}": x for name, x in toy_bert.tensors().items()}
    toy_bert.write_model(root / "parallel", weights)
    task = start(root, "--task_name=mrpc", "--do_eval", model="parallel")
    assert "The prefix module. of the names" in task.model.notes[0]


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ({"tokenizer_class": "RobertaTokenizer"}, "is RobertaTokenizer; only BERT's"),
        (
            {"tokenizer_class": "BertJapaneseTokenizer"},
            "is BertJapaneseTokenizer",
        ),
        ({"tokenizer_class": "BertTokenizerFast"}, None),
        ({}, None),
    ],
)
def test_tokenizers_of_other_classes_are_rejected(tmp_path, content, message):
    directory = toy_bert.write_model(tmp_path)
    (directory / "tokenizer_config.json").write_text(json.dumps(content))
    if message is None:
        assert len(pretrained.read_tokenizer(directory)) == len(toy_bert.VOCABULARY)
        return
    with pytest.raises(UserError, match=message):
        pretrained.read_tokenizer(directory)


@pytest.mark.parametrize("kind", ["BPE", "WordLevel", "Unigram"])
def test_tokenizers_of_other_kinds_are_rejected(tmp_path, kind):
    directory = toy_bert.write_model(tmp_path)
    tokenizer = {"model": {"type": kind, "vocab": {}}}
    (directory / "tokenizer.json").write_text(json.dumps(tokenizer))
    with pytest.raises(UserError, match=f"is a {kind} model; only WordPiece"):
        pretrained.read_tokenizer(directory)


@pytest.mark.parametrize("token", ["[UNK]", "[CLS]", "[SEP]", "[PAD]"])
def test_a_vocabulary_needs_the_special_tokens(tmp_path, token):
    directory = toy_bert.write_model(tmp_path)
    tokens = [other for other in toy_bert.VOCABULARY if other != token]
    (directory / "vocab.txt").write_text("\n".join(tokens) + "\n")
    with pytest.raises(UserError, match=r"vocab\.txt|cannot be read"):
        pretrained.read_tokenizer(directory)


def test_a_data_set_with_a_part_missing_is_rejected(root, tmp_path):
    columns = {"text": ["good", "bad film"], "label": [3, 7]}
    toy_bert.write_parquet(tmp_path / "train-00000-of-00002.parquet", columns)
    with pytest.raises(
        UserError, match=r"1 of 2 parts \(train-00000-of-00002\.parquet\)"
    ):
        start(root, f"--dataset_name={tmp_path}", "--do_train")
    toy_bert.write_parquet(tmp_path / "train-00001-of-00002.parquet", columns)
    task = start(root, f"--dataset_name={tmp_path}", "--do_train")
    assert task.train_features().num_examples == 4


def test_a_damaged_cache_is_written_again(root, tmp_path, monkeypatch):
    monkeypatch.setattr("datasets.config.HF_DATASETS_CACHE", str(tmp_path))
    task = start(root, "--task_name=mrpc", "--do_train")
    expected = task.train_features().tokens.copy()
    [file] = (tmp_path / "tokenized").glob("*.arrow")
    file.write_bytes(file.read_bytes()[:100])
    np.testing.assert_array_equal(task.train_features().tokens, expected)
