"""Tests the damped Gram solve: agreement with the paper, accuracy in float32."""

import functools
import re

import jax
import jax.numpy as jnp
import numpy as np
import oracles
import pytest
from compiled import AS_FOR_USERS

import mfac_jax
from mfac_jax import _solve


@pytest.mark.parametrize("num_grads", [1, 2, 7, 24])
@pytest.mark.parametrize("damp", [1e-3, 1.0])
def test_solve_matches_the_recursion_of_the_paper(num_grads, damp):
    rng = np.random.default_rng(num_grads)
    window = rng.normal(size=(num_grads, 30))
    index = num_grads // 2
    recursive = oracles.recursive_inverse_product(window, window[index], damp)
    dense = oracles.dense_inverse_product(window, window[index], damp)
    np.testing.assert_allclose(recursive, dense, rtol=1e-9, atol=1e-12)
    with jax.enable_x64(True):
        solution = jax.jit(_solve.solve_for_row)(
            window @ window.T, np.zeros((num_grads, num_grads)), index, damp
        )
    direction = num_grads * np.asarray(solution.coefficients) @ window
    np.testing.assert_allclose(direction, recursive, rtol=1e-9, atol=1e-12)
    assert not solution.raised


def correlated(num_steps, share, size=300, seed=0):
    """Returns gradients of norm 1 that share a common part."""
    rng = np.random.default_rng(seed)
    common, own = rng.normal(size=size), rng.normal(size=(num_steps, size))
    gradients = share * common + (1 - share) * own
    return gradients / np.linalg.norm(gradients, axis=1, keepdims=True)


def follow(gradients, num_grads, damps, dtype="float32", initial=None, weights_of=None):
    """Solves at every step; yields the system, the row and the solution."""
    # A new function in every call, since a test monkeypatches what is traced.
    solve = jax.jit(lambda *args: _solve.solve_for_row(*args))
    inverse = _solve.initial_inverse(num_grads, jnp.asarray(damps[0], dtype))
    for t, (window, row) in enumerate(oracles.ring_windows(gradients, num_grads)):
        if t == 0 and initial is not None:
            inverse = initial.astype(dtype)
        gram = (window @ window.T).astype(dtype)
        damp = jnp.asarray(damps[t], dtype)
        weights = () if weights_of is None else (jnp.asarray(weights_of(row), dtype),)
        solution = solve(gram, inverse, row, damp, *weights)
        inverse = solution.inverse
        system = gram.astype(float) + num_grads * float(damp) * np.eye(num_grads)
        yield system, row, solution


def error(found, expected):
    return np.linalg.norm(found - expected) / np.linalg.norm(expected)


@pytest.mark.parametrize(
    ("dtype", "share", "damp", "bound"),
    [
        ("float32", 0.1, 1e-6, 2e-6),
        ("float32", 0.5, 1e-6, 2e-5),
        ("float64", 0.1, 1e-6, 1e-12),
    ],
)
@pytest.mark.parametrize("num_grads", [1, 2, 48])
def test_the_inverse_is_updated_for_many_windows_without_factorizing(
    monkeypatch, num_grads, dtype, share, damp, bound
):
    def fail(gram, damp):
        return jnp.full_like(gram, jnp.nan)

    monkeypatch.setattr(_solve, "_inverse_factor", fail)
    gradients = correlated(6 * num_grads, share)
    with jax.enable_x64(dtype == "float64"):
        for system, row, solution in follow(
            gradients, num_grads, [damp] * len(gradients), dtype
        ):
            exact = np.linalg.inv(system)
            assert error(solution.coefficients, exact[row]) < bound
            assert error(solution.inverse, exact) < 10 * bound
            np.testing.assert_array_equal(solution.inverse, solution.inverse.T)
            assert not solution.raised


def test_an_inverse_that_has_accumulated_errors_is_recomputed():
    """This happens now and then when gradients share nine tenths."""
    for system, row, solution in follow(correlated(300, 0.9), 48, [1e-4] * 300):
        exact = np.linalg.solve(system, np.eye(48)[row])
        assert error(solution.coefficients, exact) < 2e-4
        assert not solution.raised


@pytest.mark.parametrize(
    ("share", "damps"),
    [
        (0.5, [1e-4] * 40),  # Updates the previous inverse.
        (0.5, [1e-4, 2e-4] * 20),  # Factorizes.
        (1 - 1e-6, [1e-9] * 40),  # Raises the damping.
    ],
)
def test_solves_for_any_combination_of_the_rows(share, damps):
    def weights_of(row):
        return 0.9 ** ((row - np.arange(16)) % 16)

    num_raised = 0
    for system, row, solution in follow(
        correlated(40, share), 16, damps, weights_of=weights_of
    ):
        raised = 16 * (float(solution.damp) - damps[0]) * np.eye(16)
        if damps[1] == damps[0]:
            system = system + raised
        exact = np.linalg.solve(system, weights_of(row))
        assert error(solution.coefficients, exact) < (1e-2 if num_raised else 2e-5)
        num_raised += bool(solution.raised)
    assert (num_raised > 0) == (share > 0.9)


@pytest.mark.parametrize("other", [np.nan, 0.0, 1.0, -1.0, 1e30])
def test_a_wrong_previous_inverse_costs_no_accuracy(other):
    """Happens after the damping was raised or has changed."""
    initial = np.full((16, 16), other)
    for system, row, solution in follow(
        correlated(40, 0.5), 16, [1e-6] * 40, initial=initial
    ):
        exact = np.linalg.solve(system, np.eye(16)[row])
        assert error(solution.coefficients, exact) < 2e-5
        assert not solution.raised


@pytest.mark.parametrize("num_grads", [8, 33, 100])
def test_lapack_starts_no_threads_on_the_cpu(num_grads):
    """OpenBLAS threads triangular solves of any size and large factorizations."""
    matrix = jax.ShapeDtypeStruct((num_grads, num_grads), jnp.float32)
    scalar = jax.ShapeDtypeStruct((), jnp.float32)
    index = jax.ShapeDtypeStruct((), jnp.int32)
    solve = jax.jit(_solve.solve_for_row)
    program = solve.trace(matrix, matrix, index, scalar).lower(
        lowering_platforms=("cpu",)
    )
    text = program.as_text()
    assert "potrf" in text
    assert "trsm" not in text
    assert "triangular_solve" not in text
    sizes = re.findall(r"potrf.*-> \(tensor<(\d+)x", text)
    assert sizes
    assert max(map(int, sizes)) <= 32
    # On a GPU the library call is kept.
    program = solve.trace(matrix, matrix, index, scalar).lower(
        lowering_platforms=("cuda",)
    )
    assert "triangular_solve" in program.as_text()


@pytest.mark.parametrize("dtype", ["float32", "float64"])
@pytest.mark.parametrize("num_grads", [1, 31, 32, 33, 100, 257])
def test_both_forms_of_the_inverse_factor(num_grads, dtype):
    gradients = correlated(num_grads, 0.5, size=3 * num_grads)
    with jax.enable_x64(dtype == "float64"):
        gram = jnp.asarray(gradients @ gradients.T, dtype)
        system = np.asarray(gram, float) + num_grads * 1e-4 * np.eye(num_grads)
        expected = np.linalg.inv(np.linalg.cholesky(system))
        eps = jnp.finfo(dtype).eps
        found = jax.jit(_solve._inverse_factor)(gram, jnp.asarray(1e-4, dtype))
        assert error(found, expected) < 100 * eps
        np.testing.assert_array_equal(found, np.tril(found))
        # It is not finite if the matrix is not positive definite.
        bad = np.array(gram)
        bad[num_grads // 2, num_grads // 2] = -1
        found = jax.jit(_solve._inverse_factor)(bad, jnp.asarray(1e-4, dtype))
        assert not np.all(np.isfinite(found))


@pytest.mark.parametrize("factor", [0.5, 0.99, 1.01, 2.0])
def test_a_damping_that_changes_at_every_step_is_used_exactly(factor):
    damps = np.clip(1e-3 * factor ** np.arange(80), 1e-6, 1.0).astype(np.float32)
    for (system, row, solution), damp in zip(
        follow(correlated(80, 0.5), 16, damps), damps, strict=True
    ):
        assert solution.damp == damp
        exact = np.linalg.solve(system, np.eye(16)[row])
        assert error(solution.coefficients, exact) < 3e-5


def nearly_parallel(num_steps, difference, norm):
    rng = np.random.default_rng(0)
    base, noise = rng.normal(size=200), rng.normal(size=(num_steps, 200))
    noise *= np.linalg.norm(base) / np.linalg.norm(noise, axis=1, keepdims=True)
    gradients = base + difference * noise
    gradients *= norm / np.linalg.norm(gradients, axis=1, keepdims=True)
    return gradients.astype(np.float32)


@functools.partial(jax.jit, static_argnums=1, compiler_options=AS_FOR_USERS)
def run(gradients, num_grads, damp):
    """Returns the update, the damping and the number of raises at every step."""
    opt = mfac_jax.scale_by_mfac(num_grads, damp)

    def step(state, gradient):
        update, state = opt.update(gradient, state)
        return state, (update, state.damp, state.num_raised)

    return jax.lax.scan(step, opt.init(gradients[0]), gradients)[1]


@pytest.mark.parametrize(("num_grads", "bound"), [(8, 0.05), (32, 0.05), (128, 0.1)])
@pytest.mark.parametrize("damp", [1e-8, 1e-6])
def test_parallel_gradients_at_the_damping_reported(num_grads, bound, damp):
    num_steps = num_grads + num_grads // 4
    steps = {0, 1, num_grads // 2, num_grads - 1, num_grads, num_steps - 1}
    for difference in (0, 1e-6, 1e-4, 1e-2):
        for norm in (1, 10, 1000):
            gradients = nearly_parallel(num_steps, difference, norm)
            found = run(gradients, num_grads, np.float32(damp))
            updates, damps, num_raised = map(np.asarray, found)
            assert np.all(np.isfinite(updates))
            assert np.all(damps >= np.float32(damp))
            np.testing.assert_array_equal(
                np.diff(num_raised, prepend=0), damps > np.float32(damp)
            )
            for t, (window, row) in enumerate(
                oracles.ring_windows(gradients, num_grads)
            ):
                if t not in steps:
                    continue
                system = num_grads * float(damps[t]) * np.eye(num_grads)
                c = np.linalg.solve(window @ window.T + system, np.eye(num_grads)[row])
                expected = num_grads * c @ window
                error = np.linalg.norm(updates[t] - expected)
                assert error <= bound * np.linalg.norm(expected), (difference, norm, t)


@pytest.mark.parametrize("norm", [1e-3, 1.0, 30.0])
@pytest.mark.parametrize("damp", [1e-8, 1e-6, 1e-2])
def test_well_separated_gradients_never_raise_the_damping(norm, damp):
    gradients = np.random.default_rng(1).normal(size=(40, 200)).astype(np.float32)
    gradients *= norm / np.linalg.norm(gradients, axis=1, keepdims=True)
    _, damps, num_raised = run(gradients, 32, np.float32(damp))
    assert num_raised[-1] == 0
    assert damps[-1] == np.float32(damp)


@pytest.mark.parametrize("damp", [0.0, -1.0, np.nan, np.inf, 1e-45, 3e38])
@pytest.mark.parametrize("scale", [0.0, 1e-30, 1.0, 1e18])
def test_any_traced_damping_gives_a_finite_direction(damp, scale):
    gradients = np.full((2, 3), scale, np.float32)
    updates, _, _ = run(gradients, 4, np.float32(damp))
    assert np.all(np.isfinite(updates))
