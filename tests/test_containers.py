"""Tests every window kind in all that holds, maps or saves an optimizer state.

Each test compares three updates with a plain jitted loop.
"""

import functools
import pickle
from collections.abc import Callable

import chex
import equinox as eqx
import flax.serialization
import jax
import jax.numpy as jnp
import numpy as np
import optax
import orbax.checkpoint as ocp
import pytest
from flax import nnx
from flax.training.train_state import TrainState
from float8_window import Float8Window

import mfac_jax

pytestmark = pytest.mark.usefixtures("quick_compilation")

KINDS = {
    "dense": None,
    "bf16": mfac_jax.DenseWindow(jnp.bfloat16),
    "int8": mfac_jax.Int8Window(),
    "compact": mfac_jax.compact_windows(3),
    "topk": mfac_jax.TopKWindow(0.5),
    "float8": Float8Window(),
}
# mfac with every kind, adam_mfac with one.
OPTIMIZERS = {
    kind: (
        mfac_jax.mfac,
        {"learning_rate": 0.1, "damp": 1e-2, "momentum": 0.5, "window": window},
    )
    for kind, window in KINDS.items()
} | {
    "adam_mfac": (
        mfac_jax.adam_mfac,
        {"learning_rate": 0.1, "window": KINDS["compact"]},
    )
}
STATIC = ("num_grads", "mask", "window")
NUM_STEPS = 3


def make_gradients():
    rng = np.random.default_rng(0)
    gradients = []
    for _ in range(NUM_STEPS):
        table = np.zeros((9, 4))
        table[rng.choice(9, 3, replace=False)] = rng.normal(size=(3, 4))
        gradients.append(
            {
                "embedding": np.float32(table),
                "kernel": np.float32(rng.normal(size=(4, 2))),
                "bias": np.float32(rng.normal(size=2)),
            }
        )
    return gradients


GRADIENTS = make_gradients()
ALL = slice(NUM_STEPS)


def new_params():
    return {name: jnp.ones(x.shape) for name, x in GRADIENTS[0].items()}


def mfac(kind):
    factory, arguments = OPTIMIZERS[kind]
    return factory(num_grads=2, **arguments)


def jitted_step(opt):
    @functools.partial(jax.jit, donate_argnums=(0, 1))
    def step(params, state, gradient):
        updates, state = opt.update(gradient, state, params)
        return optax.apply_updates(params, updates), state

    return step


def run(opt, params, state, steps=ALL, step=None):
    step = step or jitted_step(opt)
    for gradient in GRADIENTS[steps]:
        params, state = step(params, state, gradient)
    return params, state


@functools.cache
def plain_run(kind):
    opt = mfac(kind)
    params = new_params()
    params, state = run(opt, params, opt.init(params))
    return jax.device_get(params), jax.device_get(state)


# Each function below trains in one container and returns the parameters.


class Model(nnx.Module):
    def __init__(self, extra=False):
        for name, value in new_params().items():
            setattr(self, name, nnx.Param(value))
        if extra:
            self.extra = nnx.Param(jnp.ones(3))


def nnx_gradient(model, gradient):
    state = nnx.state(model, nnx.Param)
    values = {"extra": jnp.ones(3), **gradient}
    return jax.tree.map_with_path(
        lambda path, _: jnp.asarray(values[path[0].key]), state
    )


def run_nnx(opt, *, jit, extra=False):
    model = Model(extra)
    optimizer = nnx.Optimizer(model, opt, wrt=nnx.Param)

    def step(model, optimizer, gradient):
        optimizer.update(model, gradient)

    if jit:
        step = nnx.jit(step, donate_argnums=(0, 1))
    for gradient in GRADIENTS:
        step(model, optimizer, nnx_gradient(model, gradient))
    return {name: getattr(model, name)[...] for name in GRADIENTS[0]}


def nnx_split_and_merge(kind):
    model = Model()
    optimizer = nnx.Optimizer(model, mfac(kind), wrt=nnx.Param)
    graph, state = nnx.split((model, optimizer))

    @functools.partial(jax.jit, donate_argnums=0)
    def step(state, gradient):
        model, optimizer = nnx.merge(graph, state)
        optimizer.update(model, gradient)
        return nnx.state((model, optimizer))

    for gradient in GRADIENTS:
        state = step(state, nnx_gradient(model, gradient))
    model, _ = nnx.merge(graph, state)
    return {name: getattr(model, name)[...] for name in GRADIENTS[0]}


def is_extra(path):
    return jax.tree_util.keystr(path).find("extra") >= 0


def nnx_partition_of_masked(kind):
    def mask(params):
        return jax.tree.map_with_path(lambda path, _: not is_extra(path), params)

    def labels(params):
        return jax.tree.map(lambda is_ours: "ba"[is_ours], mask(params))

    ours = optax.masked(mfac(kind), mask)
    return run_nnx(
        optax.partition({"a": ours, "b": optax.sgd(0.1)}, labels), jit=True, extra=True
    )


def train_state(kind):
    state = TrainState.create(apply_fn=None, params=new_params(), tx=mfac(kind))
    step = jax.jit(lambda s, g: s.apply_gradients(grads=g), donate_argnums=0)
    for gradient in GRADIENTS:
        state = step(state, gradient)
    return state.params


class Net(eqx.Module):
    embedding: jax.Array
    kernel: jax.Array
    bias: jax.Array
    activation: Callable = jax.nn.relu  # Non-array leaves.
    depth: int = 2
    name: str = "net"


def equinox(kind):
    net, opt = Net(**new_params()), mfac(kind)
    state = opt.init(eqx.filter(net, eqx.is_inexact_array))

    @eqx.filter_jit(donate="all")
    def step(net, state, gradient):
        params = eqx.filter(net, eqx.is_inexact_array)
        updates, state = opt.update(gradient, state, params)
        return eqx.apply_updates(net, updates), state

    for gradient in GRADIENTS:
        gradient = eqx.filter(Net(**gradient), eqx.is_inexact_array_like)
        net, state = step(net, state, jax.tree.map(jnp.asarray, gradient))
    return {name: getattr(net, name) for name in GRADIENTS[0]}


def inject_hyperparams(kind):
    factory, arguments = OPTIMIZERS[kind]
    inject = optax.inject_hyperparams(factory, STATIC, hyperparam_dtype=jnp.float32)
    opt = inject(num_grads=2, **arguments)
    params = new_params()
    return run(opt, params, opt.init(params))[0]


def optax_tree(kind):
    opt, params = mfac(kind), new_params()
    step = jitted_step(opt)
    params, state = run(opt, params, opt.init(params), slice(1), step)
    assert isinstance(
        optax.tree.get(state, "ScaleByMFACState"), mfac_jax.ScaleByMFACState
    )
    state = optax.tree.set(state, damp=optax.tree.get(state, "damp"))
    # One subtree is shaped like the parameters: `average` or `nu`.
    seen = []
    state = optax.tree.map_params(
        opt,
        lambda x, p: seen.append(x.shape == p.shape) or x,
        state,
        params,
        transform_non_params=lambda x: x,
    )
    assert seen == [True] * 3
    marked = optax.tree.map_params(
        opt, lambda _: "param", state, transform_non_params=lambda _: "other"
    )
    assert optax.tree.get(marked, "window") == optax.tree.get(marked, "gram") == "other"
    averages = optax.tree.get(marked, "nu" if kind == "adam_mfac" else "average")
    assert averages == dict.fromkeys(params, "param")
    return run(opt, params, state, slice(1, None), step)[0]


CONTAINERS = {
    "nnx eager": lambda kind: run_nnx(mfac(kind), jit=False),
    "nnx jit": lambda kind: run_nnx(mfac(kind), jit=True),
    "nnx split": nnx_split_and_merge,
    "nnx partition, masked": nnx_partition_of_masked,
    "TrainState": train_state,
    "equinox": equinox,
    "inject_hyperparams": inject_hyperparams,
    "optax.tree": optax_tree,
}


@pytest.mark.parametrize("kind", OPTIMIZERS)
@pytest.mark.parametrize("container", CONTAINERS)
def test_three_updates_match_a_plain_loop(container, kind):
    params = CONTAINERS[container](kind)
    expected, _ = plain_run(kind)
    for name, value in expected.items():
        assert np.linalg.norm(params[name] - value) <= 1e-6 * np.linalg.norm(value)


# Each function below saves a state and returns the restored one.


def orbax(state, like, path):
    with ocp.CheckpointManager(path) as manager:
        manager.save(0, args=ocp.args.StandardSave(state))
        manager.wait_until_finished()
        shapes = jax.tree.map(ocp.utils.to_shape_dtype_struct, like)
        return manager.restore(0, args=ocp.args.StandardRestore(shapes))


SAVED = {
    "orbax": orbax,
    "flax.serialization": lambda state, like, _: flax.serialization.from_bytes(
        like, flax.serialization.to_bytes(state)
    ),
    "pickle": lambda state, *_: pickle.loads(pickle.dumps(state)),
}


@pytest.mark.parametrize("kind", OPTIMIZERS)
@pytest.mark.parametrize("how", SAVED)
def test_a_restored_state_is_bit_identical_and_training_resumes(how, kind, tmp_path):
    opt, params = mfac(kind), new_params()
    step = jitted_step(opt)
    params, state = run(opt, params, opt.init(params), slice(2), step)
    restored = SAVED[how](state, opt.init(params), tmp_path)
    chex.assert_trees_all_equal_structs(restored, state)
    chex.assert_trees_all_equal_shapes_and_dtypes(restored, state)
    chex.assert_trees_all_equal(restored, state)
    end = run(opt, params, jax.tree.map(jnp.array, restored), slice(2, None), step)
    chex.assert_trees_all_equal(jax.device_get(end), plain_run(kind))
