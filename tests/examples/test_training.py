import json
import pathlib

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from bert_finetune import data, modeling, optimizers, pretrained, training
from bert_finetune.arguments import parse_arguments
from bert_finetune.errors import UserError

import mfac_jax

MICRO = pathlib.Path(__file__).parents[1] / "reference" / "bert_micro"


def micro_losses(optimizer, dtype, num_steps):
    """Trains the recorded model through the trainer's own step."""
    model_class = modeling.BertForSequenceClassification
    config = pretrained.read_config(MICRO)
    params, _ = pretrained.params_from_tensors(
        pretrained.read_tensors(MICRO),
        modeling.init_params(config, model_class, 0, dtype),
        MICRO,
    )
    apply = modeling.make_apply(config, model_class, dtype)
    loss_fn, traces = training.classification_loss(apply), []

    def traced_loss_fn(*args):
        traces.append(args)
        return loss_fn(*args)

    step = training.make_train_step(traced_loss_fn, optimizer, 0)
    recorded = dict(np.load(MICRO / "batches.npz"))
    state = training.init_state(params, optimizer)
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
    args = parse_arguments([*flags.split(), "--learning_rate", "1e-3"])
    optimizer = optimizers.make_optimizer(args, 100, {}).transformation
    losses = micro_losses(optimizer, jnp.float32, 100)
    expected = np.load(MICRO / "adamw_run.npz")["losses_f64"]
    np.testing.assert_allclose(losses, expected, rtol=0, atol=5e-6)


# A model small enough to follow by hand: the logit of label 1 is the parameter.


def apply_scalar(params, batch, dropout_key):
    del dropout_key
    logit = params["w"] * batch["input_ids"][:, 0]
    return jnp.stack([jnp.zeros_like(logit), logit], axis=1)


def batch_of(inputs, labels, batch_size):
    column = np.asarray(inputs, np.int32)[:, None]
    features = data.Features(column, column, column, np.asarray(labels, np.int32))
    return data.batch_of(features, np.arange(len(labels)), batch_size)


def test_rows_that_fill_up_a_batch_do_not_count():
    loss_fn = training.classification_loss(apply_scalar)
    params = {"w": jnp.float32(0.5)}
    full, metrics = loss_fn(params, batch_of([1, 2, 3], [1, 0, 0], 3), None)
    padded, padded_metrics = loss_fn(params, batch_of([1, 2, 3], [1, 0, 0], 8), None)
    expected = np.mean(
        [np.log1p(np.exp(-0.5)), np.log1p(np.exp(1.0)), np.log1p(np.exp(1.5))]
    )
    assert full == pytest.approx(expected)
    assert padded == pytest.approx(expected)
    assert metrics["accuracy"] == padded_metrics["accuracy"] == pytest.approx(1 / 3)


def test_predictions_are_in_order_and_once_each():
    column = np.array([[3], [-2], [5], [-1], [4]], np.int32)
    features = data.Features(column, column, column, np.array([1, 0, 0, 0, 1]))
    losses, predictions = training.predict(
        {"w": jnp.float32(1.0)},
        training.make_eval_step(apply_scalar),
        data.eval_batches(features, 2),
        5,
    )
    assert predictions.tolist() == [1, 0, 1, 0, 1]
    np.testing.assert_allclose(
        losses, np.log1p(np.exp([-3.0, -2.0, 5.0, -1.0, -4.0])), rtol=1e-5
    )


def train_scalar(optimizer, batches, schedule=lambda step: 0.1):
    records = []
    state = training.init_state({"w": jnp.float32(0.0)}, optimizer)
    state = training.train(
        state,
        training.make_train_step(
            training.classification_loss(apply_scalar), optimizer, seed=0
        ),
        batches,
        len(batches),
        schedule,
        lambda step, metrics: records.append((step, metrics)),
    )
    return state, records


def test_every_step_is_reported_once_in_order():
    batches = [batch_of([1, -1], [1, 0], 2)] * 40
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


def test_the_state_of_mfac_is_reported():
    batches = [batch_of([1, -1], [1, 0], 2)] * 3
    _, records = train_scalar(mfac_jax.mfac(0.1, num_grads=2, damp=0.1), batches)
    assert records[-1][1]["damp"] == pytest.approx(0.1)
    for name in ("num_raised", "num_refused", "num_dropped"):
        assert records[-1][1][name] == 0


def test_a_loss_that_is_not_finite_stops_the_run():
    batches = [batch_of([1, -1], [0, 1], 2)] * 40
    with pytest.raises(UserError, match="step 2: training has diverged"):
        train_scalar(optax.sgd(float("inf")), batches)


def test_the_host_runs_ahead_of_the_device():
    """No step waits for the metrics of the one before it."""
    ready, dispatched = [], []

    class Later:
        def __init__(self):
            self.value = jnp.float32(1.0)

        def is_ready(self):
            return False

    def train_step(state, batch):
        dispatched.append(len(ready))
        return state, {"loss": Later()}

    def collect(step, metrics):
        ready.append(step)

    device_get = jax.device_get
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(
            jax,
            "device_get",
            lambda tree: device_get({k: v.value for k, v in tree.items()}),
        )
        batch = batch_of([1, -1], [1, 0], 2)
        training.train(None, train_step, [batch] * 50, 50, lambda step: 0.1, collect)
    assert ready == list(range(1, 51))
    assert dispatched[:10] == [0] * 10
