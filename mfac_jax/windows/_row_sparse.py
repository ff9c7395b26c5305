"""Row-sparse storage of gradients.

The mini-batch gradient of an embedding table is zero except in the rows of the tokens
that occur in the batch.
"""

import dataclasses
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax

from mfac_jax import _checks
from mfac_jax.windows import _reductions, _storage
from mfac_jax.windows._dense import DenseGradients, DenseWindow
from mfac_jax.windows._protocol import Encoded, Window


@dataclasses.dataclass(frozen=True)
class RowSparseWindow(Window):
    """Stores the nonzero rows of a gradient with their indices.

    Use it for leaves with a leading axis of rows, such as embedding tables. It is exact
    while a gradient has at most ``max_rows`` nonzero rows. If a gradient has more, the
    rows of largest norm are kept and preconditioned, and ``num_dropped`` of
    :func:`~mfac_jax.diagnostics` counts the others.

    The window takes ``num_grads × max_rows × (row size × itemsize + 2)`` bytes for
    tables of up to 65,536 rows. A leaf with fewer than two axes, or with at most
    ``max_rows`` rows, is stored densely.

    The gradient must be sparse when it reaches M-FAC. It is dense with coupled weight
    decay, or if the table is also the output layer.

    Args:
      max_rows: Rows kept of each gradient (static), at least 1.
      dtype: Storage dtype (static), as in :class:`~mfac_jax.DenseWindow`.

    Raises:
      TypeError: If ``max_rows`` is not an integer.
      ValueError: If ``max_rows`` is below 1 or ``dtype`` is not a storage dtype.

    Examples:
      >>> import jax.numpy as jnp, mfac_jax
      >>> opt = mfac_jax.scale_by_mfac(4, window=mfac_jax.RowSparseWindow(max_rows=2))
      >>> params = {'table': jnp.zeros((1000, 3))}
      >>> gradient = {'table': jnp.zeros((1000, 3)).at[jnp.array([7, 42])].set(1.0)}
      >>> _, state = opt.update(gradient, opt.init(params))
      >>> window = state.window['table']
      >>> window.values.shape, window.indices[0].tolist()
      ((4, 2, 3), [7, 42])
    """

    max_rows: int
    dtype: jax.typing.DTypeLike | None = None

    def __post_init__(self):
        _checks.check_integer("RowSparseWindow max_rows", self.max_rows, 1)
        _checks.check_dtype("RowSparseWindow", self.dtype)

    def unsupported(self, leaf: Any, weight_decay: float = 0.0) -> str | None:
        """Returns why the gradients of a leaf cannot be stored, or ``None``."""
        if weight_decay > 0 and self._is_sparse(leaf):
            return (
                f"gets dense gradients from weight_decay {weight_decay:g}, but its "
                f"window stores {self.max_rows} of {leaf.shape[0]} rows. Use decoupled "
                "decay, optax.chain(mfac_jax.scale_by_mfac(...), "
                "optax.add_decayed_weights(...), "
                "optax.scale_by_learning_rate(...)), or exclude the leaf with mask, or "
                "store it with mfac_jax.DenseWindow()."
            )
        return _storage.sharding_unsupported(leaf)

    def init(self, leaf: Any, num_grads: int) -> "RowSparseGradients | DenseGradients":
        """Returns a window of ``num_grads`` zero gradients."""
        if not self._is_sparse(leaf):
            return DenseWindow(self.dtype).init(leaf, num_grads)
        dtype = _storage.float_dtype(self.dtype, leaf)
        indices = jnp.arange(self.max_rows, dtype=_storage.index_dtype(leaf.shape[0]))
        return RowSparseGradients(
            jnp.zeros((num_grads, self.max_rows, *leaf.shape[1:]), dtype),
            jnp.broadcast_to(indices, (num_grads, self.max_rows)),
            jnp.zeros((), jnp.int32),
        )

    def _is_sparse(self, leaf: Any) -> bool:
        return len(leaf.shape) > 1 and leaf.shape[0] > self.max_rows


class RowSparseGradients(NamedTuple):
    """Gradients stored by :class:`~mfac_jax.RowSparseWindow`.

    A row has the same fields without the leading axis. The indices of one gradient are
    distinct and sorted: a gradient with fewer nonzero rows is padded with zero rows.

    Attributes:
      values: The rows kept, shape ``(m, max_rows, *leaf.shape[1:])``.
      indices: Their indices in the leaf, shape ``(m, max_rows)``, in the narrowest
        unsigned integer type that holds them.
      num_dropped: Nonzero rows dropped so far, int32 scalar that saturates; in a row,
        the rows dropped from its gradient.

    Examples:
      >>> import jax.numpy as jnp, mfac_jax
      >>> window = mfac_jax.RowSparseWindow(max_rows=2)
      >>> stored = window.init(jnp.zeros((1000, 3)), num_grads=4)
      >>> stored.values.shape, stored.indices.shape, stored.indices.dtype
      ((4, 2, 3), (4, 2), dtype('uint16'))
    """

    values: jax.Array
    indices: jax.Array
    num_dropped: jax.Array

    def mismatch(self, shape: tuple[int, ...]) -> str | None:
        _, max_rows, *row_shape = self.values.shape
        if (
            shape[1:] == tuple(row_shape)
            and shape[0] > max_rows
            and _storage.index_dtype(shape[0]) == self.indices.dtype
        ):
            return None
        return f"more than {max_rows} rows of shape {tuple(row_shape)}"

    def encode(self, gradient: jax.Array, dtype: Any) -> Encoded["RowSparseGradients"]:
        max_rows = self.indices.shape[1]
        axes = tuple(range(1, gradient.ndim))
        wide = gradient.astype(_storage.float_dtype(None, gradient))
        # Squaring a tiny value can underflow to 0; clamp to `tiny` so that such a row
        # still ranks above an all-zero row.
        norms = jnp.where(
            jnp.any(wide != 0, axis=axes),
            jnp.maximum(jnp.sum(jnp.square(wide), axis=axes), jnp.finfo(wide).tiny),
            0,
        )
        indices = jnp.sort(lax.top_k(norms, max_rows)[1])
        kept = jnp.zeros(len(norms), bool).at[indices].set(True)
        stored = gradient.astype(self.values.dtype)
        row = RowSparseGradients(
            stored[indices],
            indices.astype(self.indices.dtype),
            jnp.maximum(jnp.sum(norms > 0, dtype=jnp.int32) - max_rows, 0),
        )
        vector = jnp.where(jnp.expand_dims(kept, axes), stored, 0).astype(dtype)
        return Encoded(row, vector)

    def products(self, vector: jax.Array, dtype: Any) -> jax.Array:
        def of_rows(rows):
            values, indices = rows
            wanted = vector.at[indices].get(mode="promise_in_bounds")
            return _reductions.inner_products(values.astype(dtype), wanted)

        vector = vector.astype(dtype)
        return _reductions.map_gradients(of_rows, (self.values, self.indices))

    def combine(self, coefficients: jax.Array, start: jax.Array) -> jax.Array:
        def add(total, batch):
            coefficients, values, indices = batch
            weights = jnp.expand_dims(coefficients, range(1, values.ndim))
            return total.at[indices].add(
                weights * values.astype(total.dtype), mode="promise_in_bounds"
            )

        rows = coefficients, self.values, self.indices
        return _reductions.fold_gradients(add, start, rows)

    def write(
        self, index: jax.Array, row: "RowSparseGradients", accepted: jax.Array
    ) -> "RowSparseGradients":
        values, indices = _storage.write_row(self[:2], index, row[:2], accepted)
        num_dropped = _storage.saturating_add(
            self.num_dropped, jnp.where(accepted, row.num_dropped, 0)
        )
        return RowSparseGradients(values, indices, num_dropped)
