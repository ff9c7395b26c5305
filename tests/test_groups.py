"""Tests grouped small leaves against the same leaves one by one."""

import jax
import jax.numpy as jnp
import numpy as np
import oracles
import pytest
from compiled import AS_FOR_USERS
from jax.sharding import AxisType, NamedSharding, PartitionSpec

import mfac_jax
from mfac_jax.windows import _groups

pytestmark = pytest.mark.usefixtures("quick_compilation")

# Grouping changes the order of these leaves. Some dtypes have one leaf, some several.
SHAPES = {
    "a_bias": ((7,), "float32"),
    "b_kernel": ((64, 80), "float32"),
    "c_scale": ((), "bfloat16"),
    "d_bias": ((3, 5), "float32"),
    "e_empty": ((0, 4), "float32"),
    "f_bias": ((9,), "bfloat16"),
    "g_half": ((11,), "float16"),
}
WINDOWS = {
    "dense": None,
    "bf16": mfac_jax.DenseWindow(jnp.bfloat16),
    "per leaf": lambda path, leaf: mfac_jax.DenseWindow(
        jnp.float16 if path == "f_bias" else None
    ),
    "compact": mfac_jax.compact_windows({"b_kernel": 64, "a_bias": 7}),
}


def gradients(num_steps):
    rng = np.random.default_rng(0)
    return [
        {
            name: jnp.asarray(rng.normal(size=shape), dtype)
            for name, (shape, dtype) in SHAPES.items()
        }
        for _ in range(num_steps)
    ]


def flat(tree):
    leaves = [np.asarray(x, np.float64).ravel() for x in jax.tree.leaves(tree)]
    return np.concatenate(leaves)


def run(window):
    opt = mfac_jax.scale_by_mfac(4, 1e-3, window=window)
    state, update = opt.init(gradients(1)[0]), jax.jit(opt.update)
    updates = []
    for gradient in gradients(6):
        direction, state = update(gradient, state)
        updates.append(direction)
    return updates, state


def groups_of(state):
    return _groups.group_leaves(list(state.window.values())).members


@pytest.mark.parametrize("window", WINDOWS.values(), ids=list(WINDOWS))
def test_a_group_matches_its_leaves(window, monkeypatch):
    updates, state = run(window)
    assert any(len(group) > 1 for group in groups_of(state))
    monkeypatch.setattr(_groups, "_SMALL", 0)
    expected, alone = run(window)
    assert all(len(group) == 1 for group in groups_of(alone))
    for name, (shape, dtype) in SHAPES.items():
        assert updates[0][name].shape == shape
        assert updates[0][name].dtype == dtype
    for x, y in zip(updates, expected, strict=True):
        # The last digit of bfloat16 may differ.
        assert np.linalg.norm(flat(x) - flat(y)) <= 1e-4 * np.linalg.norm(flat(y))
    jax.tree.map(np.testing.assert_array_equal, state.window, alone.window)
    np.testing.assert_allclose(state.gram, alone.gram, rtol=1e-6, atol=1e-6)


def test_directions_match_the_oracle():
    updates, _ = run(None)
    rows = np.stack([flat(g) for g in gradients(6)])
    for update, expected in zip(
        updates, oracles.newest_directions(rows, 4, 1e-3), strict=True
    ):
        error = np.linalg.norm(flat(update) - expected)
        assert error <= 1e-3 * np.linalg.norm(expected)  # bfloat16 leaves are rounded


@pytest.mark.parametrize(
    "name", [n for n, (shape, _) in SHAPES.items() if 0 not in shape]
)
def test_one_bad_value_rejects_the_gradient(name):
    good, bad = gradients(2)
    bad[name] = bad[name].at[(0,) * bad[name].ndim].set(jnp.nan)
    opt = mfac_jax.scale_by_mfac(4, 1e-3)
    _, state = opt.update(good, opt.init(good))
    update, after = opt.update(bad, state)
    assert after.num_rejected == 1
    assert np.all(flat(update) == 0)
    jax.tree.map(np.testing.assert_array_equal, after.window, state.window)


def test_a_window_of_only_small_leaves_is_not_copied():
    params = [jax.ShapeDtypeStruct((3072,), jnp.float32)] * 24
    opt = mfac_jax.scale_by_mfac(64)
    state = jax.eval_shape(opt.init, params)
    update = jax.jit(opt.update, donate_argnums=1).lower(params, state)
    update = update.compile(AS_FOR_USERS)
    limit = 0.1 * mfac_jax.window_nbytes(state)
    assert update.memory_analysis().temp_size_in_bytes < limit


@pytest.mark.parametrize("axis_type", [AxisType.Auto, AxisType.Explicit])
@pytest.mark.eight_devices
def test_sharded_and_replicated_leaves(axis_type):
    mesh = jax.make_mesh((4,), ("x",), axis_types=(axis_type,))
    specs = {"a": PartitionSpec("x"), "b": PartitionSpec(), "c": PartitionSpec()}
    shapes = {"a": (8,), "b": (7,), "c": (5,), "kernel": (64, 80)}
    rng = np.random.default_rng(0)
    trees = [
        {name: np.float32(rng.normal(size=shape)) for name, shape in shapes.items()}
        for _ in range(6)
    ]
    opt = mfac_jax.scale_by_mfac(4, 1e-3)
    update = jax.jit(opt.update)

    def run(place):
        state = jax.jit(opt.init)(place(trees[0]))
        for tree in trees:
            direction, state = update(place(tree), state)
        return direction, groups_of(state)

    def placed(tree):
        return {
            name: jax.device_put(
                x, NamedSharding(mesh, specs.get(name, PartitionSpec()))
            )
            for name, x in tree.items()
        }

    expected, _ = run(lambda tree: jax.tree.map(jnp.asarray, tree))
    with jax.set_mesh(mesh):
        direction, groups = run(placed)
    # Leaves that are sharded over explicit axes are not grouped.
    assert [1, 2] in groups if axis_type == AxisType.Explicit else [0, 1, 2] in groups
    jax.tree.map(
        lambda x, y: np.testing.assert_allclose(x, y, rtol=1e-4, atol=1e-5),
        direction,
        expected,
    )
