"""Tests agreement with recorded runs of the published PyTorch code."""

import functools
import json
import pathlib

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from compiled import AS_FOR_USERS

import mfac_jax

REFERENCE = pathlib.Path(__file__).parent / "reference"
META = json.loads((REFERENCE / "meta.json").read_text())
FLOAT32_BOUNDS = {
    "iid": 5e-6,
    "single": 5e-6,
    "partial": 5e-6,
    "correlated": 1e-4,
    "wide": 1e-4,
    "degenerate": 5e-6,
}
# Steps of `degenerate` whose window holds nearly parallel gradients.
PARALLEL_STEPS = [20, 21, 22, 23, 24, 25, 30]


def directions(case, dtype):
    """Runs a recorded case; returns the state, the updates and relative errors."""
    settings = META["ihvp"][case]
    recorded = np.load(REFERENCE / "ihvp.npz")
    opt = mfac_jax.scale_by_mfac(settings["m"], settings["damp"])

    def step(state, gradient):
        update, state = opt.update(gradient, state)
        return state, update

    gradients = jnp.asarray(recorded[f"{case}__grads"], dtype)
    state = opt.init(gradients[0])
    scan = jax.jit(functools.partial(jax.lax.scan, step), compiler_options=AS_FOR_USERS)
    state, updates = scan(state, gradients)
    expected = recorded[f"{case}__directions_f64"]
    norms = np.linalg.norm(expected, axis=1)
    errors = np.linalg.norm(np.asarray(updates, np.float64) - expected, axis=1)
    return state, np.asarray(updates), errors / np.where(norms == 0, 1, norms)


@pytest.mark.parametrize("case", FLOAT32_BOUNDS)
def test_directions_in_float32(case):
    state, updates, errors = directions(case, jnp.float32)
    assert updates.dtype == np.float32
    bounds = np.full(len(errors), FLOAT32_BOUNDS[case])
    if case == "degenerate":
        bounds[PARALLEL_STEPS] = 1e-2
        assert np.all(updates[7] == 0)
    np.testing.assert_array_less(errors, bounds)
    assert state.num_raised == 0
    assert state.damp == np.float32(META["ihvp"][case]["damp"])


@pytest.mark.parametrize("case", FLOAT32_BOUNDS)
def test_directions_and_probe_in_float64(case):
    with jax.enable_x64(True):
        state, _, errors = directions(case, jnp.float64)
        assert errors.max() < 1e-9
        assert state.num_raised == 0
        recorded = np.load(REFERENCE / "ihvp.npz")
        product = jax.jit(mfac_jax.inverse_fisher_vector_product)(
            state,
            jnp.asarray(recorded[f"{case}__probe"], jnp.float64),
            META["ihvp"][case]["damp"],
        )
    expected = recorded[f"{case}__probe_ihvp_f64"]
    error = np.asarray(product) - expected
    assert np.linalg.norm(error) < 1e-7 * np.linalg.norm(expected)


def closed_loop(name, dtype):
    """Trains the recorded network; returns losses and weights with the expected."""
    settings = META["trajectory"][name]
    recorded = np.load(REFERENCE / "trajectory.npz")
    x, y = jnp.asarray(recorded["x"], dtype), jnp.asarray(recorded["y"])
    params = {
        k: jnp.asarray(recorded[f"init_{k}"], dtype) for k in ("w1", "b1", "w2", "b2")
    }
    opt = mfac_jax.mfac(
        settings["lr"],
        settings["ngrads"],
        settings["damp"],
        settings["momentum"],
        settings["weight_decay"],
    )

    def loss_fn(params, batch):
        hidden = jnp.tanh(x[batch] @ params["w1"] + params["b1"][None])
        logits = hidden @ params["w2"] + params["b2"][None]
        losses = optax.softmax_cross_entropy_with_integer_labels(logits, y[batch])
        return jnp.mean(losses)

    def step(carry, batch):
        params, state = carry
        loss, grads = jax.value_and_grad(loss_fn)(params, batch)
        updates, state = opt.update(grads, state, params)
        return (optax.apply_updates(params, updates), state), loss

    scan = jax.jit(functools.partial(jax.lax.scan, step), compiler_options=AS_FOR_USERS)
    (params, _), losses = scan(
        (params, opt.init(params)), jnp.asarray(recorded["batches"])
    )
    expected = {k: recorded[f"{name}_final_{k}_f64"] for k in params}
    return np.asarray(losses), recorded[f"{name}_losses_f64"], params, expected


@pytest.mark.parametrize("name", META["trajectory"])
def test_closed_loop_in_float64(name):
    with jax.enable_x64(True):
        losses, expected_losses, params, expected = closed_loop(name, jnp.float64)
    np.testing.assert_allclose(losses, expected_losses, rtol=0, atol=1e-9)
    for key, weights in expected.items():
        np.testing.assert_allclose(params[key], weights, rtol=0, atol=1e-9)


@pytest.mark.parametrize("name", META["trajectory"])
def test_closed_loop_losses_in_float32(name):
    losses, expected_losses, *_ = closed_loop(name, jnp.float32)
    np.testing.assert_allclose(losses, expected_losses, rtol=0, atol=3e-5)
