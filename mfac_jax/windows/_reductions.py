"""The two passes over the gradients of a window, in batches that suit the backend.

``G x`` maps each gradient to a scalar, ``cᵀ G`` folds all gradients into one. A kind of
window defines both for several stored gradients at once; this module chooses how many:

* On a GPU, all of them: one kernel, into which XLA can fuse widening and gathering.
* On the CPU, a few. Otherwise XLA first writes a wider copy of the window, or the
  elements gathered from it, to memory.

Dense windows that need no widening have their own products (``_dense.py``).
"""

import math
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax

from mfac_jax.windows._storage import may_be_split

# Maximum elements of a leaf processed at once on CPU (a larger single gradient is
# processed whole). A step of int8 windows for BERT-tiny with 256 gradients takes
# 0.48 s, with 2**16 elements 0.65 s, with 2**20 0.93 s.
_BATCH_SIZE = 2**12
# Elements summed at once on the CPU. It divides the width of most layers.
_PIECE = 128


def map_gradients(function: Callable[[Any], jax.Array], rows: Any) -> jax.Array:
    """Returns ``function(rows)``, one scalar per gradient, computed in batches.

    Args:
      function: ``rows -> products`` for any number of gradients.
      rows: A tree of arrays whose leading axis counts gradients.

    Returns:
      The products, shape ``(m,)`` for ``m`` gradients.

    Examples:
      >>> import jax.numpy as jnp
      >>> from mfac_jax import windows
      >>> rows = jnp.arange(6.0).reshape(3, 2)
      >>> windows.map_gradients(lambda rows: jnp.sum(rows, axis=1), rows).tolist()
      [1.0, 5.0, 9.0]
    """

    def in_batches(rows):
        num_batches, batch_at = _batches(rows)
        products = lax.map(lambda i: function(batch_at(i)), jnp.arange(num_batches))
        return products.reshape(-1)

    return lax.platform_dependent(rows, cpu=in_batches, default=function)


def inner_products(x: jax.Array, y: jax.Array) -> jax.Array:
    """Sums ``x * y`` over all axes except the first, to the accuracy of its dtype.

    Args:
      x: An array whose leading axis counts gradients.
      y: An array of the same rank that broadcasts to the shape of ``x``.

    Returns:
      The inner products, shape ``(m,)`` for ``m`` gradients.

    Examples:
      >>> import jax.numpy as jnp
      >>> from mfac_jax import windows
      >>> rows = jnp.arange(6.0).reshape(3, 2)
      >>> windows.inner_products(rows, jnp.array([[1.0, 2.0]])).tolist()
      [2.0, 8.0, 14.0]
    """

    def total(x, y):
        return jnp.sum(x * y, axis=tuple(range(1, x.ndim)))

    def in_pieces(x, y):
        return _sum_rows((x * y).reshape(x.shape[0], -1))

    if may_be_split():  # A sum in pieces would gather a split leaf.
        return total(x, y)
    return lax.platform_dependent(x, y, cpu=in_pieces, default=total)


def _sum_rows(x: jax.Array) -> jax.Array:
    """Sums the rows of a matrix in pieces, recursively, on the CPU.

    XLA sums a row in sequence there, which for 4,096 values of one sign has an error of
    2e-6 (AVX2). A product with ones sums a piece in lanes, and faster.
    """
    num_rows, size = x.shape
    whole = size // _PIECE

    def sums(x):
        ones = jnp.ones(x.shape[-1], x.dtype)
        return jnp.matmul(x, ones, precision=lax.Precision.HIGHEST)

    if whole == 0:
        return sums(x)
    pieces = x[:, : whole * _PIECE].reshape(num_rows, whole, _PIECE)
    rest = x[:, whole * _PIECE :]
    return _sum_rows(jnp.concatenate([sums(pieces), rest], axis=1))


def fold_gradients(
    function: Callable[[jax.Array, Any], jax.Array], initial: jax.Array, rows: Any
) -> jax.Array:
    """Returns ``function(initial, rows)``, a sum over gradients, computed in batches.

    Args:
      function: ``(sum, rows) -> sum``, which adds any number of gradients.
      initial: The array to which the gradients are added.
      rows: A tree of arrays whose leading axis counts gradients.

    Returns:
      The sum, in the shape and dtype of ``initial``.

    Examples:
      >>> import jax.numpy as jnp
      >>> from mfac_jax import windows
      >>> rows = jnp.arange(6.0).reshape(3, 2)
      >>> add = lambda total, rows: total + jnp.sum(rows, axis=0)
      >>> windows.fold_gradients(add, jnp.zeros(2), rows).tolist()
      [6.0, 9.0]
    """

    def in_batches(rows):
        num_batches, batch_at = _batches(rows)
        return lax.fori_loop(
            0, num_batches, lambda i, total: function(total, batch_at(i)), initial
        )

    return lax.platform_dependent(
        rows, cpu=in_batches, default=lambda rows: function(initial, rows)
    )


def _batches(rows: Any) -> tuple[int, Callable[[jax.Array], Any]]:
    """Returns the number of batches and a function that slices one."""
    num_grads = jax.tree.leaves(rows)[0].shape[0]
    largest = max(leaf.size // num_grads for leaf in jax.tree.leaves(rows))
    fitting = max(1, _BATCH_SIZE // max(1, largest))
    size = math.gcd(num_grads, 2 ** (fitting.bit_length() - 1))

    def batch_at(i):
        # The barrier makes the window look different in every batch. Without it, XLA
        # widens all of a bfloat16 window before the loop.
        window, i = lax.optimization_barrier((rows, i))
        return jax.tree.map(
            lambda leaf: lax.dynamic_slice_in_dim(leaf, i * size, size), window
        )

    return num_grads // size, batch_at
