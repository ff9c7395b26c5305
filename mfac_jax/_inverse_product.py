"""Inverse-Fisher products of vectors outside the window."""

from typing import Any

import jax
import jax.numpy as jnp
import optax

from mfac_jax import _checks, _solve
from mfac_jax._shares import IN_SHARD_MAP, AxisName, shares_of
from mfac_jax._state import check_not_emptied, find_states, match_windows
from mfac_jax.windows._layout import split_as


def inverse_fisher_vector_product(
    state: Any,
    vector: optax.Params,
    damp: jax.typing.ArrayLike,
    *,
    window_axis: AxisName | None = None,
) -> optax.Params:
    r"""Multiplies any vector by the inverse of the damped empirical Fisher.

    .. math::
        F^{-1} x = \frac{1}{\lambda} \left(x - G^T (m \lambda I + G G^T)^{-1} G x\right)

    For vectors outside the window: for an influence function, say, or a gradient of
    other data. It divides the difference of two nearly equal vectors by ``λ``, so in
    float32 it keeps about ``eps · ‖x‖ / (λ ‖F⁻¹ x‖)`` of relative accuracy, and where
    the window's gradients are too parallel for the dtype it is NaN: use float64 or more
    damping there. The optimizer itself never computes it this way.

    Args:
      state: The state of :func:`scale_by_mfac`, or an optimizer state that contains
        exactly one, such as the state of a chain or ``optimizer.opt_state`` of an
        ``nnx.Optimizer``.
      vector: ``x``, a tree with the structure and shapes of the parameters.
      damp: Damping ``λ > 0``, a number or a traced scalar.
      window_axis: Mesh axis over which windows are split (static); see
        :func:`scale_by_mfac`.

    Returns:
      ``F⁻¹ x``, with the structure, shapes and dtypes of ``vector``.

    Raises:
      TypeError: If ``damp`` is not a scalar, if the paths of ``vector`` are not those
        of the parameters, or if a leaf is not real and floating-point.
      ValueError: If ``damp`` is a number and not positive and finite, if ``state`` does
        not contain exactly one state of M-FAC, or if a shape of ``vector`` is not the
        parameter's.

    Examples:
      >>> import jax, jax.numpy as jnp, mfac_jax
      >>> opt = mfac_jax.scale_by_mfac(num_grads=2, damp=1.0)
      >>> state = opt.init(jnp.zeros(2))
      >>> _, state = opt.update(jnp.array([2.0, 0.0]), state)
      >>> x = mfac_jax.inverse_fisher_vector_product(state, jnp.ones(2), 1.0)
      >>> print('{:.4f} {:.4f}'.format(*x))
      0.3333 1.0000

    References:
      Frantar et al., `M-FAC: Efficient Matrix-Free Approximations of Second-Order
      Information <https://arxiv.org/abs/2107.03356>`_, 2021
    """
    damp = _checks.check_number("damp", damp, *_checks.POSITIVE)
    _checks.check_window_axis(window_axis)
    states = list(find_states(state).values())
    if len(states) != 1:
        raise ValueError(
            "inverse_fisher_vector_product needs exactly one state of "
            f"mfac_jax.scale_by_mfac, found {len(states)}."
        )
    [state] = states
    check_not_emptied(state)
    dtype = state.gram.dtype
    treedef = jax.tree.structure(vector)
    leaves = match_windows(vector, state.window, "vector")
    stored = [state.window[path] for path in leaves]
    vectors = list(leaves.values())
    shares = shares_of(len(state.gram), window_axis)
    if jax.sharding.get_abstract_mesh().manual_axes:
        shares.check(state.window, IN_SHARD_MAP)
    damp = jnp.asarray(damp, dtype)

    def multiply(windows, vectors):
        products = sum(
            (
                w.products(split_as(w, x), dtype)
                for w, x in zip(windows, vectors, strict=True)
            ),
            start=jnp.zeros(shares.num_rows, dtype),
        )
        return shares.gather(products)

    def subtract(windows, vectors, coefficients):
        own = -shares.own(coefficients)
        starts = [shares.once(x.astype(dtype)) for x in vectors]
        return [
            shares.total(w.combine(own, split_as(w, start)))
            for w, start in zip(windows, starts, strict=True)
        ]

    products = shares.run(multiply, stored, vectors)
    coefficients = _solve.damped_solve(state.gram, damp, products)
    differences = shares.run(subtract, stored, vectors, coefficients)
    return treedef.unflatten(
        (difference / damp).astype(x.dtype)
        for difference, x in zip(differences, vectors, strict=True)
    )
