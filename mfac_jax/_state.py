"""The state of M-FAC, and what can be read from it or left out of it."""

from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from mfac_jax import _checks, windows
from mfac_jax.windows._choice import named_leaves
from mfac_jax.windows._storage import saturating_add


class ScaleByMFACState(NamedTuple):
    """State of :func:`~mfac_jax.scale_by_mfac`.

    Attributes:
      count: Updates so far, rejected ones included; schedules of ``damp`` see it.
      index: Position in the window of the next gradient, ``0 … m - 1``.
      gram: Gram matrix ``K = G Gᵀ`` of the stored gradients.
      inverse: ``(m λ I + K)⁻¹``, from which the next solve follows.
      window: The last ``m`` gradients, the rows of ``G``: by the path of each parameter
        leaf a named tuple of arrays of its kind of window, such as
        ``window['encoder/kernel'].values``.
      damp: Damping ``λ`` that the last solve used. It is the requested one unless the
        dtype of ``gram`` could not resolve it.
      num_raised: Updates for which the damping had to be raised.
      num_rejected: Gradients that were not finite and did not enter the window.
      num_saturated: Updates with an element too large for the dtype of its leaf.
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


def diagnostics(opt_state: Any) -> dict[str, jax.Array]:
    r"""Returns scalars that tell how M-FAC is doing.

    The effective rank of the Gram matrix is
    :math:`(\mathrm{tr}\, K)^2 / \lVert K \rVert_F^2`: 1 for parallel gradients, the
    number of gradients for orthogonal ones of one length. Costs :math:`O(m^2)`, and may
    be called inside a jitted training step.

    Args:
      opt_state: An optimizer state that contains the state of
        :func:`~mfac_jax.scale_by_mfac`, at any depth; also ``nnx.state(optimizer)``.

    Returns:
      A flat dictionary of scalars: ``damp``, ``num_raised``, ``num_rejected`` and
      ``num_saturated`` as in :class:`~mfac_jax.ScaleByMFACState`; ``num_stored``, the
      gradients in the window that are not zero; ``effective_rank``; and the counters of
      the windows, summed over the leaves, such as ``num_dropped`` of
      :class:`~mfac_jax.RowSparseWindow`. Empty if ``opt_state`` contains no state of
      M-FAC; if it contains several, each key is preceded by the path of its state.

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
            if _is_counter(name):
                total = found.get(name, jnp.zeros_like(value))
                found[name] = saturating_add(total, value)
    return found


def window_nbytes(opt_state: Any) -> int:
    """Returns the bytes that the windows of an optimizer state take.

    Counts the stored gradients with their indices, scales and error buffers. The Gram
    matrix and its inverse take ``num_grads²`` elements each in addition.

    Args:
      opt_state: As :func:`diagnostics`, or its shapes: ``jax.eval_shape(opt.init,
        params)`` allocates nothing.

    Returns:
      Bytes, a Python integer, of all states of M-FAC in ``opt_state``.

    Raises:
      ValueError: If there is no state of :func:`~mfac_jax.scale_by_mfac`.

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
    """Returns a table of the leaves, what is stored of each, and its bytes.

    Args:
      opt_state: As :func:`window_nbytes`.

    Returns:
      Text to print, one line per parameter leaf.

    Raises:
      ValueError: If there is no state of :func:`~mfac_jax.scale_by_mfac`.

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
        for path, stored in state.window.items():
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


def drop_windows(opt_state: Any) -> Any:
    """Empties the windows of an optimizer state, for a small checkpoint.

    Args:
      opt_state: A tree that contains optimizer states, such as a training state or
        ``optimizer.opt_state`` of an ``nnx.Optimizer``, or its shapes. States of other
        optimizers stay as they are.

    Returns:
      The tree with ``None`` in place of every stored gradient, Gram matrix and inverse.
      Counters, damping and momentum are kept. :func:`refill_windows` makes it usable
      again.

    Raises:
      TypeError: For ``nnx.state(optimizer)``, which has lost the class of the state.

    Examples:
      >>> import jax, jax.numpy as jnp, mfac_jax
      >>> opt = mfac_jax.mfac(1e-2, num_grads=4)
      >>> params = {'w': jnp.ones(1000)}
      >>> _, state = opt.update(params, opt.init(params))
      >>> small = mfac_jax.drop_windows(state)
      >>> sum(x.size for x in jax.tree.leaves(small))
      6
      >>> state = mfac_jax.refill_windows(small, opt.init(params))
      >>> updates, state = opt.update(params, state)
    """

    def drop(node: Any) -> Any:
        if not _is_state(node):
            return node
        _check_class(node)
        window = map_windows(
            lambda stored: stored._replace(
                **{name: None for name in stored._fields if not _is_counter(name)}
            ),
            node.window,
        )
        return node._replace(gram=None, inverse=None, window=window)

    return jax.tree.map(drop, opt_state, is_leaf=_is_state)


def refill_windows(opt_state: Any, like: Any) -> Any:
    """Gives an optimizer state without gradients an empty window.

    Args:
      opt_state: What :func:`drop_windows` returned, saved and restored.
      like: The initial state of the same optimizer, ``opt.init(params)``, or the tree
        around it; for ``flax.nnx`` ``nnx.Optimizer(model, opt, wrt=nnx.Param)
        .opt_state``.

    Returns:
      ``opt_state`` with the windows, Gram matrices and inverses of ``like``: the window
      fills again, as at the start of training.

    Raises:
      TypeError: For ``nnx.state(optimizer)``, which has lost the class of the state.
      ValueError: If ``like`` has no window or other parameters.

    Examples:
      See :func:`drop_windows`.
    """

    def refill(node: Any, empty: Any) -> Any:
        if not _is_state(node):
            return node
        _check_class(node)
        if not _is_state(empty) or empty.gram is None:
            raise ValueError(
                "`like` must hold a state with a window where `opt_state` holds one: "
                "refill_windows(opt_state, opt.init(params))."
            )
        if map_windows(lambda _: 0, node.window) != map_windows(
            lambda _: 0, empty.window
        ):
            raise ValueError(
                "`like` is the state of other parameters: it has windows for "
                f"{sorted(empty.window)}, `opt_state` for {sorted(node.window)}."
            )
        window = map_windows(
            # Of another kind of window only the counters that both have are kept.
            lambda stored, counted: stored._replace(
                **{
                    name: value
                    for name, value in counted._asdict().items()
                    if _is_counter(name) and name in stored._fields
                }
            ),
            empty.window,
            node.window,
        )
        return node._replace(
            index=empty.index, gram=empty.gram, inverse=empty.inverse, window=window
        )

    return jax.tree.map(refill, opt_state, like, is_leaf=_is_state)


def map_windows(function: Callable[..., Any], window: Any, *rest: Any) -> Any:
    """Maps the windows of all leaves; the state of a tree without leaves has none."""
    if not isinstance(window, Mapping):
        return window
    return {path: function(w, *(r[path] for r in rest)) for path, w in window.items()}


def find_states(tree: Any) -> dict[str, ScaleByMFACState]:
    """Returns the states of M-FAC in a tree by their paths, as plain arrays.

    ``flax.nnx`` wraps every array of an optimizer state in a variable, and
    ``nnx.state`` makes mappings of named tuples; both are undone.
    """
    nodes, _ = jax.tree_util.tree_flatten_with_path(tree, is_leaf=_is_state)
    return {
        jax.tree_util.keystr(path, simple=True, separator="/"): _plain(node)
        for path, node in nodes
        if _is_state(node)
    }


def match_windows(tree: Any, window: Any) -> dict[str, jax.Array]:
    """Returns the leaves of a gradient by their paths.

    Raises:
      TypeError: If the paths are not those of the windows, or a leaf is not real.
      ValueError: If a leaf cannot be a gradient of its window's leaf.
    """
    leaves = named_leaves(tree)
    windows = window if isinstance(window, Mapping) else {}
    missing, unknown = windows.keys() - leaves.keys(), leaves.keys() - windows.keys()
    if missing or unknown:
        raise TypeError(
            "the gradients must have the tree of the parameters that init was given: "
            f"missing {sorted(missing) or 'nothing'}, "
            f"unknown {sorted(unknown) or 'nothing'}."
        )
    for path, leaf in leaves.items():
        if not jnp.issubdtype(jnp.result_type(leaf), jnp.floating):
            raise TypeError(
                f"the gradient of {_checks.named(path)} must be real and "
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
                f"the gradient of {_checks.named(path)} must have the shape of the "
                f"parameter that init was given: expected {expected}, got "
                f"{jnp.shape(leaf)}."
            )
    return {path: jnp.asarray(leaf) for path, leaf in leaves.items()}


def check_not_emptied(state: ScaleByMFACState) -> None:
    """Raises if :func:`drop_windows` has emptied a state."""
    if state.gram is None:
        raise ValueError(
            "the state has no window: mfac_jax.drop_windows emptied it. Refill it with "
            "mfac_jax.refill_windows(opt_state, opt.init(params))."
        )


def check_state(state: ScaleByMFACState, num_grads: int) -> None:
    """Raises unless a state has a window of ``num_grads`` gradients."""
    check_not_emptied(state)
    if len(state.gram) != num_grads:
        raise ValueError(
            f"the window of the state holds {len(state.gram)} gradients, but num_grads "
            f"is {num_grads}. Use the num_grads of the state, or start with an empty "
            "window: opt.init(params)."
        )


def check_kind(path: str, stored: Any) -> None:
    """Raises unless the gradients of a leaf can be told from those of other kinds.

    Raises:
      TypeError: If it is not a named tuple, or has the fields of a kind of this
        package.
    """
    name, fields = type(stored).__name__, getattr(stored, "_fields", None)
    if fields is None:
        raise TypeError(
            f"the window of {_checks.named(path)} must be a NamedTuple of arrays, got "
            f"{name}."
        )
    kind = _KINDS.get(frozenset(fields), type(stored))
    if kind is not type(stored):
        raise TypeError(
            f"{name} has the fields of mfac_jax.windows.{kind.__name__}, "
            f"{', '.join(fields)}, by which nnx.state(optimizer) is read. Rename one."
        )


def _check_class(node: Any) -> None:
    if not isinstance(node, ScaleByMFACState):
        raise TypeError(
            "the state has lost its class in nnx.state(optimizer); pass "
            "optimizer.opt_state."
        )


def fields_of(stored: Any) -> Mapping[str, Any]:
    """Returns the arrays of a leaf's window by name."""
    return stored if isinstance(stored, Mapping) else stored._asdict()


def _some_states(tree: Any) -> dict[str, ScaleByMFACState]:
    states = find_states(tree)
    if not states:
        raise ValueError("there is no state of mfac_jax.scale_by_mfac in this tree.")
    return states


def _is_state(node: Any) -> bool:
    if isinstance(node, Mapping):
        fields = set(ScaleByMFACState._fields)
        return set(node) == fields and isinstance(node["window"], Mapping)
    return isinstance(node, ScaleByMFACState)


# The kinds of this package by their fields, for mappings that have lost the class.
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


def _is_counter(name: str) -> bool:
    return name.startswith("num_")


def _nbytes(stored: Any) -> int:
    return sum(x.size * x.dtype.itemsize for x in _arrays_of(stored).values())


def _arrays_of(stored: Any) -> dict[str, Any]:
    """Returns what is stored of the gradients; an emptied window has nothing."""
    return {
        name: x
        for name, x in fields_of(stored).items()
        if not _is_counter(name) and x is not None
    }
