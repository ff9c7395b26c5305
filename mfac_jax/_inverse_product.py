"""Inverse-Fisher products with vectors outside the window."""

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

    Use it for vectors outside the window, such as influence functions or gradients of
    other data. It divides the difference of two nearly equal vectors by ``λ``: expect a
    relative error of up to ``eps · ‖F‖ / λ``, and NaN where the gradients of the window
    are too parallel for the dtype. Use float64 or more damping there. The optimizer
    itself does not use this formula.

    Args:
      state: The state of :func:`~mfac_jax.scale_by_mfac`, or an optimizer state that
        contains exactly one, such as the state of a chain or ``optimizer.opt_state`` of
        an ``nnx.Optimizer``. In the state of :func:`~mfac_jax.scale_by_adam_mfac` the
        window stores gradients in Adam's metric, and ``F`` is the Fisher matrix there.
      vector: ``x``, a tree with the structure and shapes of the parameters.
      damp: Damping ``λ > 0``, in units of the squared gradient norm: a number or a
        traced scalar.
      window_axis: Mesh axis over which windows are split (static); see
        :func:`~mfac_jax.scale_by_mfac`.

    Returns:
      ``F⁻¹ x``, with the structure, shapes and dtypes of ``vector``.

    Raises:
      TypeError: If ``damp`` is not a scalar, the paths of ``vector`` differ from the
        parameters', or a leaf is not real and floating-point.
      ValueError: If ``damp`` is a number that is not positive and finite, ``state``
        does not contain exactly one state of M-FAC, or a shape of ``vector`` differs
        from the parameter's.

    Examples:
      >>> import jax, jax.numpy as jnp, mfac_jax
      >>> opt = mfac_jax.scale_by_mfac(num_grads=2, damp=1.0)
      >>> state = opt.init(jnp.zeros(2))
      >>> _, state = opt.update(jnp.array([2.0, 0.0]), state)
      >>> x = mfac_jax.inverse_fisher_vector_product(state, jnp.ones(2), 1.0)
      >>> print('{:.4f} {:.4f}'.format(*x))
      0.3333 1.0000

    References:
      See :func:`~mfac_jax.scale_by_mfac`.
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
