import json
import pathlib

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from bert_finetune.arguments import GlueArguments, parse_arguments
from bert_finetune.data.batches import batch_of, eval_batches
from bert_finetune.data.features import Features
from bert_finetune.model import bert, pretrained
from bert_finetune.training import optimizers
from bert_finetune.training.losses import (
    label_loss,
    label_scores,
    span_logits,
    span_loss,
)
from bert_finetune.training.steps import (
    Diverged,
    MetricsQueue,
    check_finite,
    compile_ahead,
    init_state,
    make_train_step,
)

import mfac_jax

pytestmark = pytest.mark.usefixtures("quick_compilation")

MICRO = pathlib.Path(__file__).parents[1] / "reference" / "bert_micro"


def micro_losses(optimizer, dtype, num_steps):
    """Trains the recorded model with the trainer's step; returns the losses."""
    model_class = bert.BertForSequenceClassification
    config = pretrained.read_config(MICRO)
    params, _ = pretrained.params_from_tensors(
        pretrained.read_tensors(MICRO),
        bert.init_params(config, model_class, 0, dtype),
        MICRO,
    )
    apply = bert.make_apply(config, model_class, dtype)
    loss_fn, traces = label_loss(apply), []

    def traced_loss_fn(*args):
        traces.append(args)
        return loss_fn(*args)

    step = make_train_step(traced_loss_fn, optimizer)
    recorded = dict(np.load(MICRO / "batches.npz"))
    state = init_state(params, optimizer, seed=0)
    losses = []
    for i in range(num_steps):
        batch = {name: column[i % 6] for name, column in recorded.items()}
        batch["weights"] = np.ones(len(batch["labels"]), np.float32)
        state, metrics = step(state, batch)
        losses.append(metrics["loss"])
    assert int(state.step) == num_steps
    assert len(traces) == 1  # Nothing was recompiled.
    return np.array(losses, np.float64)


@pytest.mark.parametrize(("dtype", "bound"), [("float64", 1e-8), ("float32", 1e-3)])
def test_mfac_follows_the_published_code(dtype, bound):
    settings = json.loads((MICRO / "hyperparameters.json").read_text())
    optimizer = mfac_jax.mfac(settings["lr"], settings["ngrads"], settings["damp"])
    with jax.enable_x64(dtype == "float64"):
        losses = micro_losses(optimizer, jnp.dtype(dtype), settings["steps"])
    expected = np.load(MICRO / "mfac_run.npz")["losses_f64"]
    np.testing.assert_allclose(losses, expected, rtol=0, atol=bound)


def test_adamw_follows_torch():
    flags = "--model_name_or_path m --task_name qqp --output_dir o --do_train"
    args = parse_arguments(GlueArguments, [*flags.split(), "--learning_rate", "1e-3"])
    hyperparams = optimizers.parse_hyperparams(args)
    optimizer = optimizers.make_optimizer(args, hyperparams, 100, {}, {}).transformation
    losses = micro_losses(optimizer, jnp.float32, 100)
    expected = np.load(MICRO / "adamw_run.npz")["losses_f64"]
    np.testing.assert_allclose(losses, expected, rtol=0, atol=1e-5)


# A model to compute by hand: the logit of label 1 is the parameter times the input.


def apply_scalar(params, batch, dropout_key):
    del dropout_key
    logit = params["w"] * batch["input_ids"][:, 0]
    return jnp.stack([jnp.zeros_like(logit), logit], axis=1)


def features_of(inputs, labels):
    labels = np.asarray(labels)
    if np.issubdtype(labels.dtype, np.integer):
        labels = labels.astype(np.int32)
    return Features(
        np.asarray(inputs, np.int32),
        np.zeros(len(inputs), np.int8),
        np.arange(len(inputs) + 1),
        {"labels": labels},
        0,
    )


def toy_batch(inputs, labels, batch_size):
    features = features_of(inputs, labels)
    return batch_of(features, np.arange(len(inputs)), batch_size, [1])


def test_rows_that_fill_up_a_batch_do_not_count():
    loss_fn = label_loss(apply_scalar)
    params = {"w": jnp.float32(0.5)}
    full, metrics = loss_fn(params, toy_batch([1, 2, 3], [1, 0, 0], 3), None)
    padded, padded_metrics = loss_fn(params, toy_batch([1, 2, 3], [1, 0, 0], 8), None)
    expected = np.mean(
        [np.log1p(np.exp(-0.5)), np.log1p(np.exp(1.0)), np.log1p(np.exp(1.5))]
    )
    assert full == pytest.approx(expected)
    assert padded == pytest.approx(expected)
    assert metrics["accuracy"] == padded_metrics["accuracy"] == pytest.approx(1 / 3)


def test_evaluation_batches_hold_each_example_once_in_order():
    features = features_of([3, -2, 5, -1, 4], [1, 0, 0, 0, 1])
    scores, params = label_scores(apply_scalar), {"w": jnp.float32(1.0)}
    found = [scores(params, batch) for batch in eval_batches(features, 2, [1])]
    losses, predictions = (
        np.concatenate(column)[:5] for column in zip(*found, strict=True)
    )
    assert predictions.tolist() == [1, 0, 1, 0, 1]
    np.testing.assert_allclose(
        losses, np.log1p(np.exp([-3.0, -2.0, 5.0, -1.0, -4.0])), rtol=1e-5
    )


def test_an_answer_is_two_positions():
    """By hand: the start logits are the tokens, the end logits half of them."""

    def apply(params, batch, dropout_key):
        logits = params["w"] * batch["input_ids"].astype(jnp.bfloat16)
        return logits, logits / 2

    # The third row fills up the batch; the last token of the first is padding.
    tokens = np.array([[1, 4, 9], [2, 6, 3], [7, 7, 7]])
    batch = {
        "input_ids": tokens,
        "attention_mask": np.array([[1, 1, 0], [1, 1, 1], [1, 1, 1]]),
        "start_positions": np.array([1, 0, 0]),
        "end_positions": np.array([1, 2, 0]),
        "weights": np.array([1.0, 1.0, 0.0], np.float32),
    }

    def cross_entropy(logits, position):
        return np.log(np.sum(np.exp(logits))) - logits[position]

    first, second = np.array([1.0, 4.0]), np.array([2.0, 6.0, 3.0])
    expected = [
        (cross_entropy(first, 1) + cross_entropy(first / 2, 1)) / 2,
        (cross_entropy(second, 0) + cross_entropy(second / 2, 2)) / 2,
    ]
    params = {"w": jnp.bfloat16(1.0)}
    loss, metrics = span_loss(apply)(params, batch, None)
    assert loss.dtype == jnp.float32
    assert loss == pytest.approx(np.mean(expected), rel=1e-6)
    assert not metrics
    starts, ends = span_logits(apply)(params, batch)
    np.testing.assert_array_equal(starts, tokens.astype(np.float32))
    np.testing.assert_array_equal(ends, tokens.astype(np.float32) / 2)


def test_a_regression_is_squared_error():
    def apply(params, batch, dropout_key):
        return (params["w"] * batch["input_ids"]).astype(jnp.bfloat16)

    params, labels = {"w": jnp.float32(0.5)}, np.array([1.5, 1.0], np.float32)
    batch = toy_batch([2, 4], labels, 5)
    loss, metrics = label_loss(apply, is_regression=True)(params, batch, None)
    assert loss == pytest.approx((0.5**2 + 1.0**2) / 2)
    assert not metrics
    losses, predictions = label_scores(apply, is_regression=True)(params, batch)
    assert losses[:2].tolist() == [0.25, 1.0]
    assert predictions[:2].tolist() == [1.0, 2.0]


def train_scalar(optimizer, batches, *, schedule=None, **options):
    records = []
    state = init_state({"w": jnp.float32(0.0)}, optimizer, seed=0)
    step_fn = make_train_step(
        label_loss(apply_scalar),
        optimizer,
        schedule=schedule,
        **options,
    )
    queue = MetricsQueue(lambda step, metrics: records.append((step, dict(metrics))))
    for step, batch in enumerate(batches, start=1):
        state, metrics = step_fn(state, batch)
        queue.put(step, metrics)
    queue.flush()
    return state, records


def test_every_step_is_reported_once_in_order():
    batches = [toy_batch([1, -1], [1, 0], 2)] * 40
    state, records = train_scalar(
        optax.sgd(0.1), batches, schedule=lambda step: 0.1 * step
    )
    assert [step for step, _ in records] == list(range(1, 41))
    losses = [metrics["loss"] for _, metrics in records]
    assert losses[0] == pytest.approx(np.log(2))
    assert losses == sorted(losses, reverse=True)
    assert records[4][1]["learning_rate"] == pytest.approx(0.4)
    assert int(state.step) == 40
    assert state.params["w"] > 0


@pytest.mark.parametrize("size", [12, 7, 3])
def test_accumulation_averages_over_all_examples(size):
    """Equals one forward pass over all of them, even if a part is short or empty."""
    rng = np.random.default_rng(0)
    inputs, labels = rng.integers(-5, 5, size), rng.integers(0, 2, size)
    batches = [toy_batch(inputs, labels, 12)] * 5
    results = [
        train_scalar(optax.sgd(0.1), batches, accumulation_steps=steps)
        for steps in (1, 4)
    ]
    (whole, whole_records), (parts, part_records) = results
    np.testing.assert_allclose(parts.params["w"], whole.params["w"], rtol=1e-5)
    for (_, expected), (_, found) in zip(whole_records, part_records, strict=True):
        assert found == pytest.approx(expected, rel=1e-5)


def test_the_state_of_mfac_is_reported():
    batches = [toy_batch([1, -1], [1, 0], 2)] * 3
    _, records = train_scalar(mfac_jax.mfac(0.1, num_grads=2, damp=0.1), batches)
    assert records[-1][1]["damp"] == pytest.approx(0.1)
    for name in ("num_raised", "num_rejected", "num_saturated"):
        assert records[-1][1][name] == 0
    assert records[-1][1]["num_stored"] == 2


def test_a_loss_that_is_not_finite_is_an_error():
    batches = [toy_batch([1, -1], [0, 1], 2)] * 40
    with pytest.raises(Diverged, match="step 2: training has diverged"):
        train_scalar(optax.sgd(float("inf")), batches)


def test_parameters_that_are_not_finite_are_an_error():
    state = init_state({"a": jnp.ones(2), "b": jnp.ones(2)}, optax.sgd(1.0), seed=0)
    check_finite(state)
    bad = state._replace(params={"a": jnp.ones(2), "b": jnp.array([1.0, jnp.nan])})
    with pytest.raises(Diverged, match="after step 0"):
        check_finite(bad)


@pytest.mark.parametrize("num_ahead", [1, 2])
def test_a_length_is_compiled_once_ahead_or_when_it_comes(num_ahead):
    traces = []

    def apply(params, batch, dropout_key):
        traces.append(batch["input_ids"].shape)
        logit = params["w"] * jnp.sum(batch["input_ids"], axis=1)
        return jnp.stack([jnp.zeros_like(logit), logit], axis=1)

    features = features_of([1, 2, 3, 4, 5, 6], [0] * 3)._replace(
        starts=np.array([0, 1, 2, 6])
    )
    optimizer = optax.sgd(0.1)
    state = init_state({"w": jnp.float32(0.0)}, optimizer, seed=0)
    batches = [
        batch_of(features, indices, 2, [1, 4])
        for indices in (np.array([0, 1]), np.array([1, 2]))
    ]
    step_fn = compile_ahead(
        make_train_step(label_loss(apply), optimizer),
        jax.eval_shape(lambda: state),
        batches[:num_ahead],
    )
    assert len(traces) == num_ahead
    for batch in [*batches, *batches]:
        state, _ = step_fn(state, batch)
    assert int(state.step) == 4
    assert len(traces) == 2


def test_the_host_runs_ahead_of_the_device():
    """No step waits for the metrics of the one before it."""
    ready, dispatched = [], []

    class Later:
        def __init__(self):
            self.value = jnp.float32(1.0)

        def is_ready(self):
            return False

    device_get = jax.device_get
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(
            jax,
            "device_get",
            lambda tree: device_get({k: v.value for k, v in tree.items()}),
        )
        queue = MetricsQueue(lambda step, metrics: ready.append(step))
        for step in range(1, 51):
            dispatched.append(len(ready))
            queue.put(step, {"loss": Later()})
        queue.flush()
    assert ready == list(range(1, 51))
    assert dispatched[:10] == [0] * 10
