"""Tests mfac and scale_by_mfac: semantics, composition, invalid input."""

import ast
import math

import chex
import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import optax
import oracles
import pytest
from compiled import AS_FOR_USERS
from jax.sharding import PartitionSpec as P

import mfac_jax

pytestmark = pytest.mark.usefixtures("quick_compilation")

STATIC = ("num_grads", "mask", "window")


def gradients_like(params, num_steps, seed=0):
    """Yields ``num_steps`` random trees with the structure of ``params``."""
    rng = np.random.default_rng(seed)
    for _ in range(num_steps):
        yield jax.tree.map(
            lambda p: jnp.asarray(rng.normal(size=p.shape), p.dtype), params
        )


def run(opt, params, gradients, update=None):
    """Returns the updates of all steps and the last state."""
    state, update, updates = opt.init(params), update or jax.jit(opt.update), []
    for gradient in gradients:
        step, state = update(gradient, state, params)
        updates.append(step)
    return updates, state


PARAMS = {
    "embedding": jnp.ones((7, 3)),
    "blocks": [jnp.ones((2, 2, 2)), jnp.ones(())],
    "absent": None,
}


def flat(tree):
    leaves = [np.asarray(leaf, np.float64).ravel() for leaf in jax.tree.leaves(tree)]
    return np.concatenate(leaves)


@pytest.mark.parametrize("num_grads", [1, 4, 6])
def test_every_step_is_the_dense_inverse_times_the_gradient(num_grads):
    gradients = list(gradients_like(PARAMS, 2 * num_grads + 3))
    updates, state = run(mfac_jax.scale_by_mfac(num_grads, 1e-3), PARAMS, gradients)
    flat_gradients = np.stack([flat(g) for g in gradients])
    windows = oracles.ring_windows(flat_gradients, num_grads)
    for update, (window, row) in zip(updates, windows, strict=True):
        expected = oracles.dense_inverse_product(window, window[row], 1e-3)
        np.testing.assert_allclose(flat(update), expected, rtol=1e-4, atol=1e-4)
    chex.assert_trees_all_equal_structs(updates[0], PARAMS)
    np.testing.assert_allclose(state.gram, window @ window.T, rtol=1e-5, atol=1e-5)
    assert {path: w.values.shape for path, w in state.window.items()} == {
        "embedding": (num_grads, 7, 3),
        "blocks/0": (num_grads, 2, 2, 2),
        "blocks/1": (num_grads,),
    }


def test_m_is_constant_while_the_window_fills():
    opt = mfac_jax.scale_by_mfac(num_grads=100, damp=1e-6)
    gradient = jnp.array([3.0, 4.0])
    update, _ = opt.update(gradient, opt.init(gradient))
    np.testing.assert_allclose(update, 100 * gradient / 25, rtol=1e-5)


def test_large_damping_is_gradient_descent():
    gradients = list(gradients_like(PARAMS, 5))
    updates, _ = run(mfac_jax.scale_by_mfac(3, 1e8), PARAMS, gradients)
    for update, gradient in zip(updates, gradients, strict=True):
        np.testing.assert_allclose(flat(update), flat(gradient) / 1e8, rtol=1e-4)


class TestJaxTransforms(chex.TestCase):
    """The update computes the same values with and without `jit`."""

    @chex.variants(with_jit=True, without_jit=True, with_device=True, with_pmap=False)
    def test_variants(self):
        opt = mfac_jax.mfac(0.1, 3, 1e-3, 0.9, 0.01)
        gradients = list(gradients_like(PARAMS, 5))
        expected, _ = run(opt, PARAMS, gradients)
        updates, _ = run(opt, PARAMS, gradients, update=self.variant(opt.update))
        for update, other in zip(updates, expected, strict=True):
            # Where the terms of an element cancel, XLA's choice of fused multiply-adds
            # changes it by the rounding error of larger values.
            rounding = 4 * jnp.finfo(jnp.float32).eps * np.max(np.abs(flat(other)))
            np.testing.assert_allclose(
                flat(update), flat(other), rtol=1e-5, atol=rounding
            )


def scan_replicas(opt, gradients):
    """Returns the updates of all replicas and steps, computed by one program."""

    def stack(trees):
        return jax.tree.map(lambda *leaves: jnp.stack(leaves), *trees)

    def scan(gradients):
        def step(state, gradient):
            update, state = opt.update(gradient, state)
            return state, update

        return jax.lax.scan(step, opt.init(PARAMS), gradients)

    return jax.jit(jax.vmap(scan))(stack([stack(g) for g in gradients]))[1]


def test_scan_and_vmap_over_replicas():
    opt = mfac_jax.scale_by_mfac(3, 1e-3)
    gradients = [list(gradients_like(PARAMS, 5, seed)) for seed in range(2)]
    updates = scan_replicas(opt, gradients)
    for replica in range(2):
        expected, _ = run(opt, PARAMS, gradients[replica])
        for t in range(5):
            update = jax.tree.map(lambda x, r=replica, t=t: x[r, t], updates)
            np.testing.assert_allclose(flat(update), flat(expected[t]), rtol=1e-4)


@pytest.mark.eight_devices
def test_shard_map_with_a_schedule_of_the_damping():
    opt = mfac_jax.scale_by_mfac(3, lambda count: 1e-3 / (1 + count))
    gradients = list(gradients_like(PARAMS, 5))
    expected, _ = run(opt, PARAMS, gradients)
    mesh = jax.make_mesh((8,), ("replica",))
    update = jax.jit(jax.shard_map(opt.update, mesh=mesh, in_specs=P(), out_specs=P()))
    updates, _ = run(opt, PARAMS, gradients, update=update)
    for update, other in zip(updates, expected, strict=True):
        np.testing.assert_allclose(flat(update), flat(other), rtol=1e-4, atol=1e-7)


def test_vmap_raises_the_damping_of_the_replica_that_needs_it():
    opt = mfac_jax.scale_by_mfac(4, 1e-8)

    def last(gradient, noise):
        state = opt.init(gradient)
        for t in range(4):
            update, state = opt.update(gradient + noise[t], state)
        return update, state.num_raised

    gradients = jnp.full((2, 20), 10.0)
    noise = jax.random.normal(jax.random.key(0), (4, 20))
    noises = jnp.stack([jnp.zeros((4, 20)), 10 * noise])
    updates, num_raised = jax.jit(jax.vmap(last))(gradients, noises)
    assert num_raised[0] > 0
    assert num_raised[1] == 0
    assert np.all(np.isfinite(updates))


def test_composes_with_the_wrappers_of_optax():
    params = {"a": jnp.ones(4), "b": jnp.ones((2, 3))}
    gradients = list(gradients_like(params, 4))
    alone, _ = run(
        mfac_jax.mfac(0.1, 3, 1e-3), params["a"], [g["a"] for g in gradients]
    )
    only_a = {"a": True, "b": False}
    wrapped = {
        "masked": optax.masked(mfac_jax.mfac(0.1, 3, 1e-3), only_a),
        "partition": optax.partition(
            {"mfac": mfac_jax.mfac(0.1, 3, 1e-3), "sgd": optax.sgd(0.1)},
            {"a": "mfac", "b": "sgd"},
        ),
        "apply_if_finite": optax.apply_if_finite(
            optax.masked(mfac_jax.mfac(0.1, 3, 1e-3), only_a), 2
        ),
    }
    for name, opt in wrapped.items():
        updates, _ = run(opt, params, gradients)
        for update, expected in zip(updates, alone, strict=True):
            np.testing.assert_allclose(update["a"], expected, rtol=1e-6, err_msg=name)


def test_state_is_found_in_a_chain():
    opt = optax.chain(optax.clip_by_global_norm(1.0), mfac_jax.mfac(0.1, 3))
    _, state = run(opt, PARAMS, gradients_like(PARAMS, 2))
    found = optax.tree.get(state, "ScaleByMFACState")
    assert isinstance(found, mfac_jax.ScaleByMFACState)
    assert found.count == 2


SCHEDULES = {
    "learning_rate": lambda t: 0.1 / (1 + t),
    "damp": lambda t: 1.0 * (1 + t),
    "momentum": lambda t: 0.5 + 0.1 * t,
    "weight_decay": lambda t: 0.01 * t,
}


@pytest.mark.parametrize("name", SCHEDULES)
def test_schedules_injected_values_and_tracers_agree(name):
    hyperparams = {"learning_rate": 0.1, "damp": 1.0, "momentum": 0.9}
    hyperparams["weight_decay"] = 0.01
    gradients = list(gradients_like(PARAMS, 5))
    scheduled = {**hyperparams, name: SCHEDULES[name]}
    direct, _ = run(mfac_jax.mfac(num_grads=3, **scheduled), PARAMS, gradients)
    inject = optax.inject_hyperparams(mfac_jax.mfac, static_args=STATIC)
    injected, _ = run(inject(num_grads=3, **scheduled), PARAMS, gradients)

    state, traced = mfac_jax.mfac(num_grads=3, **hyperparams).init(PARAMS), []

    @jax.jit
    def update(gradient, state, value):
        opt = mfac_jax.mfac(num_grads=3, **{**hyperparams, name: value})
        return opt.update(gradient, state, PARAMS)

    for t, gradient in enumerate(gradients):
        step, state = update(gradient, state, SCHEDULES[name](t))
        traced.append(step)
    for t in range(5):
        np.testing.assert_allclose(flat(injected[t]), flat(direct[t]), rtol=2e-5)
        np.testing.assert_allclose(flat(traced[t]), flat(direct[t]), rtol=2e-5)
    constant, _ = run(mfac_jax.mfac(num_grads=3, **hyperparams), PARAMS, gradients)
    assert not np.allclose(flat(constant[-1]), flat(direct[-1]), rtol=1e-2)


def test_momentum_averages_the_preconditioned_steps():
    gradients = list(gradients_like(PARAMS, 6))
    steps, _ = run(mfac_jax.scale_by_mfac(3, 1e-3), PARAMS, gradients)
    updates, _ = run(mfac_jax.mfac(0.1, 3, 1e-3, momentum=0.8), PARAMS, gradients)
    velocity = 0
    for step, update in zip(steps, updates, strict=True):
        velocity = 0.8 * velocity + 0.2 * flat(step)
        np.testing.assert_allclose(flat(update), -0.1 * velocity, rtol=1e-5, atol=1e-7)


def test_weight_decay_enters_the_window_where_the_mask_says():
    params = {"kernel": jnp.full(3, 2.0), "bias": jnp.full(2, 2.0)}
    gradients = list(gradients_like(params, 4))
    decayed = [{**g, "kernel": g["kernel"] + 0.1 * params["kernel"]} for g in gradients]
    expected, _ = run(mfac_jax.mfac(0.1, 3, 1e-3), params, decayed)
    opt = mfac_jax.mfac(
        0.1, 3, 1e-3, weight_decay=0.1, mask={"kernel": True, "bias": False}
    )
    updates, state = run(opt, params, gradients)
    for update, other in zip(updates, expected, strict=True):
        np.testing.assert_allclose(flat(update), flat(other), rtol=1e-5)
    window = optax.tree.get(state, "ScaleByMFACState").window
    np.testing.assert_allclose(window["kernel"].values[1], decayed[1]["kernel"])


SCALARS = {
    "Python": float,
    "NumPy": np.float32,
    "NumPy array": np.asarray,
    "JAX": jnp.float32,
}


@pytest.mark.parametrize("scalar", SCALARS.values(), ids=list(SCALARS))
def test_a_concrete_scalar_of_any_library_is_a_number(scalar):
    gradient = {"embedding": jnp.ones((9, 4))}
    opt = mfac_jax.mfac(0.1, 2, weight_decay=scalar(0))
    opt.update(gradient, opt.init(gradient))
    opt = mfac_jax.mfac(0.1, 2, weight_decay=scalar(0.01))
    with pytest.raises(ValueError, match="params"):
        opt.update(gradient, opt.init(gradient))
    window = mfac_jax.compact_windows(3)
    opt = mfac_jax.mfac(0.1, 2, weight_decay=scalar(0.01), window=window)
    with pytest.raises(ValueError, match=r"weight_decay 0\.01, .* 3 of 9 rows"):
        opt.init(gradient)
    for name, value in [
        ("damp", -1.0),
        ("damp", 0.0),
        ("momentum", 1.0),
        ("weight_decay", -0.5),
        ("learning_rate", np.nan),
    ]:
        with pytest.raises(ValueError, match=f"{name} must be .* got {value}[.]$"):
            mfac_jax.mfac(**{"learning_rate": 0.1, name: scalar(value)})


def holds_an_average(state):
    return (50, 20) in [x.shape for x in jax.tree.leaves(state)]


@pytest.mark.parametrize("zero", [None, 0, 0.0, np.float32(0)])
def test_no_momentum_costs_nothing(zero):
    params = {"w": jnp.ones((50, 20))}
    opt = mfac_jax.mfac(0.1, 2, momentum=zero)
    assert not holds_an_average(opt.init(params))


@pytest.mark.parametrize("momentum", [None, 0.0, 0.5])
def test_an_injected_momentum_may_change(momentum):
    params = {"w": jnp.ones((50, 20))}
    opt = optax.inject_hyperparams(mfac_jax.mfac, STATIC)(0.1, 2, momentum=momentum)
    state = opt.init(params)
    assert holds_an_average(state) == (momentum is not None)
    updates, _ = jax.jit(opt.update)(params, state, params)
    if momentum is not None:
        state.hyperparams["momentum"] = jnp.float32(0.9)
        changed, _ = jax.jit(opt.update)(params, state, params)
        share = (1 - 0.9) / (1 - momentum)
        np.testing.assert_allclose(changed["w"], share * updates["w"], rtol=1e-5)


def test_a_schedule_may_hold_a_table():
    rates = jnp.array([0.5, 0.1])
    schedule = jax.tree_util.Partial(lambda table, count: table[count], rates)
    gradient = jnp.ones(3)
    opt = mfac_jax.mfac(schedule, 1, 1.0)
    update, _ = opt.update(gradient, opt.init(gradient))
    np.testing.assert_allclose(update, -0.5 * gradient / 4, rtol=1e-6)


def test_the_ring_does_not_depend_on_the_count():
    """After a schedule restarts, a step still overwrites the oldest gradient."""
    gradients = list(gradients_like(PARAMS, 6))
    opt = mfac_jax.scale_by_mfac(4, 1e-3)
    expected, _ = run(opt, PARAMS, gradients)
    _, state = run(opt, PARAMS, gradients[:5])
    update, state = opt.update(gradients[5], state._replace(count=jnp.zeros((), int)))
    np.testing.assert_allclose(flat(update), flat(expected[5]), rtol=1e-4, atol=1e-4)
    assert state.count == 1
    assert state.index == 2


def test_the_readme_recipes_work_together():
    """Injects hyperparameters, initializes eagerly and donates the state."""
    opt = optax.inject_hyperparams(mfac_jax.mfac, STATIC)(0.1, num_grads=3, damp=1e-3)
    state = opt.init(PARAMS)
    step = jax.jit(opt.update, donate_argnums=1)
    for gradient in gradients_like(PARAMS, 3):
        _, state = step(gradient, state, PARAMS)
    assert state.hyperparams["damp"] == np.float32(1e-3)


def test_a_donated_step_leaves_the_callers_arrays_alone():
    damp = jnp.float32(1e-3)
    gradient = jnp.ones(3)
    for value in damp, lambda count: damp:
        opt = mfac_jax.scale_by_mfac(2, value)
        jax.jit(opt.update, donate_argnums=1)(gradient, opt.init(gradient))
        assert not damp.is_deleted()


def test_float32_hyperparameters_move_bfloat16_parameters():
    params = jnp.zeros(4, jnp.bfloat16)
    hyperparams = {"learning_rate": 0.5, "num_grads": 2, "momentum": 0.999}
    inject = optax.inject_hyperparams(
        mfac_jax.mfac, STATIC, hyperparam_dtype=jnp.float32
    )
    opt = inject(**hyperparams)
    state, moved = opt.init(params), params
    for gradient in gradients_like(params, 20):
        updates, state = opt.update(gradient, state, moved)
        moved = optax.apply_updates(moved, updates)
    assert np.all(moved != params)
    # In bfloat16 the momentum would be 1.
    with pytest.raises(ValueError, match=r"momentum .* got 1\.0 in bfloat16; .*_dtype"):
        optax.inject_hyperparams(mfac_jax.mfac, STATIC)(**hyperparams).init(params)


@pytest.mark.parametrize(
    "window",
    [
        None,
        mfac_jax.DenseWindow(jnp.bfloat16),
        mfac_jax.Int8Window(),
        mfac_jax.RowSparseWindow(3),
        mfac_jax.TopKWindow(0.5),
    ],
)
def test_strict_promotion(window):
    params = {"h": jnp.ones((3, 2), "bfloat16"), "f": jnp.ones((9, 4), "float32")}
    decay = 0.0 if isinstance(window, mfac_jax.RowSparseWindow) else 0.01
    opt = mfac_jax.mfac(0.1, 3, 1e-3, 0.9, decay, window=window)
    expected, _ = run(opt, params, gradients_like(params, 4))
    with jax.numpy_dtype_promotion("strict"):
        updates, state = run(opt, params, gradients_like(params, 4))
        mfac_jax.diagnostics(state)
    for update, other in zip(updates, expected, strict=True):
        np.testing.assert_allclose(flat(update), flat(other), rtol=1e-6)


@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf, 1e30])
@pytest.mark.parametrize("step", [0, 2, 5])
def test_a_gradient_that_is_not_finite_leaves_no_trace(bad, step):
    gradients = list(gradients_like(PARAMS, 8))
    opt = mfac_jax.scale_by_mfac(3, lambda t: 1e-3 * (1 + t))
    take = jax.jit(opt.update, compiler_options=AS_FOR_USERS)
    _, before = run(opt, PARAMS, gradients[:step], take)
    poisoned = jax.tree.map(lambda g: g, gradients[0])
    poisoned["embedding"] = poisoned["embedding"].at[1, 1].set(bad)
    update, after = take(poisoned, before)
    np.testing.assert_array_equal(flat(update), 0)
    chex.assert_trees_all_equal(
        after, before._replace(count=before.count + 1, num_rejected=1)
    )
    # The ring continues at the same row; the schedule has advanced.
    update, after = take(gradients[step], after)
    shifted = mfac_jax.scale_by_mfac(3, lambda t: 1e-3 * (2 + t))
    expected, _ = jax.jit(shifted.update)(gradients[step], before)
    np.testing.assert_allclose(flat(update), flat(expected), rtol=1e-6)
    assert after.num_rejected == 1


def test_momentum_decays_over_a_rejected_gradient():
    opt = mfac_jax.mfac(0.1, 3, 1e-3, momentum=0.5)
    gradients = [jnp.array([1.0, 2.0]), jnp.array([jnp.nan, 1.0])]
    updates, _ = run(opt, gradients[0], gradients)
    np.testing.assert_allclose(updates[1], 0.5 * updates[0], rtol=1e-6)


def test_zero_and_repeated_gradients():
    gradient = jnp.array([1.0, -2.0, 2.0])
    gradients = [gradient, jnp.zeros(3), gradient, gradient]
    updates, state = run(mfac_jax.scale_by_mfac(4, 0.5), gradient, gradients)
    np.testing.assert_array_equal(updates[1], 0)
    for update, copies in zip(
        [updates[0], updates[2], updates[3]], [1, 2, 3], strict=True
    ):
        # k copies of g: F = λ I + (k/m) g gᵀ.
        np.testing.assert_allclose(update, gradient / (0.5 + copies * 9 / 4), rtol=1e-5)
    assert state.num_raised == 0


@pytest.mark.parametrize("scale", [1e-30, 1e-20, 1e10, 1e18])
def test_extreme_finite_gradients_give_finite_updates(scale):
    gradients = [g * scale for g in gradients_like(jnp.zeros(20), 6)]
    updates, _ = run(mfac_jax.scale_by_mfac(4, 1e-6), gradients[0], gradients)
    for update in updates:
        assert np.all(np.isfinite(update))


def test_a_narrow_update_saturates_and_is_counted():
    # m g / (m λ + g²) is 5e6 here, which float16 cannot hold.
    opt = mfac_jax.scale_by_mfac(1, 1e-14)
    gradient = jnp.full((), 2e-7, jnp.float16)
    update, state = opt.update(gradient, opt.init(gradient))
    assert update == jnp.finfo(jnp.float16).max
    assert state.num_saturated == 1
    _, state = opt.update(jnp.ones((), jnp.float16), state)
    assert state.num_saturated == 1


def test_mixed_dtypes_share_one_gram_matrix():
    with jax.enable_x64(True):
        params = {"h": jnp.ones(3, "bfloat16"), "f": jnp.ones(4, "float32")}
        narrow = mfac_jax.mfac(0.1, 3, 1e-3, 0.9, 0.01).init(params)
        assert optax.tree.get(narrow, "gram").dtype == jnp.float32
        params["d"] = jnp.ones(5, "float64")
        inject = optax.inject_hyperparams(
            mfac_jax.mfac, static_args=STATIC, hyperparam_dtype=jnp.float32
        )
        for opt in [
            mfac_jax.mfac(0.1, 3, 1e-3, 0.9, 0.01),
            mfac_jax.mfac(**{**SCHEDULES, "num_grads": 3}),
            inject(0.1, 3, 1e-3, 0.9, 0.01),
        ]:
            updates, state = run(opt, params, gradients_like(params, 4))
            chex.assert_trees_all_equal_dtypes(updates[-1], params)
            assert optax.tree.get(state, "gram").dtype == jnp.float64
            chex.assert_trees_all_equal_dtypes(state, opt.init(params))


@pytest.mark.parametrize("params", [{}, (), {"a": None, "b": []}])
def test_empty_trees(params):
    updates, state = run(mfac_jax.mfac(0.1, 3, 1e-3, 0.9, 0.01), params, [params] * 2)
    assert updates[-1] == params
    assert optax.tree.get(state, "num_rejected") == 0


def test_init_accepts_shapes():
    opt = mfac_jax.mfac(0.1, 3, 1e-3, 0.9, 0.01)
    shapes = jax.eval_shape(lambda: PARAMS)
    chex.assert_trees_all_equal(opt.init(shapes), opt.init(PARAMS))
    chex.assert_trees_all_equal_shapes_and_dtypes(
        jax.eval_shape(opt.init, shapes), opt.init(PARAMS)
    )


def test_window_function_sees_paths_and_leaves():
    seen = {}

    def window(path, leaf):
        seen[path] = leaf.shape
        wide = path.endswith("embedding")
        return mfac_jax.DenseWindow("float32" if wide else "bfloat16")

    state = mfac_jax.scale_by_mfac(3, window=window).init(PARAMS)
    assert seen == {"embedding": (7, 3), "blocks/0": (2, 2, 2), "blocks/1": ()}
    assert state.window["embedding"].values.dtype == jnp.float32
    assert state.window["blocks/0"].values.dtype == jnp.bfloat16


def test_inverse_fisher_vector_product_of_a_tree():
    gradients = list(gradients_like(PARAMS, 5))
    _, state = run(mfac_jax.scale_by_mfac(3, 1e-3), PARAMS, gradients)
    product = mfac_jax.inverse_fisher_vector_product(state, PARAMS, 0.1)
    window = np.stack([flat(gradients[i]) for i in (3, 4, 2)])
    expected = oracles.dense_inverse_product(window, flat(PARAMS), 0.1)
    np.testing.assert_allclose(flat(product), expected, rtol=1e-4, atol=1e-5)
    chex.assert_trees_all_equal_structs(product, PARAMS)


def test_donated_update_is_in_place_and_compiles_once():
    params = {
        "table": jnp.zeros((3000, 128)),
        "kernel": jnp.zeros((512, 256)),
        "bias": jnp.zeros(512),
    }
    opt = mfac_jax.mfac(1e-3, num_grads=128)
    update = jax.jit(opt.update, donate_argnums=1)
    state = opt.init(params)
    gradient_nbytes = sum(leaf.nbytes for leaf in jax.tree.leaves(params))
    window_nbytes = 128 * gradient_nbytes
    memory = update.lower(params, state, params).compile(AS_FOR_USERS).memory_analysis()
    assert memory.alias_size_in_bytes >= window_nbytes
    assert memory.temp_size_in_bytes <= max(0.05 * window_nbytes, 3 * gradient_nbytes)
    for gradient in gradients_like(params, 3):
        _, state = update(gradient, state, params)
    assert update._cache_size() == 1


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        ({"num_grads": 0}, ValueError, "num_grads must be at least 1, got 0"),
        ({"num_grads": -3}, ValueError, "num_grads .* got -3"),
        ({"num_grads": 2.0}, TypeError, "num_grads must be an integer, got 2.0"),
        ({"num_grads": True}, TypeError, "num_grads must be an integer, got True"),
        ({"damp": -1}, ValueError, "damp must be positive .* got -1"),
        ({"damp": 0}, ValueError, "damp must be positive .* singular, got 0"),
        ({"damp": float("nan")}, ValueError, "damp .* got nan"),
        ({"damp": float("inf")}, ValueError, "damp .* got inf"),
        ({"damp": "1e-6"}, TypeError, "damp must be a number .* '1e-6'"),
        ({"momentum": 1.0}, ValueError, r"momentum must be in \[0, 1\), got 1.0"),
        ({"momentum": -0.1}, ValueError, "momentum .* got -0.1"),
        ({"weight_decay": -0.1}, ValueError, "weight_decay .* at least 0, got -0.1"),
        ({"window": "bf16"}, TypeError, "window must be .* got 'bf16'"),
        ({"window": mfac_jax.DenseWindow}, TypeError, "window must be .* got"),
        ({"learning_rate": "1e-4"}, TypeError, "learning_rate must be .* got '1e-4'"),
        ({"learning_rate": None}, TypeError, "learning_rate must be .* got None"),
        ({"learning_rate": PARAMS}, TypeError, r"learning_rate .* a dict.*\.init"),
        ({"learning_rate": jnp.ones(3)}, TypeError, r"learning_rate .* shape \(3,\)"),
        (
            {"learning_rate": eqx.nn.Linear(2, 1, key=jax.random.key(0))},
            TypeError,
            r"learning_rate .* a Linear.*\.init\(params\)",
        ),
        ({"learning_rate": jnp.array(True)}, TypeError, "learning_rate .* got"),
        ({"learning_rate": np.str_("1e-4")}, TypeError, "learning_rate .* got"),
        ({"damp": np.complex64(1)}, TypeError, "damp must be a number"),
        ({"learning_rate": True}, TypeError, "learning_rate must be .* got True"),
        ({"learning_rate": math.inf}, ValueError, "learning_rate .* finite, got inf"),
        ({"damp": None}, TypeError, "damp must be a number .* got None"),
    ],
)
def test_bad_arguments_are_rejected_by_the_factory(arguments, error, message):
    with pytest.raises(error, match=message):
        mfac_jax.mfac(**{"learning_rate": 0.1, **arguments})


@pytest.mark.parametrize("learning_rate", [0, -0.1, np.float32(0.5)])
def test_any_finite_learning_rate_is_accepted(learning_rate):
    gradient = jnp.ones(3)
    opt = mfac_jax.mfac(learning_rate, 1, 1.0)
    update, _ = opt.update(gradient, opt.init(gradient))
    np.testing.assert_allclose(update, -learning_rate * gradient / 4, rtol=1e-6)


def test_bad_results_of_a_window_function_name_the_leaf():
    opt = mfac_jax.scale_by_mfac(2, window=lambda path, leaf: "dense")
    with pytest.raises(TypeError, match=r"must return a window .* 'dense' for 'w'"):
        opt.init({"w": jnp.zeros(2)})


def test_compact_windows_without_a_call_is_an_error():
    opt = mfac_jax.scale_by_mfac(2, window=mfac_jax.compact_windows)
    with pytest.raises(TypeError, match=r"window=compact_windows\(max_rows\)"):
        opt.init({"w": jnp.zeros(2)})


@pytest.mark.parametrize("dtype", ["int32", "complex64"])
def test_parameters_that_are_not_real_floats_are_rejected(dtype):
    with pytest.raises(TypeError, match=f"w has dtype {dtype}.*optax.masked"):
        mfac_jax.scale_by_mfac(2).init({"w": jnp.zeros(2, dtype)})


def test_non_array_leaves_are_named():
    model = eqx.nn.MLP(2, 1, 3, 1, key=jax.random.key(0))
    with pytest.raises(TypeError, match=r"activation is .*is_inexact_array"):
        mfac_jax.mfac(0.1, 2).init(model)
    with pytest.raises(TypeError, match=r"n is 3\..*is_inexact_array"):
        mfac_jax.mfac(0.1, 2).init({"n": 3})


def test_a_python_float_is_a_parameter():
    opt = mfac_jax.mfac(0.1, 4, 1e-3, 0.5, 0.01)
    updates, _ = run(opt, {"w": 3.0}, [{"w": 2.0}, {"w": 1.0}], update=opt.update)
    arrays = [{"w": jnp.float32(2)}, {"w": jnp.float32(1)}]
    expected, _ = run(opt, {"w": jnp.float32(3)}, arrays)
    for update, other in zip(updates, expected, strict=True):
        np.testing.assert_allclose(update["w"], other["w"], rtol=1e-5)


def test_a_state_with_another_num_grads_is_rejected():
    state = mfac_jax.mfac(0.1, 16).init(PARAMS)
    opt = mfac_jax.mfac(0.1, 32)
    with pytest.raises(ValueError, match="holds 16 gradients, but num_grads is 32"):
        jax.jit(opt.update)(PARAMS, state, PARAMS)


@pytest.mark.parametrize(
    ("gradients", "error", "message"),
    [
        ({"w": jnp.zeros((2, 3))}, TypeError, r"tree .* missing \['b'\]"),
        ({"w": jnp.zeros(1), "v": None}, TypeError, r"tree .* missing \['b'\]"),
        (
            {"w": jnp.zeros((2, 3)), "v": jnp.zeros(2)},
            TypeError,
            r"missing \['b'\], unexpected \['v'\]",
        ),
        (
            {"w": jnp.zeros((3, 2)), "b": jnp.zeros(2)},
            ValueError,
            r"w .*\(2, 3\).*3, 2",
        ),
        ({"w": jnp.zeros((2, 3)), "b": jnp.zeros(())}, ValueError, r"b .*\(2,\).*\(\)"),
    ],
)
def test_gradients_unlike_the_parameters_are_rejected(gradients, error, message):
    opt = mfac_jax.scale_by_mfac(2)
    state = opt.init({"w": jnp.zeros((2, 3)), "b": jnp.zeros(2)})
    with pytest.raises(error, match=message):
        opt.update(gradients, state)
    with pytest.raises(error, match=message):
        mfac_jax.inverse_fisher_vector_product(state, gradients, 1.0)


@pytest.mark.parametrize("factory", [mfac_jax.mfac, mfac_jax.scale_by_mfac])
def test_num_grads_missing_from_static_args_is_reported(factory):
    arguments = {"num_grads": 3}
    if factory is mfac_jax.mfac:
        arguments["learning_rate"] = 0.1
    opt = optax.inject_hyperparams(factory)(**arguments)
    with pytest.raises(TypeError, match="static_args") as caught:
        jax.jit(opt.init)(jnp.zeros(2))
    advice = ast.literal_eval(str(caught.value).rpartition("static_args=")[2][:-1])
    optax.inject_hyperparams(factory, advice)(**arguments).init(jnp.zeros(2))


def test_a_window_function_missing_from_static_args_is_reported():
    inject = optax.inject_hyperparams(mfac_jax.mfac, ("num_grads", "mask"))
    opt = inject(0.1, num_grads=3, window=mfac_jax.compact_windows(5))
    with pytest.raises(TypeError, match="'window' to static_args"):
        opt.init({"embedding": jnp.zeros((9, 2))})
