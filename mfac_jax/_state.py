"""The state of M-FAC: its fields, lookup in a tree, and validation."""

from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from mfac_jax import _checks, windows
from mfac_jax.windows._choice import named_leaves


class ScaleByMFACState(NamedTuple):
    """State of :func:`~mfac_jax.scale_by_mfac`.

    Attributes:
      count: Updates so far, including rejected ones; schedules of ``damp`` see it.
      index: Position of the next gradient in the window, ``0 … m - 1``.
      gram: Gram matrix ``K = G Gᵀ`` of the stored gradients, shape ``(m, m)``, float32
        or float64.
      inverse: ``(m λ I + K)⁻¹``, which the next solve updates, shape ``(m, m)``.
      window: The last ``m`` gradients, the rows of ``G``: a dictionary from the path of
        each parameter to a named tuple of arrays, such as
        ``window['encoder/kernel'].values``. An array if the tree has no leaves.
      damp: Damping ``λ`` that the last solve used: the requested one unless the dtype
        of ``gram`` could not resolve it.
      num_raised: Updates for which the damping had to be raised.
      num_rejected: Gradients rejected because they were not finite.
      num_saturated: Updates with an element too large for the dtype of its leaf.

    Examples:
      >>> import jax.numpy as jnp, mfac_jax
      >>> opt = mfac_jax.scale_by_mfac(num_grads=4)
      >>> params = {'w': jnp.array([3.0, 4.0])}
      >>> _, state = opt.update(params, opt.init(params))
      >>> state.window['w'].values.shape, state.gram[0].tolist()
      ((4, 2), [25.0, 0.0, 0.0, 0.0])
    """

    count: jax.Array  # shape=(), dtype=jnp.int32
    index: jax.Array  # shape=(), dtype=jnp.int32
    gram: jax.Array  # shape=(num_grads, num_grads), dtype=float32 or float64
    inverse: jax.Array  # shape=(num_grads, num_grads), dtype=gram.dtype
    window: Any  # dict[str, StoredGradients]
    damp: jax.Array  # shape=(), dtype=gram.dtype
    num_raised: jax.Array  # shape=(), dtype=jnp.int32
    num_rejected: jax.Array  # shape=(), dtype=jnp.int32
    num_saturated: jax.Array  # shape=(), dtype=jnp.int32


def map_windows(function: Callable[..., Any], window: Any, *rest: Any) -> Any:
    """Applies a function to the window of each leaf, if the tree has leaves."""
    if not isinstance(window, Mapping):
        return window
    return {path: function(w, *(r[path] for r in rest)) for path, w in window.items()}


def map_gradients(function: Callable[[Any], Any], windows: Any) -> Any:
    """Applies a function to every array of gradients in a tree of windows."""

    def of_window(stored: Any) -> Any:
        names = gradient_fields(stored)
        return stored._replace(
            **{name: function(getattr(stored, name)) for name in names}
        )

    return jax.tree.map(
        of_window, windows, is_leaf=lambda node: hasattr(node, "_fields")
    )


def gradient_fields(stored: Any) -> list[str]:
    """Returns the names of the fields whose leading axis counts gradients."""
    others = getattr(stored, "not_gradients", ())
    return [
        name
        for name, x in stored._asdict().items()
        if not is_counter(name) and name not in others and jnp.ndim(x) > 0
    ]


def find_states(tree: Any) -> dict[str, ScaleByMFACState]:
    """Returns the states of M-FAC in a tree by path, as named tuples of arrays.

    ``flax.nnx`` wraps every array of an optimizer state in a variable, and
    ``nnx.state`` turns named tuples into mappings; this function restores both.
    """
    nodes, _ = jax.tree_util.tree_flatten_with_path(tree, is_leaf=is_state)
    return {
        jax.tree_util.keystr(path, simple=True, separator="/"): _plain(node)
        for path, node in nodes
        if is_state(node)
    }


def match_windows(
    tree: Any, window: Any, noun: str = "gradient"
) -> dict[str, jax.Array]:
    """Validates a gradient or a vector and returns its leaves by path.

    Raises:
      TypeError: If the paths differ from the windows', or a leaf is not real.
      ValueError: If a leaf cannot be a gradient of its window's leaf.
    """
    leaves = named_leaves(tree)
    windows = window if isinstance(window, Mapping) else {}
    differences = {
        "missing": sorted(windows.keys() - leaves.keys()),
        "unexpected": sorted(leaves.keys() - windows.keys()),
    }
    if any(differences.values()):
        found = ", ".join(
            f"{name} {paths}" for name, paths in differences.items() if paths
        )
        raise TypeError(
            f"the {noun}s must have the tree structure of the parameters passed to "
            f"init: {found}."
        )
    for path, leaf in leaves.items():
        if not jnp.issubdtype(jnp.result_type(leaf), jnp.floating):
            raise TypeError(
                f"the {noun} of {_checks.named(path)} must be real and "
                f"floating-point, got dtype {jnp.result_type(leaf)}."
            )
        if isinstance(windows[path], Mapping):
            raise TypeError(
                f"the window of {_checks.named(path)} has lost its class in "
                "nnx.state(optimizer); pass optimizer.opt_state."
            )
        expected = windows[path].mismatch(jnp.shape(leaf))
        if expected is not None:
            raise ValueError(
                f"the {noun} of {_checks.named(path)} must have the shape of the "
                f"parameter passed to init: expected {expected}, got "
                f"{jnp.shape(leaf)}."
            )
    return {path: jnp.asarray(leaf) for path, leaf in leaves.items()}


def check_not_emptied(state: ScaleByMFACState) -> None:
    """Raises a ValueError if :func:`drop_windows` has emptied a state."""
    if state.gram is None:
        raise ValueError(
            "the state has no window: mfac_jax.drop_windows emptied it. Refill it with "
            "mfac_jax.refill_windows(opt_state, opt.init(params))."
        )


def check_state(state: ScaleByMFACState, num_grads: int) -> None:
    """Raises a ValueError unless a state holds ``num_grads`` gradients."""
    check_not_emptied(state)
    if len(state.gram) != num_grads:
        raise ValueError(
            f"the window of the state holds {len(state.gram)} gradients, but num_grads "
            f"is {num_grads}. Use the num_grads of the state, or start with an empty "
            "window: opt.init(params)."
        )


def check_kind(path: str, stored: Any) -> None:
    """Validates the type of a window and the names of its fields.

    Raises:
      TypeError: If it is not a NamedTuple, a counter has the name of a field of the
        state, or its fields are the same as a built-in kind's.
    """
    name, fields = type(stored).__name__, getattr(stored, "_fields", None)
    if fields is None:
        raise TypeError(
            f"the window of {_checks.named(path)} must be a NamedTuple of arrays, got "
            f"{name}."
        )
    of_the_state = {"num_stored", *ScaleByMFACState._fields}
    taken = of_the_state.intersection(filter(is_counter, fields))
    if taken:
        raise TypeError(
            f"{name} has the field {min(taken)}, a name that mfac_jax.diagnostics "
            "uses for the state. Rename it."
        )
    kind = _KINDS.get(frozenset(fields), type(stored))
    if kind is not type(stored):
        raise TypeError(
            f"{name} has the fields of mfac_jax.windows.{kind.__name__}, "
            f"{', '.join(fields)}; windows in nnx.state(optimizer) are identified by "
            "their fields. Rename one."
        )


def fields_of(stored: Any) -> Mapping[str, Any]:
    """Returns the arrays of a leaf's window by name."""
    return stored if isinstance(stored, Mapping) else stored._asdict()


def is_state(node: Any) -> bool:
    """Returns whether a node is a state of M-FAC, or a mapping with its fields."""
    if isinstance(node, Mapping):
        fields = set(ScaleByMFACState._fields)
        return set(node) == fields and isinstance(node["window"], Mapping)
    return isinstance(node, ScaleByMFACState)


# Built-in kinds by their fields, to restore windows that nnx.state made mappings.
_KINDS = {
    frozenset(kind._fields): kind
    for kind in (
        windows.DenseGradients,
        windows.Int8Gradients,
        windows.RowSparseGradients,
        windows.TopKGradients,
    )
}


def _plain(node: Any) -> ScaleByMFACState:
    fields = dict(fields_of(node))
    window = map_windows(_plain_stored, fields.pop("window"))
    if not isinstance(window, Mapping):
        window = {}
    arrays = {name: _plain_array(value) for name, value in fields.items()}
    return ScaleByMFACState(window=window, **arrays)


def _plain_stored(stored: Any) -> Any:
    arrays = {name: _plain_array(x) for name, x in fields_of(stored).items()}
    if not isinstance(stored, Mapping):
        return type(stored)(**arrays)
    kind = _KINDS.get(frozenset(arrays))
    return arrays if kind is None else kind(**arrays)


def _plain_array(value: Any) -> Any:
    leaves = jax.tree.leaves(value)
    return leaves[0] if leaves else None


def is_counter(name: str) -> bool:
    """Returns whether a field of a window counts something."""
    return name.startswith("num_")
