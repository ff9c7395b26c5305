"""Tests the dense window: storage dtype, accuracy of the sums, sharding."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AxisType, NamedSharding, PartitionSpec

import mfac_jax
from mfac_jax import windows

pytestmark = pytest.mark.usefixtures("quick_compilation")


def row_products(window, vector):
    return windows.DenseGradients(window).products(vector, jnp.float32)


@pytest.mark.parametrize("shape", [(), (5,), (70_001,), (512, 300), (4, 128, 500)])
def test_row_products_keep_float32_precision(shape):
    # A sequential sum is least accurate for entries of one sign.
    window = np.random.default_rng(0).uniform(0.5, 1, (6, *shape)).astype(np.float32)
    vector = window[2]
    products = jax.jit(row_products)(window, vector)
    flat = window.reshape(6, -1).astype(np.float64)
    np.testing.assert_allclose(products, flat @ flat[2], rtol=1e-6)


@pytest.mark.parametrize("shape", [(3,), (512, 300)])
def test_row_products_under_vmap(shape):
    rng = np.random.default_rng(0)
    windows = rng.normal(size=(3, 4, *shape)).astype(np.float32)
    products = jax.vmap(lambda w: row_products(w, w[1]))(windows)
    flat = windows.reshape(3, 4, -1).astype(np.float64)
    expected = np.einsum("rij,rj->ri", flat, flat[:, 1])
    np.testing.assert_allclose(products, expected, rtol=1e-5, atol=1e-5 * flat[0].size)


@pytest.mark.parametrize(
    ("leaf_dtype", "spec", "stored"),
    [
        ("bfloat16", mfac_jax.DenseWindow(), "float32"),
        ("float16", mfac_jax.DenseWindow(None), "float32"),
        ("float32", mfac_jax.DenseWindow(), "float32"),
        ("float32", mfac_jax.DenseWindow("bfloat16"), "bfloat16"),
        ("float32", mfac_jax.DenseWindow(jnp.float16), "float16"),
        ("bfloat16", mfac_jax.DenseWindow(np.float32), "float32"),
    ],
)
def test_dtype_of_the_window(leaf_dtype, spec, stored):
    opt = mfac_jax.scale_by_mfac(3, window=spec)
    state = opt.init({"w": jnp.zeros((2, 5), leaf_dtype)})
    assert state.window["w"].values.dtype == stored
    assert state.window["w"].values.shape == (3, 2, 5)
    assert state.gram.dtype == jnp.float32
    update, state = opt.update({"w": jnp.ones((2, 5), leaf_dtype)}, state)
    assert update["w"].dtype == leaf_dtype
    assert state.window["w"].values.dtype == stored


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_a_rounded_window_preconditions_the_gradient_as_stored(dtype):
    # The raw gradient's rounding residual lies outside the window's span and would
    # come back multiplied by 1/λ.
    gradients = np.random.default_rng(0).normal(size=(12, 300)).astype(np.float32)
    rounded = np.asarray(jnp.asarray(gradients, dtype), np.float32)
    updates = {}
    for name, window, fed in [
        ("narrow", mfac_jax.DenseWindow(dtype), gradients),
        ("wide", mfac_jax.DenseWindow(), rounded),
    ]:
        opt = mfac_jax.scale_by_mfac(8, 1e-6, window=window)
        state, update = opt.init(fed[0]), jax.jit(opt.update)
        for gradient in fed:
            updates[name], state = update(gradient, state)
    np.testing.assert_allclose(updates["narrow"], updates["wide"], rtol=1e-5, atol=1e-6)


def test_a_gradient_that_overflows_a_narrow_window_is_rejected():
    opt = mfac_jax.scale_by_mfac(4, window=mfac_jax.DenseWindow(jnp.float16))
    state = opt.init(jnp.zeros(3))
    update, state = opt.update(jnp.full(3, 1e6), state)
    assert state.num_rejected == 1
    np.testing.assert_array_equal(update, 0)


@pytest.mark.parametrize("dtype", ["int8", "complex64", "bool", "no such dtype"])
def test_other_dtypes_are_rejected(dtype):
    with pytest.raises(ValueError, match=f"float32, bfloat16.*{dtype}"):
        mfac_jax.DenseWindow(dtype)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("axis_type", [AxisType.Auto, AxisType.Explicit])
@pytest.mark.eight_devices
def test_windows_are_sharded_like_the_parameters(axis_type, dtype):
    mesh = jax.make_mesh((4, 2), ("x", "y"), axis_types=(axis_type, axis_type))
    spec = PartitionSpec("x", "y")
    rng = np.random.default_rng(0)
    gradients = rng.normal(size=(6, 8, 10)).astype(np.float32)
    opt = mfac_jax.scale_by_mfac(4, 1e-4, window=mfac_jax.DenseWindow(dtype))
    update = jax.jit(opt.update)

    def run(place):
        state = jax.jit(opt.init)(place(gradients[0]))
        for gradient in gradients:
            direction, state = update(place(gradient), state)
        return direction, state

    expected, _ = run(jnp.asarray)
    with jax.set_mesh(mesh):
        direction, state = run(lambda x: jax.device_put(x, NamedSharding(mesh, spec)))
    assert direction.sharding.spec == spec
    assert state.window[""].values.sharding.spec == PartitionSpec(None, "x", "y")
    np.testing.assert_allclose(direction, expected, rtol=1e-4)
