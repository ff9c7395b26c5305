"""Diagnostics of an optimizer state: scalars to log, memory, a table of leaves."""

from typing import Any

import jax
import jax.numpy as jnp

from mfac_jax._state import ScaleByMFACState, fields_of, find_states, is_counter
from mfac_jax.windows._storage import saturating_add


def diagnostics(opt_state: Any) -> dict[str, jax.Array]:
    r"""Returns scalars to log from an optimizer state.

    The effective rank of the Gram matrix is
    :math:`(\mathrm{tr}\, K)^2 / \lVert K \rVert_F^2`: 1 for parallel gradients, the
    number of gradients for orthogonal ones of equal norm. The call costs :math:`O(m^2)`
    and works inside a jitted training step. Outside of one, convert the values before
    the next step: some are arrays of the state, which a donated step deletes.

    Args:
      opt_state: An optimizer state that contains the state of
        :func:`~mfac_jax.scale_by_mfac`, at any depth; also ``nnx.state(optimizer)``.

    Returns:
      A flat dictionary of scalars, empty if ``opt_state`` contains no state of M-FAC.
      Its keys are

      * ``damp``, ``num_raised``, ``num_rejected`` and ``num_saturated``, as in
        :class:`~mfac_jax.ScaleByMFACState`.
      * ``num_stored``, the number of nonzero gradients in the window, and
        ``effective_rank``. Both are absent after :func:`~mfac_jax.drop_windows`.
      * The counters of the windows, summed over the leaves, such as ``num_dropped`` of
        :class:`~mfac_jax.RowSparseWindow`.

      If ``opt_state`` contains several states of M-FAC, each key is prefixed with the
      path of its state.

    Examples:
      >>> import jax.numpy as jnp, mfac_jax
      >>> opt = mfac_jax.mfac(1e-2, num_grads=4, damp=1e-3)
      >>> params = {'w': jnp.array([3.0, 4.0])}
      >>> state = opt.init(params)
      >>> for gradient in [params, {'w': jnp.array([4.0, -3.0])}]:
      ...   _, state = opt.update(gradient, state)
      >>> for name, value in mfac_jax.diagnostics(state).items():
      ...   print(f'{name} {value:g}')
      damp 0.001
      num_raised 0
      num_rejected 0
      num_saturated 0
      num_stored 2
      effective_rank 2
    """
    states = find_states(opt_state)
    found = {}
    for path, state in states.items():
        prefix = f"{path}/" if len(states) > 1 else ""
        found |= {f"{prefix}{k}": v for k, v in _diagnostics_of(state).items()}
    return found


def window_nbytes(opt_state: Any) -> int:
    """Returns the size of the windows of an optimizer state, in bytes.

    Counts the stored gradients with their indices, scales and error buffers. The Gram
    matrix and its inverse take ``num_grads²`` elements each in addition.

    Args:
      opt_state: As for :func:`~mfac_jax.diagnostics`, or its shapes:
        ``jax.eval_shape(opt.init, params)`` allocates nothing.

    Returns:
      The bytes of all states of M-FAC in ``opt_state``, a Python integer.

    Raises:
      ValueError: If ``opt_state`` contains no M-FAC state.

    Examples:
      >>> import jax, jax.numpy as jnp, mfac_jax
      >>> params = {'w': jnp.zeros((1000, 100))}
      >>> for window in mfac_jax.DenseWindow(), mfac_jax.Int8Window():
      ...   opt = mfac_jax.mfac(1e-4, num_grads=32, window=window)
      ...   print(f'{mfac_jax.window_nbytes(jax.eval_shape(opt.init, params)):,}')
      12,800,000
      3,303,168
    """
    return sum(
        _nbytes(stored)
        for state in _some_states(opt_state).values()
        for stored in state.window.values()
    )


def window_table(opt_state: Any) -> str:
    """Returns a table of the arrays stored for each leaf and their bytes.

    Args:
      opt_state: As for :func:`~mfac_jax.window_nbytes`.

    Returns:
      Text to print, with a header and one line per leaf.

    Raises:
      ValueError: If ``opt_state`` contains no M-FAC state.

    Examples:
      >>> import jax, jax.numpy as jnp, mfac_jax
      >>> params = {'embedding': jnp.zeros((1000, 8)), 'bias': jnp.zeros(8)}
      >>> opt = mfac_jax.mfac(1e-4, 32, window=mfac_jax.compact_windows(100))
      >>> print(mfac_jax.window_table(jax.eval_shape(opt.init, params)))
      path       stored                                             bytes
      bias       values float32[32,8]                               1,024
      embedding  values float32[32,100,8] indices uint16[32,100]  108,800
    """
    states = _some_states(opt_state)
    rows = [("path", "stored", "bytes")]
    for state_path, state in states.items():
        prefix = f"{state_path}: " if len(states) > 1 else ""
        for path, stored in sorted(state.window.items()):
            arrays = " ".join(
                f"{name} {x.dtype}[{','.join(map(str, x.shape))}]"
                for name, x in _arrays_of(stored).items()
            )
            rows.append((prefix + (path or "."), arrays, f"{_nbytes(stored):,}"))
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    return "\n".join(
        f"{path:{widths[0]}}  {stored:{widths[1]}}  {nbytes:>{widths[2]}}"
        for path, stored, nbytes in rows
    )


def _diagnostics_of(state: ScaleByMFACState) -> dict[str, jax.Array]:
    names = "damp", "num_raised", "num_rejected", "num_saturated"
    found = {name: getattr(state, name) for name in names}
    if state.gram is not None:
        squares = jnp.diagonal(state.gram, axis1=-2, axis2=-1)
        found["num_stored"] = jnp.sum(squares > 0, axis=-1, dtype=jnp.int32)
        # Scaled to at most 1, so that no square overflows.
        largest = jnp.max(squares, axis=-1)
        scale = jnp.where(largest > 0, largest, 1)
        trace = jnp.sum(squares / scale[..., None], axis=-1)
        norm = jnp.sum(jnp.square(state.gram / scale[..., None, None]), axis=(-2, -1))
        found["effective_rank"] = jnp.square(trace) / jnp.where(norm > 0, norm, 1)
    for stored in state.window.values():
        for name, value in fields_of(stored).items():
            if is_counter(name):
                total = found.get(name, jnp.zeros_like(value))
                found[name] = saturating_add(total, value)
    return found


def _some_states(tree: Any) -> dict[str, ScaleByMFACState]:
    states = find_states(tree)
    if not states:
        raise ValueError(
            "there is no M-FAC state in this tree; pass an optimizer state, such as "
            "jax.eval_shape(optimizer.init, params)."
        )
    return states


def _nbytes(stored: Any) -> int:
    return sum(x.size * x.dtype.itemsize for x in _arrays_of(stored).values())


def _arrays_of(stored: Any) -> dict[str, Any]:
    """Returns the arrays of a window by name, without counters and dropped arrays."""
    return {
        name: x
        for name, x in fields_of(stored).items()
        if not is_counter(name) and x is not None
    }
