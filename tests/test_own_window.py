"""Tests a custom window, defined outside the package, against float64 NumPy."""

from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import oracles
import pytest
from float8_window import Float8Window

import mfac_jax
from mfac_jax import windows

pytestmark = pytest.mark.usefixtures("quick_compilation")

SHAPES = {"table": (9, 5), "kernel": (4, 3, 2), "bias": (7,), "scale": ()}


def stored(gradient):
    scale = np.float32(np.abs(gradient).max()) / np.float32(448)
    return np.asarray(jnp.asarray(gradient / scale, jnp.float8_e4m3fn), float) * scale


def test_every_step_matches_the_stored_gradients():
    rng = np.random.default_rng(0)
    gradients = [
        {name: np.float32(rng.normal(size=shape)) for name, shape in SHAPES.items()}
        for _ in range(15)
    ]
    rows = np.stack(
        [
            np.concatenate([stored(g[k]).ravel() for k in sorted(SHAPES)])
            for g in gradients
        ]
    )
    assert isinstance(Float8Window(), windows.Window)
    opt = mfac_jax.scale_by_mfac(6, 1e-3, window=Float8Window())
    state, update = opt.init(gradients[0]), jax.jit(opt.update, donate_argnums=1)
    for gradient, (window, row) in zip(
        gradients, oracles.ring_windows(rows, 6), strict=True
    ):
        direction, state = update(gradient, state)
        found = np.concatenate([np.ravel(x) for x in jax.tree.leaves(direction)])
        expected = oracles.dense_inverse_product(window, window[row], 1e-3)
        assert np.linalg.norm(found - expected) <= 1e-5 * np.linalg.norm(expected)
    assert mfac_jax.window_nbytes(state) == 6 * (45 + 24 + 7 + 1) + 4 * 6 * 4
    assert mfac_jax.diagnostics(state)["num_flushed"] == 0


def test_unsupported_leaves_are_named():
    class NoVectors(Float8Window):
        def unsupported(self, leaf, weight_decay=0.0):
            if weight_decay:
                return f"decays by {weight_decay}"
            return "is a vector" if leaf.ndim < 2 else None

    params = {"kernel": jnp.ones((2, 2)), "bias": jnp.ones(2)}
    opt = mfac_jax.scale_by_mfac(2, window=NoVectors())
    with pytest.raises(ValueError, match=r"^bias is a vector$"):
        opt.init(params)
    mask = {"kernel": True, "bias": False}
    opt = mfac_jax.mfac(0.1, 2, weight_decay=0.5, mask=mask, window=NoVectors())
    params["bias"] = jnp.ones((2, 1))
    with pytest.raises(ValueError, match=r"^kernel decays by 0\.5$"):
        opt.init(params)


def test_fields_of_another_kind_are_rejected():
    """`nnx.state` keeps only the field names: it would be read as the other kind."""

    class Halved(NamedTuple):
        values: jax.Array

    class HalvedWindow(Float8Window):
        def init(self, leaf, num_grads):
            return Halved(jnp.zeros((num_grads, *leaf.shape)))

    class ArrayWindow(Float8Window):
        def init(self, leaf, num_grads):
            return jnp.zeros((num_grads, *leaf.shape))

    class Raised(NamedTuple):
        rows: jax.Array
        num_raised: jax.Array

    class RaisedWindow(Float8Window):
        def init(self, leaf, num_grads):
            return Raised(jnp.zeros((num_grads, *leaf.shape)), jnp.zeros((), int))

    class Indexed(NamedTuple):
        rows: jax.Array
        index: jax.Array

    class IndexedWindow(Float8Window):
        def init(self, leaf, num_grads):
            return Indexed(jnp.zeros((num_grads, *leaf.shape)), jnp.zeros(num_grads))

    # A field that is no counter may share its name with one of the state.
    mfac_jax.scale_by_mfac(2, window=IndexedWindow()).init({"w": jnp.ones(3)})
    for window, message in [
        (RaisedWindow(), r"Raised has the field num_raised"),
        (HalvedWindow(), r"Halved has the fields of .*\.DenseGradients, values"),
        (ArrayWindow(), r"window of w must be a NamedTuple of arrays"),
    ]:
        with pytest.raises(TypeError, match=message):
            mfac_jax.scale_by_mfac(2, window=window).init({"w": jnp.ones(3)})
