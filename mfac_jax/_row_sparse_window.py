"""Row-sparse storage: of each gradient, the rows of a table that are not zero.

The mini-batch gradient of an embedding table is zero except in the rows of the tokens
that occur in the batch.
"""

import dataclasses
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax

from mfac_jax import _dense_window, _passes, _storage


@dataclasses.dataclass(frozen=True)
class RowSparseWindow:
    """Stores the rows of a gradient that are not zero, with their indices.

    For leaves with a leading axis of rows, such as embedding tables. Exact while a
    gradient has at most ``max_rows`` rows that are not zero. Of one with more, the
    rows of largest norm are kept; that stored gradient is what is preconditioned, and
    ``num_dropped`` of the state counts the rows that were left out.

    The window takes ``num_grads × max_rows × (row size × itemsize + 2)`` bytes, for
    tables of up to 65,536 rows. A leaf with fewer than two axes, or with at most
    ``max_rows`` rows, is stored densely.

    The gradient has to be sparse when it reaches M-FAC: a table that is also the
    output layer, or coupled weight decay, makes it dense.

    Args:
      max_rows: rows kept of each gradient, static, at least 1.
      dtype: that of the stored numbers, static; as :class:`~mfac_jax.DenseWindow`'s.

    Raises:
      TypeError: if ``max_rows`` is not an integer.
      ValueError: if ``max_rows`` is below 1, or for another ``dtype``.

    Examples:
      >>> import jax.numpy as jnp, mfac_jax
      >>> opt = mfac_jax.scale_by_mfac(4, window=mfac_jax.RowSparseWindow(max_rows=2))
      >>> table = jnp.zeros((1000, 3))
      >>> _, state = opt.update(table.at[jnp.array([7, 42])].set(1.0), opt.init(table))
      >>> state.window.values.shape, state.window.indices[0].tolist()
      ((4, 2, 3), [7, 42])
    """

    max_rows: int
    dtype: jax.typing.DTypeLike | None = None

    def __post_init__(self):
        _storage.check_integer("RowSparseWindow max_rows", self.max_rows, 1)
        _storage.check_dtype("RowSparseWindow", self.dtype)

    def drops_rows_of(self, leaf: Any) -> bool:
        """Whether a gradient of this leaf can have more rows than are kept."""
        return len(leaf.shape) > 1 and leaf.shape[0] > self.max_rows

    def init(self, leaf: Any, num_grads: int) -> Any:
        """Returns a window of ``num_grads`` zero gradients."""
        if not self.drops_rows_of(leaf):
            return _dense_window.DenseWindow(self.dtype).init(leaf, num_grads)
        dtype = _storage.float_dtype(self.dtype, leaf)
        indices = jnp.arange(self.max_rows, dtype=_storage.index_dtype(leaf.shape[0]))
        return RowSparseGradients(
            jnp.zeros((num_grads, self.max_rows, *leaf.shape[1:]), dtype),
            jnp.broadcast_to(indices, (num_grads, self.max_rows)),
        )


class RowSparseGradients(NamedTuple):
    """The window of a leaf; a row of it is the same without the leading axis.

    The indices of one gradient are distinct and sorted: a gradient with fewer rows is
    filled up with rows that are zero.

    Attributes:
      values: the rows kept, shape ``(m, max_rows, *leaf.shape[1:])``.
      indices: their places in the leaf, shape ``(m, max_rows)``, in the narrowest
        unsigned integer type that holds them.
    """

    values: jax.Array
    indices: jax.Array

    @property
    def leaf_shape(self) -> str:
        _, max_rows, *row_shape = self.values.shape
        return f"more than {max_rows} rows of shape {tuple(row_shape)}"

    def fits(self, shape: tuple[int, ...]) -> bool:
        _, max_rows, *row_shape = self.values.shape
        return (
            shape[1:] == tuple(row_shape)
            and shape[0] > max_rows
            and _storage.index_dtype(shape[0]) == self.indices.dtype
        )

    def encode(
        self, gradient: jax.Array, dtype
    ) -> _storage.Encoded["RowSparseGradients"]:
        max_rows = self.indices.shape[1]
        axes = tuple(range(1, gradient.ndim))
        wide = gradient.astype(jnp.promote_types(gradient.dtype, jnp.float32))
        # The square of a small number that is not zero may be: it still counts, before
        # the rows that are zero.
        norms = jnp.where(
            jnp.any(wide != 0, axis=axes),
            jnp.maximum(jnp.sum(jnp.square(wide), axis=axes), jnp.finfo(wide).tiny),
            0,
        )
        indices = jnp.sort(lax.top_k(norms, max_rows)[1])
        kept = jnp.zeros(len(norms), bool).at[indices].set(True)
        stored = gradient.astype(self.values.dtype)
        return _storage.Encoded(
            RowSparseGradients(stored[indices], indices.astype(self.indices.dtype)),
            jnp.where(jnp.expand_dims(kept, axes), stored, 0).astype(dtype),
            jnp.maximum(jnp.sum(norms > 0, dtype=jnp.int32) - max_rows, 0),
        )

    def products(self, vector: jax.Array, dtype) -> jax.Array:
        def of_rows(rows: RowSparseGradients):
            wanted = vector.at[rows.indices].get(mode="promise_in_bounds")
            return _passes.inner_products(rows.values.astype(dtype), wanted)

        vector = vector.astype(dtype)
        return _passes.map_gradients(of_rows, self)

    def combine(self, coefficients: jax.Array, start: jax.Array) -> jax.Array:
        def add(total, batch):
            coefficients, rows = batch
            weights = jnp.expand_dims(coefficients, range(1, rows.values.ndim))
            return total.at[rows.indices].add(
                weights * rows.values.astype(total.dtype), mode="promise_in_bounds"
            )

        return _passes.fold_gradients(add, start, (coefficients, self))

    def write(self, index: jax.Array, row: "RowSparseGradients", accepted: jax.Array):
        return _storage.write_row(self, index, row, accepted)
