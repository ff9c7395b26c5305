import json
import re

import jax
import numpy as np
import pytest
import toy_bert
from bert_finetune.errors import UserError
from bert_finetune.model import bert, pretrained
from safetensors.numpy import load_file, save_file

CLASSIFIER = bert.BertForSequenceClassification
QA = bert.BertForQuestionAnswering
BATCH = {
    "input_ids": np.array([[2, 5, 8, 9, 3, 7, 3, 0], [2, 6, 3, 10, 11, 12, 13, 3]]),
    "attention_mask": np.array([[1] * 7 + [0], [1] * 8]),
    "token_type_ids": np.array([[0, 0, 0, 0, 0, 1, 1, 0], [0, 0, 0, 1, 1, 1, 1, 1]]),
}


def assert_same_params(ours, expected):
    assert jax.tree.structure(ours) == jax.tree.structure(expected)
    for a, b in zip(jax.tree.leaves(ours), jax.tree.leaves(expected), strict=True):
        np.testing.assert_array_equal(a, b)


@pytest.mark.parametrize("as_torch", [False, True])
def test_a_directory_of_three_files_is_enough(tmp_path, as_torch):
    """As prajjwal1/bert-tiny: no model_type, no tokenizer config, vocab.txt."""
    toy_bert.write_model(tmp_path, as_torch=as_torch)
    model = pretrained.load_pretrained(
        tmp_path, CLASSIFIER, label_names=["negative", "positive"]
    )
    assert model.notes == []
    assert model.config.id2label == {0: "negative", 1: "positive"}
    assert model.config.num_labels == 2
    ids = model.tokenizer("Good FILM zebra", "no")["input_ids"]
    assert model.tokenizer.convert_ids_to_tokens(ids) == [
        *("[CLS]", "good", "film", "[UNK]", "[SEP]", "no", "[SEP]")
    ]
    weights = toy_bert.tensors()
    np.testing.assert_array_equal(
        model.params["bert"]["pooler"]["dense"]["kernel"],
        weights["bert.pooler.dense.weight"].T,
    )
    assert pretrained.tensors_from_params(model.params).keys() == weights.keys()


def without_prefix(weights):
    return {name.removeprefix("bert."): array for name, array in weights.items()}


def with_old_names(weights):
    return {
        re.sub(
            r"LayerNorm\.(weight|bias)",
            lambda m: {"weight": "LayerNorm.gamma", "bias": "LayerNorm.beta"}[m[1]],
            name,
        ): array
        for name, array in weights.items()
    }


def with_a_language_model_head(weights):
    position_ids = np.arange(32)[None]
    return weights | {
        "bert.embeddings.position_ids": position_ids,
        "cls.predictions.bias": np.zeros(17, np.float32),
        "cls.seq_relationship.weight": np.zeros((2, 16), np.float32),
    }


@pytest.mark.parametrize(
    ("change", "notes"),
    [
        (without_prefix, []),
        (with_old_names, []),
        (
            with_a_language_model_head,
            [
                "The checkpoint holds a head of another task: ignored.",
                "The checkpoint holds position_ids, which follow from the length: "
                "ignored.",
            ],
        ),
    ],
)
def test_names_of_other_formats(tmp_path, change, notes):
    toy_bert.write_model(tmp_path / "plain")
    toy_bert.write_model(tmp_path / "changed", change(toy_bert.tensors()))
    plain = pretrained.load_pretrained(tmp_path / "plain", CLASSIFIER)
    changed = pretrained.load_pretrained(tmp_path / "changed", CLASSIFIER)
    assert changed.notes == notes
    assert_same_params(changed.params, plain.params)


def test_what_is_missing_is_initialized_and_reported(tmp_path):
    weights = toy_bert.tensors()
    encoder = {
        name: array
        for name, array in weights.items()
        if not name.startswith(("bert.pooler", "classifier"))
    }
    toy_bert.write_model(tmp_path, encoder)
    model = pretrained.load_pretrained(tmp_path, CLASSIFIER, seed=3)
    assert model.notes == [
        "The checkpoint has no classification head: initialized from the seed.",
        "The checkpoint has no pooler: initialized from the seed.",
    ]
    fresh = bert.init_params(model.config, CLASSIFIER, 3)
    assert_same_params(model.params["classifier"], fresh["classifier"])
    assert_same_params(model.params["bert"]["pooler"], fresh["bert"]["pooler"])
    np.testing.assert_array_equal(
        model.params["bert"]["embeddings"]["word_embeddings"]["embedding"],
        weights["bert.embeddings.word_embeddings.weight"],
    )


def test_a_checkpoint_with_another_head(tmp_path):
    toy_bert.write_model(tmp_path)
    model = pretrained.load_pretrained(tmp_path, QA)
    assert model.notes == [
        "The checkpoint holds a head of another task: ignored.",
        "The checkpoint holds a pooler, which this model does not have: ignored.",
        "The checkpoint has no question-answering head: initialized from the seed.",
    ]


def change_weights(directory, change):
    weights = toy_bert.tensors()
    change(weights)
    save_file(weights, directory / "model.safetensors")


TABLE = "bert.embeddings.word_embeddings.weight"
QUERY = "bert.encoder.layer.0.attention.self.query.weight"


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (
            lambda w: w.update({TABLE: np.zeros((9, 16), np.float32)}),
            rf"{TABLE} has shape \(9, 16\), expected \(17, 16\)",
        ),
        (
            lambda w: w.update({QUERY: np.zeros((4, 16), np.float32)}),
            rf"{QUERY} has shape \(4, 16\), expected \(16, 16\)",
        ),
        (lambda w: w.pop(QUERY), f"{QUERY} is missing"),
        (
            lambda w: w.update({"bert.encoder.layer.1.x": np.zeros(1, np.float32)}),
            "bert.encoder.layer.1.x is unknown",
        ),
        (
            lambda w: w.update({"classifier.bias": np.zeros(3, np.float32)}),
            r"classifier.bias has shape \(3,\), expected \(2,\)",
        ),
    ],
)
def test_weights_that_do_not_fit_are_named(tmp_path, change, message):
    toy_bert.write_model(tmp_path)
    change_weights(tmp_path, change)
    with pytest.raises(UserError, match=message):
        pretrained.load_pretrained(tmp_path, CLASSIFIER)


@pytest.mark.parametrize(
    ("spoil", "message"),
    [
        (lambda d: (d / "config.json").unlink(), "has no config.json"),
        (lambda d: (d / "config.json").write_text("{"), "config.json cannot be read"),
        (lambda d: (d / "config.json").write_text("[]"), "config.json .* JSON object"),
        (
            lambda d: (d / "config.json").write_text('{"model_type": "gpt2"}'),
            "model_type 'gpt2'; only 'bert'",
        ),
        (
            lambda d: (d / "config.json").write_text('{"hidden_size": "wide"}'),
            "config.json is not a valid BERT config",
        ),
        (lambda d: (d / "vocab.txt").unlink(), "no tokenizer: neither vocab.txt nor"),
        (
            lambda d: (d / "tokenizer.json").write_text("{}"),
            "tokenizer in .* cannot be read",
        ),
        (
            lambda d: (d / "vocab.txt").write_text(
                "\n".join([*toy_bert.VOCABULARY, "more"])
            ),
            "has 18 tokens, more than the vocab_size 17",
        ),
        (lambda d: (d / "model.safetensors").unlink(), "has no weights"),
        (
            lambda d: (d / "model.safetensors").write_bytes(b"\0" * 20),
            "model.safetensors cannot be read",
        ),
    ],
)
def test_a_broken_directory_is_one_clear_error(tmp_path, spoil, message):
    toy_bert.write_model(tmp_path)
    spoil(tmp_path)
    with pytest.raises(UserError, match=message):
        pretrained.load_pretrained(tmp_path, CLASSIFIER)


@pytest.mark.parametrize("model_class", [CLASSIFIER, QA])
def test_round_trip_is_bit_equal(tmp_path, model_class):
    toy_bert.write_model(tmp_path / "given", toy_bert.tensors(model_class))
    model = pretrained.load_pretrained(
        tmp_path / "given", model_class, label_names=["no", "yes"]
    )
    pretrained.save_pretrained(tmp_path / "saved", model)
    again = pretrained.load_pretrained(tmp_path / "saved", model_class)
    assert again.notes == []
    assert_same_params(again.params, model.params)
    assert again.config.id2label == {0: "no", 1: "yes"}
    text = ("a good day", "no cat")
    assert again.tokenizer(*text).data == model.tokenizer(*text).data
    written = load_file(tmp_path / "saved" / "model.safetensors")
    for name, array in toy_bert.tensors(model_class).items():
        np.testing.assert_array_equal(written[name], array)
    entries = json.loads((tmp_path / "saved" / "config.json").read_text())
    assert entries["architectures"] == [model_class.__name__]
    assert entries["model_type"] == "bert"


def test_an_unwritable_directory_is_one_clear_error(tmp_path):
    toy_bert.write_model(tmp_path)
    model = pretrained.load_pretrained(tmp_path, CLASSIFIER)
    in_the_way = tmp_path / "file"
    in_the_way.write_text("")
    with pytest.raises(UserError, match=r"cannot be written to .*file"):
        pretrained.save_pretrained(in_the_way, model)


@pytest.mark.parametrize("model_class", [CLASSIFIER, QA])
def test_transformers_loads_it_with_the_same_logits(tmp_path, model_class):
    torch = pytest.importorskip("torch")
    import transformers

    toy_bert.write_model(tmp_path / "given", toy_bert.tensors(model_class))
    model = pretrained.load_pretrained(tmp_path / "given", model_class)
    directory = tmp_path / "saved"
    pretrained.save_pretrained(directory, model)
    auto_class = {
        CLASSIFIER: transformers.AutoModelForSequenceClassification,
        QA: transformers.AutoModelForQuestionAnswering,
    }[model_class]
    theirs, report = auto_class.from_pretrained(directory, output_loading_info=True)
    assert not any(report.values())
    assert type(theirs).__name__ == model_class.__name__
    with torch.no_grad():
        output = theirs.eval()(**{k: torch.from_numpy(v) for k, v in BATCH.items()})
    expected = output.to_tuple()
    logits = bert.make_apply(model.config, model_class)(model.params, BATCH, None)
    for ours, torchs in zip(jax.tree.leaves(logits), expected, strict=True):
        np.testing.assert_allclose(ours, torchs.numpy(), rtol=0, atol=5e-6)
    text = ("Good film", "no [SEP] cat")
    tokenizer = transformers.AutoTokenizer.from_pretrained(directory)
    assert tokenizer(*text).data == model.tokenizer(*text).data
