import pathlib

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import toy_bert
from bert_finetune.errors import UserError
from bert_finetune.model import bert, pretrained
from bert_finetune.training.losses import label_loss
from transformers import BertConfig

pytestmark = pytest.mark.usefixtures("quick_compilation")

REFERENCE = pathlib.Path(__file__).parents[1] / "reference"
HEADS = {
    "": (bert.BertForSequenceClassification, ["expected_logits"]),
    "qa": (
        bert.BertForQuestionAnswering,
        ["expected_start_logits", "expected_end_logits"],
    ),
}


def recorded_model(head, dtype):
    """Returns a recorded model as a pure function, and its parameters."""
    directory = REFERENCE / "bert_logits" / head
    model_class, _ = HEADS[head]
    config = pretrained.read_config(directory)
    params, notes = pretrained.params_from_tensors(
        pretrained.read_tensors(directory),
        bert.init_params(config, model_class, 0, dtype),
        directory,
    )
    assert notes == []
    return bert.make_apply(config, model_class, dtype), params


@pytest.mark.parametrize("head", HEADS)
# The float64 logits are recorded with the precision of float32.
@pytest.mark.parametrize(("dtype", "bound"), [("float32", 5e-6), ("float64", 1e-7)])
def test_logits_match_torch(head, dtype, bound):
    recorded = np.load(REFERENCE / "bert_logits" / "expected.npz")
    with jax.enable_x64(dtype == "float64"):
        apply, params = recorded_model(head, jnp.dtype(dtype))
        for i in range(len(recorded["input_ids"])):
            batch = {
                name: recorded[name][i]
                for name in ("input_ids", "attention_mask", "token_type_ids")
            }
            for logits, name in zip(
                jax.tree.leaves(jax.jit(apply)(params, batch, None)),
                HEADS[head][1],
                strict=True,
            ):
                assert logits.dtype == dtype
                np.testing.assert_allclose(
                    logits, recorded[name][i], rtol=0, atol=bound
                )


@pytest.mark.parametrize("head", HEADS)
def test_parameters_have_the_names_of_hugging_face(head):
    directory = REFERENCE / "bert_logits" / head
    params = bert.init_params(pretrained.read_config(directory), HEADS[head][0], 0)
    assert "embedding" in params["bert"]["embeddings"]["word_embeddings"]
    names = {k: v.shape for k, v in pretrained.tensors_from_params(params).items()}
    expected = pretrained.read_tensors(directory)
    assert names == {k: v.shape for k, v in expected.items()}


def toy_apply(**config):
    config = BertConfig(**(toy_bert.CONFIG | config), num_labels=3)
    model_class = bert.BertForSequenceClassification
    params = bert.init_params(config, model_class, 0)
    # Initialized biases are zero and weights small: logits would hardly differ.
    params = jax.tree.map(lambda x: x + 0.3, params)
    batch = {
        "input_ids": np.arange(12).reshape(2, 6),
        "attention_mask": np.array([[1, 1, 1, 1, 0, 0], [1, 1, 1, 1, 1, 1]]),
        "token_type_ids": np.array([[0, 0, 1, 1, 0, 0], [0, 0, 0, 1, 1, 1]]),
    }
    return jax.jit(bert.make_apply(config, model_class)), params, batch


def test_padding_is_not_seen():
    apply, params, batch = toy_apply()
    changed = batch["input_ids"].copy()
    changed[0, 4:] = 0
    logits = apply(params, batch, None)
    assert logits.shape == (2, 3)
    np.testing.assert_array_equal(
        apply(params, batch | {"input_ids": changed}, None), logits
    )
    cut = {name: column[:1, :4] for name, column in batch.items()}
    np.testing.assert_allclose(apply(params, cut, None), logits[:1], rtol=1e-5)


def test_bfloat16_applies_to_the_computation_only():
    apply, params, batch = toy_apply()
    config = BertConfig(**toy_bert.CONFIG, num_labels=3)
    narrow = bert.make_apply(
        config, bert.BertForSequenceClassification, dtype=jnp.bfloat16
    )
    logits = jax.jit(narrow)(params, batch, None)
    assert logits.dtype == jnp.bfloat16
    np.testing.assert_allclose(
        np.asarray(logits, np.float32), apply(params, batch, None), rtol=0.05
    )
    loss_fn = label_loss(narrow)
    batch = {**batch, "labels": np.array([0, 2]), "weights": np.ones(2, np.float32)}
    grad_fn = jax.jit(jax.value_and_grad(loss_fn, has_aux=True))
    (loss, _), grads = grad_fn(params, batch, None)
    assert loss.dtype == jnp.float32
    assert {leaf.dtype for leaf in jax.tree.leaves(grads)} == {jnp.dtype("float32")}


def test_dropout_follows_key_and_config():
    apply, params, batch = toy_apply()
    first, again, other = (
        apply(params, batch, jax.random.key(seed)) for seed in (1, 1, 2)
    )
    np.testing.assert_array_equal(first, again)
    assert not np.allclose(first, other)
    apply, *_ = toy_apply(hidden_dropout_prob=0.0, attention_probs_dropout_prob=0.0)
    np.testing.assert_array_equal(
        apply(params, batch, jax.random.key(0)), apply(params, batch, None)
    )


def test_initialization_follows_seed_and_config():
    config = BertConfig(**toy_bert.CONFIG | {"initializer_range": 0.5})
    model_class = bert.BertForSequenceClassification
    params, again, other = (
        bert.init_params(config, model_class, seed) for seed in (3, 3, 4)
    )
    for ours, same in zip(jax.tree.leaves(params), jax.tree.leaves(again), strict=True):
        np.testing.assert_array_equal(ours, same)
    kernel = params["bert"]["encoder"]["layer"]["0"]["intermediate"]["dense"]["kernel"]
    assert 0.4 < np.std(kernel) < 0.6
    assert not np.any(params["classifier"]["bias"])
    assert not np.array_equal(
        params["classifier"]["kernel"], other["classifier"]["kernel"]
    )


@pytest.mark.parametrize(
    ("entries", "message"),
    [
        ({"hidden_act": "maxout"}, "hidden_act 'maxout'"),
        ({"position_embedding_type": "relative_key"}, "'relative_key'"),
        ({"is_decoder": True}, "decoder"),
        ({"num_attention_heads": 3}, "hidden_size 16.* num_attention_heads 3"),
    ],
)
def test_an_unsupported_config_is_rejected(entries, message):
    with pytest.raises(UserError, match=message):
        bert.check_config(BertConfig(**toy_bert.CONFIG | entries))
