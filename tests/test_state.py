"""Tests reading the state, and dropping and refilling its windows."""

import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx
from float8_window import Float8Window

import mfac_jax

pytestmark = pytest.mark.usefixtures("quick_compilation")

KINDS = {
    "dense": mfac_jax.DenseWindow(),
    "int8": mfac_jax.Int8Window(),
    "row_sparse": mfac_jax.RowSparseWindow(3),
    "topk": mfac_jax.TopKWindow(0.5),
}
PARAMS = {kind: jnp.ones((9, 4)) for kind in KINDS}
RNG = np.random.default_rng(0)
GRADIENTS = [
    jax.tree.map(lambda p: np.float32(RNG.normal(size=p.shape)), PARAMS)
    for _ in range(5)
]


def of_its_kind(path, leaf):
    del leaf
    return KINDS[path]


OPT = mfac_jax.mfac(0.1, 4, 1e-3, momentum=0.5, window=of_its_kind)


def run(opt, state, gradients):
    update = jax.jit(opt.update)
    for gradient in gradients:
        _, state = update(gradient, state, PARAMS)
    return state


def test_diagnostics_of_a_known_window():
    state = run(OPT, OPT.init(PARAMS), GRADIENTS[:3])
    bad = jax.tree.map(lambda x: np.full_like(x, np.nan), GRADIENTS[0])
    found = mfac_jax.diagnostics(run(OPT, state, [bad]))
    gram = np.asarray(optax.tree.get(state, "gram"), np.float64)
    expected = {
        "damp": np.float32(1e-3),
        "num_raised": 0,
        "num_rejected": 1,
        "num_saturated": 0,
        "num_stored": 3,
        "effective_rank": np.trace(gram) ** 2 / np.sum(gram**2),
        "num_dropped": 3 * 6,
    }
    assert found.keys() == expected.keys()
    for name, value in expected.items():
        np.testing.assert_allclose(found[name], value, rtol=1e-6)


@pytest.mark.parametrize("scale", [0.0, 1e-20, 1.0, 1e18])
def test_the_effective_rank_counts_independent_gradients(scale):
    opt = mfac_jax.scale_by_mfac(4)
    state, update = opt.init(jnp.zeros(5)), jax.jit(opt.update)
    for gradient in scale * jnp.eye(5)[jnp.array([0, 1, 0])]:
        _, state = update(gradient, state)
    found = mfac_jax.diagnostics(state)["effective_rank"]
    np.testing.assert_allclose(found, (9 / 5) * (scale > 1e-20), rtol=1e-6)


def test_diagnostics_of_none_and_of_several_states():
    assert mfac_jax.diagnostics(optax.adam(0.1).init(PARAMS)) == {}
    opt = optax.partition(
        {"a": mfac_jax.mfac(0.1, 2, 1e-3), "b": mfac_jax.mfac(0.1, 3, 1e-2)},
        {kind: "ab"[kind == "dense"] for kind in KINDS},
    )
    found = mfac_jax.diagnostics(opt.init(PARAMS))
    damps = [float(v) for name, v in found.items() if name.endswith("/damp")]
    np.testing.assert_allclose(damps, [1e-3, 1e-2])


class Model(nnx.Module):
    def __init__(self, params):
        for name, value in params.items():
            setattr(self, name, nnx.Param(value))


def nnx_optimizer(window):
    model = Model(PARAMS)
    opt = mfac_jax.mfac(0.1, 4, 1e-3, window=window)
    optimizer = nnx.Optimizer(model, opt, wrt=nnx.Param)
    step = nnx.jit(lambda model, optimizer, grads: optimizer.update(model, grads))
    for gradient in GRADIENTS:
        grads = jax.tree.map_with_path(
            lambda path, _, g=gradient: jnp.asarray(g[path[0].key]),
            nnx.state(model, nnx.Param),
        )
        step(model, optimizer, grads)
    return model, optimizer, run(opt, opt.init(PARAMS), GRADIENTS)


def test_the_nnx_forms_of_a_state_can_be_read():
    model, optimizer, expected = nnx_optimizer(of_its_kind)
    product = mfac_jax.inverse_fisher_vector_product(expected, PARAMS, 1.0)
    for state in optimizer.opt_state, nnx.state(optimizer):
        assert mfac_jax.window_nbytes(state) == mfac_jax.window_nbytes(expected)
        assert mfac_jax.window_table(state) == mfac_jax.window_table(expected)
        chex.assert_trees_all_close(
            mfac_jax.diagnostics(state), mfac_jax.diagnostics(expected), rtol=1e-5
        )
        for vector in PARAMS, nnx.state(model, nnx.Param):
            found = mfac_jax.inverse_fisher_vector_product(
                state, jax.tree.map(jnp.ones_like, vector), 1.0
            )
            for x, y in zip(
                jax.tree.leaves(found), jax.tree.leaves(product), strict=True
            ):
                np.testing.assert_allclose(x, y, rtol=1e-4, atol=1e-5)


def test_a_custom_kind_of_window_is_lost_in_nnx_state():
    _, optimizer, _ = nnx_optimizer(Float8Window())
    assert mfac_jax.diagnostics(nnx.state(optimizer))["num_stored"] == 4
    mfac_jax.inverse_fisher_vector_product(optimizer.opt_state, PARAMS, 1.0)
    with pytest.raises(TypeError, match=r"dense .*pass optimizer\.opt_state"):
        mfac_jax.inverse_fisher_vector_product(nnx.state(optimizer), PARAMS, 1.0)


def test_an_emptied_and_refilled_state_starts_with_an_empty_window():
    opt = mfac_jax.mfac(
        0.1, 4, lambda count: 1e-3 * (1 + count), 0.5, window=of_its_kind
    )
    state = run(opt, opt.init(PARAMS), GRADIENTS[:3])
    tree = {"step": 3, "opt_state": state}
    small = mfac_jax.drop_windows(tree)
    sizes = [x.size for x in jax.tree.leaves(small["opt_state"])]
    # The momentum average and counters.
    assert sum(sizes) <= 4 * 36 + 10
    like = {"step": 0, "opt_state": opt.init(PARAMS)}
    refilled = mfac_jax.refill_windows(small, like)
    assert refilled["step"] == 3
    refilled = refilled["opt_state"]
    chex.assert_trees_all_equal_shapes_and_dtypes(refilled, state)
    found, before = mfac_jax.diagnostics(refilled), mfac_jax.diagnostics(state)
    assert found["num_stored"] == found["effective_rank"] == 0
    assert found["num_dropped"] == before["num_dropped"] > 0
    assert optax.tree.get(refilled, "ScaleByMFACState").count == 3
    # The direction matches a window with one gradient, at the schedule's damping.
    first = mfac_jax.scale_by_mfac(4, 4e-3, window=of_its_kind)
    expected, _ = jax.jit(first.update)(GRADIENTS[3], first.init(PARAMS))
    state_of_mfac = optax.tree.get(refilled, "ScaleByMFACState")
    resumed = mfac_jax.scale_by_mfac(
        4, lambda count: 1e-3 * (1 + count), window=of_its_kind
    )
    direction, _ = jax.jit(resumed.update)(GRADIENTS[3], state_of_mfac)
    chex.assert_trees_all_close(direction, expected, rtol=1e-5)


def test_a_state_without_a_window_says_how_to_refill_it():
    dropped = mfac_jax.drop_windows(OPT.init(PARAMS))
    with pytest.raises(ValueError, match="refill_windows"):
        OPT.update(PARAMS, dropped, PARAMS)
    with pytest.raises(ValueError, match="refill_windows"):
        mfac_jax.inverse_fisher_vector_product(dropped, PARAMS, 1.0)
    assert mfac_jax.window_nbytes(dropped) == 0
    assert mfac_jax.window_table(dropped).count("\n") == 4


def test_a_window_is_refilled_from_a_state_that_fits():
    opt = mfac_jax.scale_by_mfac(4, window=of_its_kind)
    dropped = mfac_jax.drop_windows(opt.init(PARAMS))
    for like, message in [
        (dropped, "`like` must hold a state with a window"),
        (opt.init({"dense": jnp.ones((9, 4))}), r"other parameters: .* \['dense'\]"),
    ]:
        with pytest.raises(ValueError, match=message):
            mfac_jax.refill_windows(dropped, like)
    # The kind of window may change.
    dense = mfac_jax.scale_by_mfac(4)
    state = mfac_jax.refill_windows(dropped, dense.init(PARAMS))
    assert "num_dropped" not in mfac_jax.diagnostics(state)


def test_an_nnx_optimizer_is_emptied_and_refilled():
    model, optimizer, _ = nnx_optimizer(of_its_kind)
    with pytest.raises(TypeError, match=r"pass optimizer\.opt_state"):
        mfac_jax.drop_windows(nnx.state(optimizer))
    fresh = nnx.Optimizer(model, optimizer.tx, wrt=nnx.Param)
    dropped = mfac_jax.drop_windows(optimizer.opt_state)
    assert mfac_jax.window_nbytes(dropped) == 0
    optimizer.opt_state = mfac_jax.refill_windows(dropped, fresh.opt_state)
    optimizer.update(model, jax.tree.map(jnp.ones_like, nnx.state(model, nnx.Param)))
    assert mfac_jax.diagnostics(optimizer.opt_state)["num_stored"] == 1


@pytest.mark.parametrize("dtype", ["int32", "bool", "complex64"])
def test_vectors_and_gradients_are_real_and_floating_point(dtype):
    state = OPT.init(PARAMS)
    vector = {**PARAMS, "int8": jnp.ones((9, 4), dtype)}
    with pytest.raises(TypeError, match=f"int8 must be real .* got dtype {dtype}"):
        OPT.update(vector, state, PARAMS)
    with pytest.raises(TypeError, match=f"int8 must be real .* got dtype {dtype}"):
        mfac_jax.inverse_fisher_vector_product(state, vector, 1.0)


def test_other_optimizers_are_left_alone():
    state = optax.adam(0.1).init(PARAMS)
    chex.assert_trees_all_equal(mfac_jax.drop_windows(state), state)
    chex.assert_trees_all_equal(mfac_jax.refill_windows(state, state), state)
    for function in mfac_jax.window_nbytes, mfac_jax.window_table:
        with pytest.raises(ValueError, match=r"no M-FAC state"):
            function(state)
    with pytest.raises(ValueError, match=r"exactly one state .* found 0"):
        mfac_jax.inverse_fisher_vector_product(state, PARAMS, 1.0)


def test_paths_that_a_slash_makes_equal_are_told_apart():
    params = {"a/b": jnp.ones(2), "a": {"b": jnp.ones(3)}}
    opt = mfac_jax.scale_by_mfac(2, 1e-3)
    update, state = opt.update(params, opt.init(params))
    assert set(state.window) == {"['a/b']", "['a']['b']"}
    chex.assert_trees_all_equal_shapes(update, params)
