"""Tests M-FAC in Adam's metric against float64 NumPy and in typical use."""

import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax
import oracles
import pytest
from compiled import AS_FOR_USERS
from test_mfac import PARAMS, STATIC, flat, gradients_like, run, scan_replicas
from test_windows import KINDS, STORED
from test_windows import PARAMS as TABLES

import mfac_jax

pytestmark = pytest.mark.usefixtures("quick_compilation")

B1, B2, EPS = 0.8, 0.95, 1e-6


def make(num_grads, damp=0.3, **arguments):
    arguments = {"b1": B1, "b2": B2, "eps": EPS} | arguments
    return mfac_jax.scale_by_adam_mfac(num_grads, damp, **arguments)


def run_states(opt, params, gradients):
    """Returns the updates and the states of all steps."""
    state, update, updates, states = opt.init(params), jax.jit(opt.update), [], []
    for gradient in gradients:
        step, state = update(gradient, state)
        updates.append(step)
        states.append(state)
    return updates, states


def assert_close(update, expected, tolerance=1e-5):
    error = np.linalg.norm(flat(update) - expected)
    assert error <= tolerance * np.linalg.norm(expected)


@pytest.mark.parametrize("num_grads", [1, 4, 6])
def test_every_update_matches_the_dense_matrix(num_grads):
    damp = 0.3
    # The gradients grow, so that the damping has to follow.
    gradients = [
        jax.tree.map(lambda x, t=t: x * 1.3**t, gradient)
        for t, gradient in enumerate(gradients_like(PARAMS, 2 * num_grads + 3))
    ]
    updates, states = run_states(make(num_grads, damp), PARAMS, gradients)
    scaled = oracles.in_adams_metric([flat(g) for g in gradients], B2, EPS)
    rows = []
    for update, state, (row, root) in zip(updates, states, scaled, strict=True):
        rows = [*rows, row][-num_grads:]
        shift = num_grads * float(state.mfac.damp)
        assert_close(update, oracles.adam_mfac_update(rows, root, B1, shift))
        wanted = damp * np.mean(np.sum(np.square(rows), axis=1))
        assert abs(wanted - shift) <= 0.1 * shift * (1 + 1e-5)
    assert state.mfac.num_raised == 0


@pytest.mark.parametrize("kind", KINDS)
def test_every_update_matches_the_stored_rows(kind):
    num_grads = 6
    gradients = list(gradients_like(TABLES, 2 * num_grads + 3))
    opt = make(num_grads, window=KINDS[kind])
    updates, states = run_states(opt, TABLES, gradients)
    # The scaled gradients that the window of each leaf receives.
    scaled, roots = {}, {}
    for name in TABLES:
        leaf = [np.asarray(g[name]).ravel() for g in gradients]
        shape = TABLES[name].shape
        pairs = list(oracles.in_adams_metric(leaf, B2, EPS))
        scaled[name] = STORED[kind]([np.float32(w).reshape(shape) for w, _ in pairs])
        roots[name] = [root for _, root in pairs]
    for t, (update, state) in enumerate(zip(updates, states, strict=True)):
        rows = [
            flat({name: scaled[name][s] for name in TABLES})
            for s in range(max(0, t + 1 - num_grads), t + 1)
        ]
        root = flat({name: roots[name][t] for name in TABLES})
        shift = num_grads * float(state.mfac.damp)
        # A value may round to its neighbor or miss the top k.
        assert_close(update, oracles.adam_mfac_update(rows, root, B1, shift), 2e-3)


def test_without_momentum_large_damping_is_adam():
    gradients = list(gradients_like(PARAMS, 7))
    adam = optax.scale_by_adam(b1=0.0, b2=B2, eps=EPS)
    expected, _ = run(adam, PARAMS, gradients)
    updates, _ = run(make(3, 1e5, b1=0.0), PARAMS, gradients)
    for update, other in zip(updates, expected, strict=True):
        assert_close(update, flat(other), 1e-4)


def test_the_scale_of_the_loss_does_not_matter():
    gradients = list(gradients_like(PARAMS, 9))
    expected, _ = run(make(4, eps=1e-30), PARAMS, gradients)
    for scale in 1e-6, 1e6:
        scaled = [jax.tree.map(lambda x, s=scale: s * x, g) for g in gradients]
        updates, _ = run(make(4, eps=1e-30), PARAMS, scaled)
        for update, other in zip(updates, expected, strict=True):
            assert_close(update, flat(other), 1e-4)


def test_a_repeated_gradient_gets_the_documented_step():
    gradient, damp = {"w": jnp.array([3.0, -4.0])}, 0.5
    updates, _ = run(make(4, damp, eps=1e-30), gradient, [gradient] * 6)
    for t, update in enumerate(updates):
        length = (1 + damp) / (min(t + 1, 4) + damp)
        np.testing.assert_allclose(update["w"], [length, -length], rtol=1e-4)


def test_float64_follows_the_parameters():
    with jax.enable_x64(True):
        params = jax.tree.map(lambda x: x.astype("float64"), PARAMS)
        gradients = list(gradients_like(params, 7))
        updates, states = run_states(make(3), params, gradients)
        scaled = oracles.in_adams_metric([flat(g) for g in gradients], B2, EPS)
        rows = []
        for update, state, (row, root) in zip(updates, states, scaled, strict=True):
            rows = [*rows, row][-3:]
            shift = 3 * float(state.mfac.damp)
            expected = oracles.adam_mfac_update(rows, root, B1, shift)
            assert_close(update, expected, 1e-12)


def test_dtypes_of_narrow_parameters_are_kept():
    params = {"h": jnp.ones(3, "bfloat16"), "f": jnp.ones(4, "float32")}
    opt = mfac_jax.adam_mfac(0.1, 3, weight_decay=0.01)
    updates, state = run(opt, params, gradients_like(params, 4))
    chex.assert_trees_all_equal_dtypes(updates[-1], params)
    chex.assert_trees_all_equal_dtypes(state, opt.init(params))
    assert optax.tree.get(state, "nu")["h"].dtype == jnp.float32


@pytest.mark.parametrize("bad", [np.nan, np.inf, 1e30])
@pytest.mark.parametrize("step", [0, 2, 5])
def test_a_gradient_that_is_not_finite_leaves_no_trace(bad, step):
    gradients = list(gradients_like(PARAMS, 8))
    opt = make(3)
    take = jax.jit(opt.update, compiler_options=AS_FOR_USERS)
    _, before = run(opt, PARAMS, gradients[:step], take)
    poisoned = jax.tree.map(lambda g: g, gradients[0])
    poisoned["embedding"] = poisoned["embedding"].at[1, 1].set(bad)
    update, after = take(poisoned, before)
    np.testing.assert_array_equal(flat(update), 0)
    mfac = before.mfac._replace(count=before.mfac.count + 1, num_rejected=1)
    chex.assert_trees_all_equal(after, before._replace(mfac=mfac))
    update, _ = take(gradients[step], after)
    expected, _ = take(gradients[step], before)
    np.testing.assert_allclose(flat(update), flat(expected), rtol=1e-6)


@pytest.mark.parametrize("scale", [0.0, 1e-30, 1e-20, 1e10, 1e18])
def test_extreme_finite_gradients_give_finite_updates(scale):
    gradients = [g * scale for g in gradients_like(jnp.zeros(20), 6)]
    updates, state = run(make(4), gradients[0], gradients)
    for update in updates:
        assert np.all(np.isfinite(update))
        assert np.max(np.abs(update)) < 10
    assert state.mfac.num_rejected == 0


def test_rows_that_no_batch_touches_are_not_updated():
    table = jnp.zeros((30, 4))
    gradients = [table.at[jnp.array([t, t + 1])].set(1.0 + t) for t in range(6)]
    updates, state = run(make(4, window=mfac_jax.RowSparseWindow(2)), table, gradients)
    for update in updates:
        np.testing.assert_array_equal(update[8:], 0)
    assert mfac_jax.diagnostics(state)["num_dropped"] == 0


def test_the_damping_may_follow_a_schedule():
    gradients = list(gradients_like(PARAMS, 6))
    _, states = run_states(make(2, lambda t: 0.5 * 2.0**t), PARAMS, gradients)
    damps = np.array([float(state.mfac.damp) for state in states])
    np.testing.assert_allclose(damps[2:] / damps[1:-1], 2.0, rtol=0.5)
    assert damps[-1] > 10 * damps[0]


def test_decay_is_decoupled():
    params = {"kernel": jnp.full(3, 2.0), "bias": jnp.full(2, 2.0)}
    gradients = list(gradients_like(params, 4))
    mask = {"kernel": True, "bias": False}
    updates, _ = run(
        mfac_jax.adam_mfac(0.1, 3, weight_decay=0.5, mask=mask), params, gradients
    )
    plain, _ = run(mfac_jax.adam_mfac(0.1, 3), params, gradients)
    for update, other in zip(updates, plain, strict=True):
        np.testing.assert_allclose(
            update["kernel"], other["kernel"] - 0.1, rtol=1e-5, atol=1e-7
        )
        np.testing.assert_allclose(update["bias"], other["bias"])


def test_injected_values_and_tracers_agree():
    arguments = {"learning_rate": 0.1, "damp": 0.5, "b1": B1, "b2": B2, "eps": EPS}
    arguments["weight_decay"] = 0.01
    gradients = list(gradients_like(PARAMS, 5))
    direct, _ = run(mfac_jax.adam_mfac(num_grads=3, **arguments), PARAMS, gradients)
    inject = optax.inject_hyperparams(mfac_jax.adam_mfac, static_args=STATIC)
    injected, _ = run(inject(num_grads=3, **arguments), PARAMS, gradients)
    for update, other in zip(injected, direct, strict=True):
        np.testing.assert_allclose(flat(update), flat(other), rtol=2e-5)


def test_momentum_restarts_when_a_window_is_refilled():
    gradients = list(gradients_like(PARAMS, 8))
    opt = make(4)
    _, state = run(opt, PARAMS, gradients[:5])
    state = mfac_jax.refill_windows(mfac_jax.drop_windows(state), opt.init(PARAMS))
    update, state = opt.update(gradients[5], state)
    scaled = list(oracles.in_adams_metric([flat(g) for g in gradients[:6]], B2, EPS))
    row, root = scaled[-1]
    shift = 4 * float(state.mfac.damp)
    assert_close(update, oracles.adam_mfac_update([row], root, B1, shift))


def test_a_tree_of_other_containers_is_matched_by_path():
    params, gradient = [jnp.ones(3)], (jnp.array([1.0, -2.0, 2.0]),)
    update, _ = make(3).update(gradient, make(3).init(params))
    np.testing.assert_allclose(update[0], [1, -1, 1], rtol=1e-5)


def test_an_epsilon_that_rounds_to_zero_rejects_nothing():
    inject = optax.inject_hyperparams(mfac_jax.adam_mfac, static_args=STATIC)
    opt, params = inject(0.1, num_grads=3), jnp.ones(3, jnp.float16)
    gradient = jnp.array([1.0, 0.0, 2.0], jnp.float16)
    update, state = jax.jit(opt.update)(gradient, jax.jit(opt.init)(params), params)
    np.testing.assert_allclose(update, [-0.1, 0, -0.1], rtol=1e-2)
    assert mfac_jax.diagnostics(state)["num_rejected"] == 0


def test_scan_and_vmap_over_replicas():
    opt = make(3)
    gradients = [list(gradients_like(PARAMS, 5, seed)) for seed in range(2)]
    updates = scan_replicas(opt, gradients)
    for replica in range(2):
        expected, _ = run(opt, PARAMS, gradients[replica])
        last = jax.tree.map(lambda x, r=replica: x[r, -1], updates)
        assert_close(last, flat(expected[-1]))


def test_gradients_of_another_tree_are_rejected():
    opt = make(3)
    with pytest.raises(TypeError, match=r"missing \['blocks/0', .* unexpected \['c'\]"):
        opt.update({"embedding": PARAMS["embedding"], "c": 1.0}, opt.init(PARAMS))


def test_a_donated_update_is_in_place():
    params = {"table": jnp.zeros((3000, 128)), "bias": jnp.zeros(512)}
    opt = mfac_jax.adam_mfac(1e-3, num_grads=64)
    state = opt.init(params)
    update = jax.jit(opt.update, donate_argnums=1)
    memory = update.lower(params, state, params).compile(AS_FOR_USERS).memory_analysis()
    gradient_nbytes = sum(leaf.nbytes for leaf in jax.tree.leaves(params))
    assert memory.alias_size_in_bytes >= 65 * gradient_nbytes
    assert memory.temp_size_in_bytes <= 5 * gradient_nbytes


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        ({"num_grads": 0}, ValueError, "num_grads must be at least 1, got 0"),
        ({"damp": 0}, ValueError, "damp must be positive .* got 0"),
        ({"b1": 1.0}, ValueError, r"b1 must be in \[0, 1\), got 1.0"),
        ({"b2": -0.1}, ValueError, r"b2 must be in \[0, 1\), got -0.1"),
        ({"b2": "0.9"}, TypeError, "b2 must be a number, got '0.9'"),
        ({"eps": 0.0}, ValueError, "eps must be positive and finite, got 0.0"),
        ({"weight_decay": -1.0}, ValueError, "weight_decay must be .* got -1.0"),
        ({"learning_rate": None}, TypeError, "learning_rate must be a number"),
        ({"window": "dense"}, TypeError, "window must be a window .* got 'dense'"),
    ],
)
def test_bad_arguments_are_rejected_by_the_factory(arguments, error, message):
    with pytest.raises(error, match=message):
        mfac_jax.adam_mfac(**{"learning_rate": 0.1, **arguments})
