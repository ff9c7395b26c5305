"""Tests windows on a mesh of eight devices against the same updates on one."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import linen, nnx
from flax.training.train_state import TrainState
from float8_window import Float8Window
from jax.sharding import AxisType, NamedSharding, PartitionSpec

import mfac_jax

pytestmark = [
    pytest.mark.usefixtures("quick_compilation"),
    pytest.mark.eight_devices,
]

# One leaf per kind, so that one program covers them all.
KINDS = {
    "dense": None,
    "bf16": mfac_jax.DenseWindow(jnp.bfloat16),
    "int8": mfac_jax.Int8Window(),
    "row_sparse": mfac_jax.RowSparseWindow(8),
    "topk": mfac_jax.TopKWindow(0.3, block_size=16),
    "float8": Float8Window(),
}
NUM_GRADS = 16


def make_gradients(num_steps):
    rng = np.random.default_rng(0)
    for _ in range(num_steps):
        gradient = {kind: np.float32(rng.normal(size=(64, 8))) for kind in KINDS}
        gradient["row_sparse"][8:] = 0
        yield gradient


@pytest.mark.parametrize("sharded_gradients", [False, True])
def test_windows_split_along_their_gradients(sharded_gradients):
    """Scattering a sharded row into the Gram matrix once gave wrong values."""
    opt = mfac_jax.scale_by_mfac(NUM_GRADS, 1e-4, window=lambda path, _: KINDS[path])
    params = {kind: jnp.zeros((64, 8)) for kind in KINDS}
    mesh = jax.make_mesh((8,), ("m",), axis_types=(AxisType.Auto,))
    split, whole = (NamedSharding(mesh, PartitionSpec(*a)) for a in (["m"], []))
    state = opt.init(params)
    shardings = jax.tree.map(lambda _: whole, state)._replace(
        window=jax.tree.map(lambda x: split if x.ndim else whole, state.window)
    )
    of_gradients = dict.fromkeys(params, split if sharded_gradients else whole)
    update = jax.jit(
        opt.update,
        in_shardings=(of_gradients, shardings),
        out_shardings=(of_gradients, shardings),
    )
    alone, expected_state = jax.jit(opt.update), state
    state = jax.device_put(state, shardings)
    for gradient in make_gradients(70):
        expected, expected_state = alone(gradient, expected_state)
        direction, state = update(jax.device_put(gradient, of_gradients), state)
        for kind, value in expected.items():
            error = np.linalg.norm(direction[kind] - value)
            assert error <= 2e-6 * np.linalg.norm(value), kind
    assert state.num_raised == 0
    np.testing.assert_allclose(state.gram, expected_state.gram, rtol=2e-6, atol=2e-5)


class Partitioned(nnx.Module):
    def __init__(self):
        init = nnx.with_partitioning(nnx.initializers.lecun_normal(), ("x", "y"))
        self.dense = nnx.Linear(
            8, 8, use_bias=False, kernel_init=init, rngs=nnx.Rngs(0)
        )


OPTIMIZERS = {
    "mfac": (mfac_jax.mfac(0.1, 6, 1e-2, 0.5), lambda state: state[1]),
    "adam_mfac": (mfac_jax.adam_mfac(0.1, 6), lambda state: state[0].mfac),
}


@pytest.mark.parametrize("name", OPTIMIZERS)
@pytest.mark.parametrize("axis_type", [AxisType.Auto, AxisType.Explicit])
def test_metadata_of_nnx_stays_with_the_parameters(axis_type, name):
    """Applied to the window, the kernel's axes would split its six gradients."""
    x = np.float32(np.random.default_rng(0).normal(size=(8, 8)))
    transformation, state_of = OPTIMIZERS[name]

    def train():
        model = Partitioned()
        opt = nnx.Optimizer(model, transformation, wrt=nnx.Param)

        @nnx.jit
        def step(model, opt):
            opt.update(
                model, nnx.grad(lambda model: jnp.mean(model.dense(x) ** 2))(model)
            )

        for _ in range(3):
            step(model, opt)
        window = state_of(opt.opt_state).window["dense/kernel"].values[...]
        return np.asarray(model.dense.kernel[...]), window.sharding.spec

    mesh = jax.make_mesh((4, 2), ("x", "y"), axis_types=(axis_type, axis_type))
    with jax.set_mesh(mesh):
        kernel, spec = train()
    assert spec == PartitionSpec(None, "x", "y")
    with jax.set_mesh(jax.make_mesh((1, 1), ("x", "y"))):
        expected, _ = train()
    np.testing.assert_allclose(kernel, expected, rtol=1e-5, atol=1e-6)


class Boxed(linen.Module):
    @linen.compact
    def __call__(self, x):
        init = linen.with_partitioning(linen.initializers.lecun_normal(), ("x", "y"))
        return linen.Dense(8, use_bias=False, kernel_init=init)(x)


def test_metadata_of_linen_stays_with_the_parameters():
    x, opt = jnp.ones((8, 8)), mfac_jax.mfac(0.1, 6, 1e-2, 0.5)
    mesh = jax.make_mesh((4, 2), ("x", "y"), axis_types=(AxisType.Auto,) * 2)

    def init():
        params = Boxed().init(jax.random.key(0), x)
        return TrainState.create(apply_fn=Boxed().apply, params=params, tx=opt)

    with jax.set_mesh(mesh):
        specs = linen.get_partition_spec(jax.eval_shape(init))
        shardings = jax.tree.map(lambda spec: NamedSharding(mesh, spec), specs)
        state = jax.jit(init, out_shardings=shardings)()
        window = state.opt_state[1].window["params/Dense_0/kernel"].values
        assert window.shape == (6, 8, 8)
        gradient = jax.grad(lambda p: jnp.mean(jnp.square(Boxed().apply(p, x))))
        before = jax.tree.leaves(state.params)[0]
        state = state.apply_gradients(grads=gradient(state.params))
    assert not np.array_equal(before, jax.tree.leaves(state.params)[0])
