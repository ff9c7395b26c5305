"""Dense storage of gradients.

The window of a leaf is an array of shape ``(m, *leaf.shape)``: its rows are the rows of
the paper's gradient matrix ``G``, restricted to the leaf.
"""

import dataclasses
import math
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax

from mfac_jax import _checks
from mfac_jax.windows import _reductions, _storage
from mfac_jax.windows._protocol import Encoded, Window

# Rows of at least this many elements are summed in pieces on the CPU: XLA's
# matrix-vector product sums a row in sequence there, and float32 loses digits with its
# length (for one million values of one sign a relative error of 5e-6).
_LONG_ROW = 2**12
_MAX_PIECES = 64
# Since jax 0.11 XLA vectorizes such a sum and runs it in all threads: 20 ms for 256
# rows of one million elements. jax 0.10 takes 380 ms, and 36 ms for a matrix product.
_SUMS_ARE_FAST = jax.__version_info__ >= (0, 11)


@dataclasses.dataclass(frozen=True)
class DenseWindow(Window):
    """Stores every element of a leaf's gradients.

    A gradient is rounded to ``dtype`` when it enters the window, and the rounded
    gradient is preconditioned. The window takes ``num_grads × leaf.size × itemsize``
    bytes.

    Args:
      dtype: Storage dtype (static): ``float64``, ``float32``, ``bfloat16`` or
        ``float16``. ``None`` selects the dtype of the leaf, ``float32`` at least.

    Raises:
      ValueError: If ``dtype`` is not a storage dtype.

    Examples:
      >>> import jax.numpy as jnp, mfac_jax
      >>> opt = mfac_jax.scale_by_mfac(4, window=mfac_jax.DenseWindow(jnp.bfloat16))
      >>> opt.init({'w': jnp.zeros((2, 3))}).window['w'].values.shape
      (4, 2, 3)
    """

    dtype: jax.typing.DTypeLike | None = None

    def __post_init__(self):
        _checks.check_dtype("DenseWindow", self.dtype)

    def init(self, leaf: Any, num_grads: int) -> "DenseGradients":
        """Returns a window of ``num_grads`` zero gradients, sharded like the leaf."""
        zeros = jnp.zeros_like(leaf, dtype=_storage.float_dtype(self.dtype, leaf))
        return DenseGradients(jnp.broadcast_to(zeros, (num_grads, *leaf.shape)))


class DenseGradients(NamedTuple):
    """Gradients stored by :class:`~mfac_jax.DenseWindow`.

    A row has the same fields without the leading axis.

    Attributes:
      values: The gradients, shape ``(m, *leaf.shape)``.

    Examples:
      >>> import jax.numpy as jnp, mfac_jax
      >>> stored = mfac_jax.DenseWindow().init(jnp.zeros((2, 3)), num_grads=4)
      >>> stored.values.shape
      (4, 2, 3)
    """

    values: jax.Array

    def mismatch(self, shape: tuple[int, ...]) -> str | None:
        expected = self.values.shape[1:]
        return None if shape == expected else str(expected)

    def encode(self, gradient: jax.Array, dtype: Any) -> Encoded["DenseGradients"]:
        row = gradient.astype(self.values.dtype)
        return Encoded(DenseGradients(row), row.astype(dtype))

    def products(self, vector: jax.Array, dtype: Any) -> jax.Array:
        window, vector = self.values, vector.astype(dtype)
        # Under explicit sharding a sharded axis can be neither contracted by a product
        # nor reshaped, but it can be summed.
        sharded = _storage.is_explicitly_sharded(vector)
        if window.dtype != dtype:
            inner_products = _sum_of_products if sharded else _reductions.inner_products
            return _reductions.map_gradients(
                lambda rows: inner_products(rows.astype(dtype), vector[None]), window
            )
        if sharded:
            return _sum_of_products(window, vector[None])
        if vector.size < _LONG_ROW or _storage.may_be_split():
            return _matrix_vector(window, vector)
        in_pieces = _sums_of_pieces if _SUMS_ARE_FAST else _block_diagonal
        return lax.platform_dependent(
            window, vector, cpu=in_pieces, default=_matrix_vector
        )

    def combine(self, coefficients: jax.Array, start: jax.Array) -> jax.Array:
        if self.values.dtype == start.dtype:
            return start + jnp.tensordot(
                coefficients, self.values, axes=1, precision=lax.Precision.HIGHEST
            )

        def add(total, batch):
            coefficients, rows = batch
            weights = jnp.expand_dims(coefficients, range(1, rows.ndim))
            return total + jnp.sum(weights * rows.astype(total.dtype), axis=0)

        return _reductions.fold_gradients(add, start, (coefficients, self.values))

    def write(self, index: jax.Array, row: "DenseGradients", accepted: jax.Array):
        return _storage.write_row(self, index, row, accepted)


def _matrix_vector(window: jax.Array, vector: jax.Array) -> jax.Array:
    return jnp.tensordot(
        window, vector, axes=vector.ndim, precision=lax.Precision.HIGHEST
    )


def _sum_of_products(window: jax.Array, vectors: jax.Array) -> jax.Array:
    return jnp.sum(window * vectors, axis=tuple(range(1, window.ndim)))


def _sums_of_pieces(window: jax.Array, vector: jax.Array) -> jax.Array:
    """Computes ``G x`` as sums over pieces of the rows, for the CPU.

    As fast as the matrix-vector product. For one million values of one sign its
    relative error is 1.5e-7.
    """
    num_rows, size = window.shape[0], vector.size
    pieces = max(k for k in range(1, _MAX_PIECES + 1) if size % k == 0)
    if pieces == 1:
        return _one_row_at_a_time(window, vector)
    products = window.reshape(num_rows, pieces, -1) * vector.reshape(pieces, -1)[None]
    # The barrier keeps XLA from merging the two sums.
    sums = lax.optimization_barrier(jnp.sum(products, axis=2))
    return jnp.sum(sums, axis=1)


def _block_diagonal(window: jax.Array, vector: jax.Array) -> jax.Array:
    """Computes ``G x`` as the block diagonal of a matrix product, for the CPU.

    With rows and vector cut into ``p`` pieces, the matrix of all piece-by-piece
    products contains the wanted ones on its diagonal. It costs ``p`` times the
    arithmetic, but a product of two matrices is summed in panels: for one million
    values of one sign its relative error is 1.4e-7.
    """
    num_rows, pieces = window.shape[0], math.gcd(vector.size, 8)
    if pieces < 4:
        return _one_row_at_a_time(window, vector)
    products = jnp.matmul(
        window.reshape(num_rows * pieces, -1),
        vector.reshape(pieces, -1).T,
        precision=lax.Precision.HIGHEST,
    )
    return jnp.trace(products.reshape(num_rows, pieces, pieces), axis1=1, axis2=2)


def _one_row_at_a_time(window: jax.Array, vector: jax.Array) -> jax.Array:
    return _reductions.map_gradients(
        lambda rows: _reductions.inner_products(rows, vector[None]), window
    )
