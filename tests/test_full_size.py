"""Tests a window of realistic size against float64 NumPy."""

import jax
import jax.numpy as jnp
import numpy as np
import oracles
import pytest

import mfac_jax


@pytest.mark.slow
def test_a_thousand_gradients_in_float32():
    """A Gram matrix in TF32 would make the error 6e-4."""
    num_grads, num_steps, size = 1024, 1100, 32_768
    rng = np.random.default_rng(0)
    # Elements differ widely in scale, and half of each gradient is common to all.
    scale = np.exp(1.5 * rng.normal(size=size))
    common, own = rng.normal(size=size), rng.normal(size=(num_steps, size))
    gradients = np.float32((common + own) * scale / np.linalg.norm(scale))
    opt = mfac_jax.scale_by_mfac(num_grads, 1e-6)
    update = jax.jit(opt.update, donate_argnums=1)
    state, errors = jax.jit(opt.init)(jnp.zeros(size)), []
    expected = oracles.newest_directions(gradients, num_grads, 1e-6, start=1090)
    for step, gradient in enumerate(gradients):
        direction, state = update(gradient, state)
        if step >= 1090:
            exact = next(expected)
            errors.append(np.linalg.norm(direction - exact) / np.linalg.norm(exact))
    assert state.num_raised == 0
    assert max(errors) < 1e-4, errors
