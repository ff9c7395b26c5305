"""One step of M-FAC: writes a gradient into the window and solves for a direction."""

from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
from jax import lax
from jax.sharding import AxisType, PartitionSpec

from mfac_jax import _checks, _solve
from mfac_jax._passes import Passes
from mfac_jax._shares import IN_SHARD_MAP, AxisName, shares_of
from mfac_jax._state import ScaleByMFACState, check_kind, check_state, match_windows
from mfac_jax.windows import Window, WindowFn
from mfac_jax.windows._choice import check_supported, choose_windows, named_leaves
from mfac_jax.windows._groups import group_leaves
from mfac_jax.windows._storage import saturating_add


class System(NamedTuple):
    """The direction ``s Gᵀ c`` of a step, with ``(m λ I + K) c = e``.

    Attributes:
      damp: The damping ``λ``, a scalar of the Gram matrix's dtype.
      weights: The right-hand side ``e``, shape ``(m,)``: the combination of stored
        gradients to precondition. ``None`` selects the newest.
      scale_of: Returns the factor ``s`` for the ``λ`` that the solve used.
    """

    damp: jax.Array
    weights: jax.Array | None
    scale_of: Callable[[jax.Array], jax.Array | float]


def init_state(
    params: optax.Params,
    num_grads: int,
    damp_at: Callable[[jax.Array, Any], jax.Array],
    window: Window | WindowFn | None,
    decays: Mapping[str, float],
    axis: AxisName | None,
) -> ScaleByMFACState:
    """Returns a state with an empty window, split over a mesh axis.

    ``damp_at(count, dtype)`` returns the damping; ``decays`` are the rates of coupled
    weight decay by path.
    """
    shares = shares_of(num_grads, axis)
    leaves = {path: shares.in_full(x) for path, x in _parameters(params).items()}
    specs = choose_windows(window, leaves)
    for path, spec in specs.items():
        check_supported(path, leaves[path], spec, decays.get(path, 0.0))

    def make_windows(num_rows):
        windows = {
            path: spec.init(leaves[path], num_rows) for path, spec in specs.items()
        }
        for path, stored in windows.items():
            check_kind(path, stored)
        return windows

    windows = shares.init(make_windows)
    is_wide = any(x.dtype == jnp.float64 for x in jax.tree.leaves(windows))
    dtype = jnp.float64 if is_wide else jnp.float32
    initial_damp = damp_at(jnp.zeros((), jnp.int32), dtype)
    return ScaleByMFACState(
        count=jnp.zeros((), jnp.int32),
        index=jnp.zeros((), jnp.int32),
        gram=jnp.zeros((num_grads, num_grads), dtype),
        inverse=_solve.initial_inverse(num_grads, initial_damp),
        # optax.tree.map_params calls init with a tree without leaves to learn which
        # parts of a state are shaped like the parameters. No window is; a single
        # array in place of the dictionary signals that.
        window=windows or jnp.zeros(()),
        # A copy: a donated step would delete the caller's array.
        damp=jnp.array(initial_damp, copy=True),
        num_raised=jnp.zeros((), jnp.int32),
        num_rejected=jnp.zeros((), jnp.int32),
        num_saturated=jnp.zeros((), jnp.int32),
    )


def precondition(
    updates: optax.Updates,
    state: ScaleByMFACState,
    num_grads: int,
    system_of: Callable[[jax.Array], System],
    axis: AxisName | None,
    roots: Mapping[str, jax.Array] | None = None,
) -> tuple[optax.Updates, ScaleByMFACState, jax.Array]:
    """Writes a gradient into the window and returns the direction of a system.

    Args:
      updates: The gradient.
      state: The state before the step.
      num_grads: The number of gradients ``m`` that the state must hold.
      system_of: Returns the system for the new Gram matrix.
      axis: The mesh axis over which the windows are split, or ``None``.
      roots: ``D^-½`` for a diagonal metric ``D``, an array by path, float32 at least:
        the window stores ``D^-½ g``, and the direction is multiplied by ``D^-½``.
        ``None`` is the identity.

    Returns:
      The direction in the dtypes of the gradient, zero where the gradient is rejected;
      the state; whether the gradient was accepted.
    """
    check_state(state, num_grads)
    state = _on_mesh(state)
    dtype, index = state.gram.dtype, state.index
    treedef = jax.tree.structure(updates)
    leaves = match_windows(updates, state.window)
    # Empty leaves have nothing to store, and jaxlib 0.11 crashes if one is split.
    paths = [path for path, leaf in leaves.items() if leaf.size]
    factors = None if roots is None else [roots[path] for path in paths]
    grads, stored = [leaves[p] for p in paths], [state.window[p] for p in paths]
    shares = shares_of(num_grads, axis if paths else None)
    if jax.sharding.get_abstract_mesh().manual_axes:
        shares.check(state.window, IN_SHARD_MAP)
    passes = Passes(shares, group_leaves(stored, shares.names), dtype)

    # 1. The newest row of G is the gradient as the window stores it. It is written
    #    last, from a value that depends on both passes: written first, XLA would
    #    copy the window.
    # 2. The new row and column of K: the first pass over the window. By
    #    Cauchy-Schwarz products of rows with finite squared norms are finite.
    encoded, squared_norm, finite, products = passes.multiply(
        stored, _scaled(grads, factors)
    )
    is_newest = jnp.arange(num_grads, dtype=index.dtype) == index
    products = jnp.where(is_newest, squared_norm, products)
    products = jnp.where(finite, products, 0)
    gram = _with_row(state.gram, index, products)
    # 3. Solve (m λ I + K) c = e.
    system = system_of(gram)
    solution = _solve.solve_for_row(
        gram, state.inverse, index, system.damp, system.weights
    )
    # 4. The direction s Gᵀ c: the second pass.
    coefficients = system.scale_of(solution.damp) * solution.coefficients
    newest, others = coefficients[index], jnp.where(is_newest, 0, coefficients)
    directions = passes.combine(stored, encoded, newest, others)
    # 5. Only what is finite is returned and remembered.
    accepted = finite
    for direction in directions:
        accepted &= jnp.all(jnp.isfinite(direction))
    directions = passes.groups.unpack(
        [jnp.where(accepted, direction, 0) for direction in directions], grads
    )
    if factors is not None:
        factors = [jnp.where(accepted, factor, 0) for factor in factors]
    narrowed = [
        _saturating_cast(direction, grad.dtype)
        for direction, grad in zip(_scaled(directions, factors), grads, strict=True)
    ]
    saturated = jnp.any(jnp.array([any_saturated for _, any_saturated in narrowed]))
    written = passes.write(stored, encoded, index, accepted)
    windows = dict(zip(paths, written, strict=True))
    row = jnp.where(accepted, products, state.gram[index])
    new_state = ScaleByMFACState(
        count=jnp.asarray(optax.safe_increment(state.count)),
        index=jnp.where(accepted, (index + 1) % num_grads, index),
        gram=_with_row(state.gram, index, row),
        inverse=jnp.where(accepted, solution.inverse, state.inverse),
        window={**state.window, **windows} if windows else state.window,
        damp=jnp.where(accepted, solution.damp, state.damp),
        num_raised=_add_if(accepted & solution.raised, state.num_raised),
        num_rejected=_add_if(~accepted, state.num_rejected),
        num_saturated=_add_if(saturated, state.num_saturated),
    )
    found = {
        path: shares.as_gradient(update, leaves[path])
        for path, (update, _) in zip(paths, narrowed, strict=True)
    }
    return treedef.unflatten({**leaves, **found}.values()), new_state, accepted


def _on_mesh(state: ScaleByMFACState) -> ScaleByMFACState:
    """Reshards arrays that were created before an explicit mesh was set.

    JAX rejects a slice update that mixes arrays with and without a mesh.
    """
    if AxisType.Explicit not in jax.sharding.get_abstract_mesh().axis_types:
        return state
    return jax.tree.map(
        lambda x: (
            jax.sharding.reshard(x, PartitionSpec())
            if jax.typeof(x).sharding.mesh.empty
            else x
        ),
        state,
    )


def _scaled(
    leaves: Sequence[jax.Array], factors: Sequence[jax.Array] | None
) -> Sequence[jax.Array]:
    if factors is None:
        return leaves
    return [
        leaf.astype(factor.dtype) * factor
        for leaf, factor in zip(leaves, factors, strict=True)
    ]


def _parameters(params: Any) -> dict[str, Any]:
    """Validates parameters and returns them by path, Python floats as arrays."""
    leaves = named_leaves(params)
    for path, leaf in leaves.items():
        _checks.check_parameter(path, leaf)
    return {
        path: jnp.asarray(leaf) if isinstance(leaf, float) else leaf
        for path, leaf in leaves.items()
    }


def _with_row(gram: jax.Array, index: jax.Array, row: jax.Array) -> jax.Array:
    """Replaces row and column ``index``.

    Uses two slice updates: XLA's partitioner miscompiles ``.at[index].set`` for a
    sharded row (jax 0.10.2).
    """
    gram = lax.dynamic_update_index_in_dim(gram, row, index, 0)
    return lax.dynamic_update_index_in_dim(gram, row, index, 1)


def _saturating_cast(x: jax.Array, dtype: Any) -> tuple[jax.Array, jax.Array]:
    """Casts to ``dtype`` and clips values that are too large for it.

    Also returns whether any value was clipped.
    """
    if jnp.finfo(dtype).max >= jnp.finfo(x.dtype).max:
        return x.astype(dtype), jnp.zeros((), bool)
    largest = jnp.asarray(jnp.finfo(dtype).max, x.dtype)
    clipped = jnp.clip(x, -largest, largest)
    return clipped.astype(dtype), jnp.any(clipped != x)


def _add_if(condition: jax.Array, total: jax.Array) -> jax.Array:
    return saturating_add(total, condition.astype(total.dtype))
