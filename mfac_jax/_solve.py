r"""Solves the damped Gram system of M-FAC to the accuracy of its dtype.

With the window's gradients as the rows of :math:`G`, the Gram matrix
:math:`K = G G^T` and :math:`A = m \lambda I + K`, the inverse of the damped empirical
Fisher :math:`F = \lambda I + G^T G / m` is

.. math::
    F^{-1} x = \frac{1}{\lambda} (x - G^T A^{-1} G x)
    \qquad \text{(any x)}, \qquad
    F^{-1} g_i = m\, G^T A^{-1} e_i \qquad \text{(a row of the window)}.

Relation to the paper (Frantar et al., 2021, the dynamic algorithm)
-------------------------------------------------------------------
The paper's inverse-product recursion applies one rank-one update of the Fisher
after another,

.. math::
    F_i^{-1} x = F_{i-1}^{-1} x
      - F_{i-1}^{-1} g_i \frac{g_i^T F_{i-1}^{-1} x}{m + g_i^T F_{i-1}^{-1} g_i},
    \qquad F_0 = \lambda I ,

and stores two triangular tables:

* :math:`D_{ij} = g_i^T F_{i-1}^{-1} g_j` for :math:`j \ge i`. With :math:`m` added to
  its diagonal this is the upper factor :math:`U` of the pivot-free elimination
  :math:`K / \lambda + m I = L U`; the denominators :math:`m + D_{ii}` are its pivots.
* :math:`B`, the coefficients of :math:`F_{i-1}^{-1} g_i` on the stored gradients. It is
  :math:`L^{-1} / \lambda`: its rows follow from those above them by forward
  substitution with :math:`L_{ij} = D_{ji} / (m + D_{jj})`.

Since :math:`K / \lambda + m I = A / \lambda` is symmetric, :math:`L U` is its Cholesky
factorization with the square roots of the pivots moved, and one factorization of
:math:`A` followed by two triangular solves replaces the recursion, without its
:math:`1 / \lambda`. :math:`K` does not contain :math:`\lambda`, which may therefore
change at every step.

From one step to the next
-------------------------
A step replaces only row and column :math:`i` of :math:`A`, so :math:`A^{-1}` follows
from the previous inverse in :math:`O(m^2)`. With :math:`p` the previous column
:math:`i`, :math:`k` the new column of :math:`K` without its entry :math:`i`, and

.. math::
    Q = A^{-1} - \frac{p p^T}{p_i} \quad (\text{row and column } i \text{ are zero}),
    \qquad
    c = \frac{e_i - Q k}{K_{ii} + m \lambda - k^T Q k},
    \qquad
    A'^{-1} = Q + \frac{c c^T}{c_i} ,

:math:`c` is the solution that the direction needs. It is refined against the exact
:math:`K` before it enters the inverse, and has to pass a test: its residual must be
below the rounding of :math:`K`. The test fails once the inverse has accumulated errors
(the sooner, the worse :math:`A` is conditioned) or :math:`\lambda` has changed; then
:math:`A` is factorized and inverted from scratch.

When the dtype cannot resolve the damping
-----------------------------------------
:math:`K` is known to about :math:`\epsilon \max_j K_{jj}`. Where gradients are
nearly parallel and :math:`m \lambda` is below that, the factorization breaks down or is
finite and wrong. Every solution therefore has to pass :func:`_is_resolved`; until one
does, the system is solved again with more damping.

On the CPU
----------
LAPACK is OpenBLAS on the CPU, whose threads wait for one another on a busy machine: in
a triangular solve with a matrix on the right at any size, in a Cholesky factorization
from about 100 rows. With 32 gradients on two busy cores, 0.01 ms of work takes 8 to
30 ms. :func:`_inverse_factor_by_halves` leaves LAPACK only blocks that it computes in
one thread.
"""

from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
import jax.scipy.linalg
from jax import lax

# Largest relative error of a direction that counts as resolved.
_TOLERANCE = 0.01
# Refinements of a solution from the previous inverse. One is enough for most windows.
_REFINEMENTS = 2
# Factors of four: enough to cross the range of float32, so that the loop ends even if
# no damping can be resolved.
_MAX_RAISES = 64
# Largest block that LAPACK factorizes on the CPU, in one thread.
_BLOCK = 32


class Solution(NamedTuple):
    """The coefficients of a direction and the damping they belong to.

    Attributes:
      coefficients: ``c`` with ``(m λ I + K) c = e``, shape ``(m,)``.
      inverse: ``(m λ I + K)⁻¹``, shape ``(m, m)``.
      damp: The damping ``λ`` of that system, shape ``()``.
      raised: Whether ``λ`` is above the requested one, shape ``()``, boolean.
    """

    coefficients: jax.Array
    inverse: jax.Array
    damp: jax.Array
    raised: jax.Array


def initial_inverse(num_grads: int, damp: jax.Array) -> jax.Array:
    """Returns the inverse for an empty window, ``I / (m λ)``."""
    return jnp.eye(num_grads, dtype=damp.dtype) / (num_grads * damp)


def solve_for_row(
    gram: jax.Array,
    inverse: jax.Array,
    index: jax.Array,
    damp: jax.Array,
    weights: jax.Array | None = None,
) -> Solution:
    """Solves ``(m λ I + K) c = e`` for the least damping that can be resolved.

    Args:
      gram: The Gram matrix ``K``, shape ``(m, m)``; the solve uses its dtype.
      inverse: The inverse of the previous step, whose matrix differs from the new one
        in one row and column. The inverse of another matrix costs a factorization, not
        accuracy.
      index: The row of the window that is new and preconditioned, int32 scalar.
      damp: The requested damping ``λ``, a scalar of ``gram``'s dtype.
      weights: The right-hand side ``e``, shape ``(m,)``; ``None`` is ``e_index``. The
        damping is resolved for ``e_index``, regardless of the weights.

    Returns:
      The coefficients, always finite, and the damping used: ``damp`` itself wherever
      the dtype resolves it.
    """
    num_grads, eps = gram.shape[0], jnp.finfo(gram.dtype).eps
    unit = jax.nn.one_hot(index, num_grads, dtype=gram.dtype)
    largest = jnp.max(jnp.diagonal(gram))
    # A damping that is not positive makes F singular: the smallest normal number
    # replaces it and is reported in the state.
    damp = jnp.where(damp > 0, damp, jnp.finfo(gram.dtype).tiny).astype(gram.dtype)

    def attempt(state):
        attempts, damp, *_ = state
        damp = jnp.where(attempts == 0, damp, jnp.maximum(4 * damp, eps * largest))
        coefficients, residual, half = _refined_solve(gram, damp, unit)
        resolved = _is_resolved(gram, index, coefficients, residual)
        return attempts + 1, damp, coefficients, half, resolved

    def rounding(solution, largest):
        # The Gram matrix itself is only this accurate.
        return eps * largest * jnp.sum(jnp.abs(solution))

    coefficients, residual = _solve_from_previous(gram, inverse, index, damp, unit)
    is_accurate = (
        (jnp.max(jnp.abs(residual)) <= rounding(coefficients, largest))
        & (coefficients[index] > 0)
        & _is_resolved(gram, index, coefficients, residual)
    )
    updated = _without(inverse, index) + _square(coefficients, index)
    if weights is None:
        solution = coefficients
    else:
        # The inverse of another damping can be accurate for e_index alone.
        solution, residual = _refined(
            lambda x: _product(updated, x), gram, damp, weights
        )
        shifted = largest + num_grads * damp
        is_accurate &= jnp.max(jnp.abs(residual)) <= rounding(solution, shifted)

    def update():
        # False here, with the type that shard_map requires of both branches.
        return Solution(solution, updated, damp, ~is_accurate)

    def factorize():
        attempts, used, found, half, resolved = lax.while_loop(
            lambda state: ~state[-1] & (state[0] <= _MAX_RAISES),
            attempt,
            # Under vmap both branches run: an accurate solution needs no attempt.
            (jnp.zeros((), jnp.int32), damp, coefficients, inverse, is_accurate),
        )
        if weights is not None:
            found, _ = _refined(_by_factor(half), gram, used, weights)
        raised = attempts > 1
        # The inverse of a raised damping would not help the next step.
        new_inverse = lax.cond(raised, lambda: inverse, lambda: _product(half.T, half))
        return Solution(jnp.where(resolved, found, 0), new_inverse, used, raised)

    return lax.cond(is_accurate, update, factorize)


def _solve_from_previous(
    gram: jax.Array,
    inverse: jax.Array,
    index: jax.Array,
    damp: jax.Array,
    unit: jax.Array,
) -> tuple[jax.Array, jax.Array]:
    """Solves for row ``index`` with the previous inverse; also returns the residual."""
    shift = gram.shape[0] * damp
    pivot_row = _normalized_row(inverse, index)

    def without_row(x):
        y = _product(inverse, x) - pivot_row * _product(pivot_row, x)
        return jnp.where(unit > 0, 0, y)

    def residual(solution):
        return unit - (_product(gram, solution) + shift * solution)

    row = jnp.where(unit > 0, 0, gram[index])
    others = without_row(row)
    solution = (unit - others) / (gram[index, index] + shift - _product(row, others))
    new_row = solution / jnp.sqrt(solution[index])
    for _ in range(_REFINEMENTS):
        rest = residual(solution)
        solution += without_row(rest) + new_row * _product(new_row, rest)
    return solution, residual(solution)


def _normalized_row(inverse: jax.Array, index: jax.Array) -> jax.Array:
    return inverse[index] / jnp.sqrt(inverse[index, index])


def _without(inverse: jax.Array, index: jax.Array) -> jax.Array:
    """Returns the inverse of ``A`` without row and column ``index``, zero there."""
    row = _normalized_row(inverse, index)
    is_other = jnp.arange(len(row)) != index
    return jnp.where(
        is_other[:, None] & is_other[None, :], inverse - jnp.outer(row, row), 0
    )


def _square(coefficients: jax.Array, index: jax.Array) -> jax.Array:
    """Returns ``c cᵀ / c_i``, symmetric to the bit."""
    row = coefficients / jnp.sqrt(coefficients[index])
    return jnp.outer(row, row)


def _product(x: jax.Array, y: jax.Array) -> jax.Array:
    return jnp.matmul(x, y, precision=lax.Precision.HIGHEST)


def damped_solve(gram: jax.Array, damp: jax.Array, rhs: jax.Array) -> jax.Array:
    """Solves ``(m λ I + K) c = rhs`` at exactly this damping.

    Args:
      gram: The Gram matrix ``K``, shape ``(m, m)``.
      damp: The damping ``λ``, a scalar of ``gram``'s dtype.
      rhs: The right-hand side, shape ``(m,)``.

    Returns:
      ``c``, shape ``(m,)``; NaN where the dtype cannot factorize the matrix.
    """
    return _refined_solve(gram, damp, rhs)[0]


def _refined_solve(
    gram: jax.Array, damp: jax.Array, rhs: jax.Array
) -> tuple[jax.Array, jax.Array, jax.Array]:
    """Solves by one factorization and one step of refinement.

    Returns the solution, the residual and the inverse of the Cholesky factor.
    """
    half = _inverse_factor(gram, damp)
    solution, residual = _refined(_by_factor(half), gram, damp, rhs)
    return solution, residual, half


def _by_factor(half: jax.Array) -> Callable[[jax.Array], jax.Array]:
    """Returns the function ``x -> halfᵀ half x``, the product with the inverse."""
    return lambda x: _product(half.T, _product(half, x))


def _refined(
    apply_inverse: Callable[[jax.Array], jax.Array],
    gram: jax.Array,
    damp: jax.Array,
    rhs: jax.Array,
) -> tuple[jax.Array, jax.Array]:
    """Solves with an approximate inverse and refines; also returns the residual."""
    shift = gram.shape[0] * damp

    def residual(solution):
        return rhs - (_product(gram, solution) + shift * solution)

    solution = apply_inverse(rhs)
    solution = solution + apply_inverse(residual(solution))
    return solution, residual(solution)


def _inverse_factor(gram: jax.Array, damp: jax.Array) -> jax.Array:
    """Returns ``L⁻¹`` of the Cholesky factorization ``m λ I + K = L Lᵀ``."""
    shift = gram.shape[0] * damp * jnp.eye(*gram.shape, dtype=gram.dtype)

    def by_substitution(matrix):
        factor = jnp.linalg.cholesky(matrix, symmetrize_input=False)
        identity = jnp.eye(*matrix.shape, dtype=matrix.dtype)
        return jax.scipy.linalg.solve_triangular(factor, identity, lower=True)

    return lax.platform_dependent(
        gram + shift, cpu=_inverse_factor_by_halves, default=by_substitution
    )


def _inverse_factor_by_halves(matrix: jax.Array) -> jax.Array:
    """Factorizes and inverts block by block, which XLA computes as matrix products."""
    size = len(matrix)
    if size <= _BLOCK:
        factor = jnp.linalg.cholesky(matrix, symmetrize_input=False)
        return _inverse_triangular(factor)
    half = size // 2
    upper = _inverse_factor_by_halves(matrix[:half, :half])
    below = _product(matrix[half:, :half], upper.T)
    complement = matrix[half:, half:] - _product(below, below.T)
    lower = _inverse_factor_by_halves(complement)
    corner = -_product(lower, _product(below, upper))
    return jnp.block([[upper, jnp.zeros_like(corner.T)], [corner, lower]])


def _inverse_triangular(factor: jax.Array) -> jax.Array:
    """Inverts a lower triangular matrix by forward substitution, row by row."""
    identity = jnp.eye(*factor.shape, dtype=factor.dtype)

    def add_row(i, inverse):
        row = (identity[i] - _product(factor[i], inverse)) / factor[i, i]
        return lax.dynamic_update_index_in_dim(inverse, row, i, 0)

    return lax.fori_loop(0, len(factor), add_row, jnp.zeros_like(factor))


def _is_resolved(
    gram: jax.Array, index: jax.Array, coefficients: jax.Array, residual: jax.Array
) -> jax.Array:
    """Returns whether the direction of these coefficients is right to ``_TOLERANCE``.

    Bounds two errors from vectors of length ``m`` alone: the error of the system (its
    residual, and the rounding of ``K`` times the size of ``c``), and the error of the
    sum ``Gᵀ c``, whose terms must not cancel to less than the rounding of the largest.
    ``K_i · c`` is ``g_i · F⁻¹ g_i / m``, so it bounds the direction from below.
    A comparison with NaN is false, so nothing that is not finite passes.
    """
    eps = jnp.finfo(gram.dtype).eps
    norms = jnp.sqrt(jnp.diagonal(gram))
    largest = jnp.max(jnp.diagonal(gram))
    magnitude = jnp.abs(coefficients)
    system_error = jnp.max(jnp.abs(residual)) + eps * largest * jnp.sum(magnitude)
    sum_error = eps * norms[index] * jnp.vdot(magnitude, norms)
    direction = jnp.vdot(gram[index], coefficients, precision=lax.Precision.HIGHEST)
    return (system_error <= _TOLERANCE) & (sum_error <= _TOLERANCE * direction)
