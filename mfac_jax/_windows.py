"""The window kinds as one: what the optimizer asks of them, and which leaf gets which.

A kind is a specification with a method ``init(leaf, num_grads)``. What that returns is
the leaf's window in the optimizer's state: a tuple of arrays with the methods of
:class:`StoredGradients`, or, stored densely, just the array.
"""

import re
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Protocol, TypeVar

import jax

from mfac_jax._dense_window import DenseGradients, DenseWindow
from mfac_jax._int8_window import Int8Gradients, Int8Window
from mfac_jax._row_sparse_window import RowSparseGradients, RowSparseWindow
from mfac_jax._storage import Encoded
from mfac_jax._top_k_window import TopKGradients, TopKWindow

Window = DenseWindow | Int8Window | RowSparseWindow | TopKWindow
WindowFn = Callable[[str, Any], Window]

_Row = TypeVar("_Row")


class StoredGradients(Protocol[_Row]):
    """The stored gradients of a leaf, the rows of ``G`` restricted to it."""

    @property
    def leaf_shape(self) -> str:
        """What is known of the leaf's shape, for messages."""
        ...

    def fits(self, shape: tuple[int, ...]) -> bool:
        """Whether a gradient of this shape can be one of the leaf's."""
        ...

    def encode(self, gradient: jax.Array, dtype: Any) -> Encoded[_Row]:
        """Returns a gradient as it is stored; its vector has this dtype."""
        ...

    def products(self, vector: jax.Array, dtype: Any) -> jax.Array:
        """Returns ``G x``, shape ``(m,)``: one pass over the window."""
        ...

    def combine(self, coefficients: jax.Array, start: jax.Array) -> jax.Array:
        """Returns ``start + cᵀ G``, in the leaf's shape: one pass over the window."""
        ...

    def write(
        self, index: jax.Array, row: _Row, accepted: jax.Array
    ) -> "StoredGradients[_Row]":
        """Puts a row at ``index`` where ``accepted``; else nothing changes."""
        ...


def flatten(windows: Any) -> tuple[list[StoredGradients], Any]:
    """Returns the windows of the leaves, and the tree of the parameters."""
    compact = Int8Gradients, RowSparseGradients, TopKGradients
    leaves, treedef = jax.tree.flatten(windows, lambda x: isinstance(x, compact))
    rows: list[Any] = [
        x if isinstance(x, compact) else DenseGradients(x) for x in leaves
    ]
    return rows, treedef


def unflatten(treedef: Any, rows: Sequence[StoredGradients]) -> Any:
    """Undoes :func:`flatten`."""
    return treedef.unflatten(
        [x.values if isinstance(x, DenseGradients) else x for x in rows]
    )


def spec_of(window: Window | WindowFn | None, path: str, leaf: Any) -> Window:
    """Returns the specification for a leaf.

    Raises:
      TypeError: if the function returns anything else.
    """
    spec = window(path, leaf) if callable(window) else window
    if spec is None:
        spec = DenseWindow()
    if not isinstance(spec, Window):
        raise TypeError(
            "the window function must return a window such as mfac_jax.DenseWindow(), "
            f"got {spec!r} for {path!r}."
        )
    return spec


def check_window(window: Any) -> None:
    """Refuses what is neither a specification nor a function nor ``None``.

    Raises:
      TypeError: with what was given.
    """
    is_function = callable(window) and not isinstance(window, type)
    if not (window is None or is_function or isinstance(window, Window)):
        raise TypeError(
            "window must be a window such as mfac_jax.DenseWindow(), a function "
            f"(path, leaf) -> window, or None, got {window!r}."
        )


def compact_windows(
    max_rows: int | Mapping[str, int], dtype: jax.typing.DTypeLike | None = None
) -> WindowFn:
    """Stores embedding tables row-sparse and every other leaf densely.

    For the ``window`` of :func:`~mfac_jax.mfac`. Exact while no mini-batch has more
    than ``max_rows`` different tokens: ``batch size × sequence length`` is a safe
    bound, the largest number of different tokens in a batch a tight one.

    Args:
      max_rows: rows kept of a gradient, static: one number for all leaves whose path
        ends in a key with ``embedding`` in it, as in ``encoder/Embed_0/embedding``; or
        a mapping from regular expressions, searched for in the path, to numbers, of
        which the first that matches counts.
      dtype: that of all windows, static; as :class:`~mfac_jax.DenseWindow`'s.

    Returns:
      A function ``(path, leaf) -> window``.

    Raises:
      TypeError: as :class:`~mfac_jax.RowSparseWindow`.
      ValueError: as :class:`~mfac_jax.RowSparseWindow`.
      re.error: for a malformed regular expression.

    Examples:
      >>> import jax.numpy as jnp, mfac_jax
      >>> params = {'embedding': jnp.zeros((30_000, 8)), 'kernel': jnp.zeros((8, 2))}
      >>> opt = mfac_jax.scale_by_mfac(4, window=mfac_jax.compact_windows(100))
      >>> state = opt.init(params)
      >>> state.window['embedding'].values.shape, state.window['kernel'].shape
      ((4, 100, 8), (4, 8, 2))
      >>> print(f'{mfac_jax.window_nbytes(state):,}')
      13,856
    """
    if not isinstance(max_rows, Mapping):
        max_rows = {r"embedding[^/]*$": max_rows}
    dense = DenseWindow(dtype)
    tables = {
        re.compile(pattern): RowSparseWindow(rows, dtype)
        for pattern, rows in max_rows.items()
    }

    def window(path: str, leaf: Any) -> Window:
        del leaf
        return next((spec for p, spec in tables.items() if p.search(path)), dense)

    return window
