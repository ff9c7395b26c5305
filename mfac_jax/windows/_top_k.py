"""Top-k storage with error feedback: adds dropped entries to the next gradient.

Ionut-Vlad Modoranu et al., "Error Feedback Can Accurately Compress Preconditioners",
2023, https://arxiv.org/abs/2306.06098.
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


@dataclasses.dataclass(frozen=True)
class TopKWindow(Window):
    r"""Stores the largest entries of each gradient and carries the rest over.

    A leaf is flattened and cut into blocks. With the error :math:`\xi_0 = 0`,

    .. math::
        a_t = \xi_{t-1} + g_t, \qquad
        \hat g_t = \mathrm{top}_k(a_t), \qquad
        \xi_t = a_t - \hat g_t ,

    where :math:`\mathrm{top}_k` keeps the ``⌈density · block⌉`` entries of largest
    magnitude of each block, rounded to ``dtype``. The window stores the sparse
    :math:`\hat g_t`, which is preconditioned.

    The window takes about ``num_grads × density × leaf.size × (itemsize + 2)`` bytes
    for blocks of up to 65,536 elements. The error takes one more gradient in the dtype
    of the leaf, float32 at least.

    Args:
      density: Share of the entries kept (static), above 0 and at most 1.
      block_size: Elements in a block (static), at least 1. A smaller leaf forms one
        block.
      dtype: Storage dtype (static), as in :class:`~mfac_jax.DenseWindow`.

    Raises:
      TypeError: If ``density`` or ``block_size`` has the wrong type.
      ValueError: If ``density``, ``block_size`` or ``dtype`` is out of range.

    Examples:
      >>> import jax.numpy as jnp, mfac_jax
      >>> opt = mfac_jax.scale_by_mfac(4, window=mfac_jax.TopKWindow(density=0.5))
      >>> gradient = {'w': jnp.array([1.0, -4.0, 2.0, 3.0])}
      >>> _, state = opt.update(gradient, opt.init(gradient))
      >>> window = state.window['w']
      >>> window.values[0].tolist(), window.error.tolist()
      ([[-4.0, 3.0]], [[1.0, 0.0, 2.0, 0.0]])

    References:
      Modoranu et al., `Error Feedback Can Accurately Compress Preconditioners
      <https://arxiv.org/abs/2306.06098>`_, 2023
    """

    density: float = 0.01
    block_size: int = 4096
    dtype: jax.typing.DTypeLike | None = None

    def __post_init__(self):
        _checks.check_number(
            "TopKWindow density",
            self.density,
            "must be above 0 and at most 1",
            lambda x: 0 < x <= 1,
        )
        _checks.check_integer("TopKWindow block_size", self.block_size, 1)
        _checks.check_dtype("TopKWindow", self.dtype)

    def unsupported(self, leaf: Any, weight_decay: float = 0.0) -> str | None:
        """Returns why the gradients of a leaf cannot be stored, or ``None``."""
        del weight_decay
        return _storage.sharding_unsupported(leaf)

    def init(self, leaf: Any, num_grads: int) -> "TopKGradients":
        """Returns a window of ``num_grads`` zero gradients and zero error."""
        blocks = _storage.block_shape(math.prod(leaf.shape), self.block_size)
        num_blocks, block_size = blocks
        # 0.07 * 100 is slightly above 7; without the tolerance it would keep 8 of 100.
        num_kept = max(1, math.ceil(self.density * block_size - 1e-6))
        shape = (num_grads, num_blocks, num_kept)
        indices = jnp.arange(num_kept, dtype=_storage.index_dtype(block_size))
        return TopKGradients(
            jnp.zeros(shape, _storage.float_dtype(self.dtype, leaf)),
            jnp.broadcast_to(indices, shape),
            jnp.zeros(blocks, _storage.float_dtype(None, leaf)),
        )


class TopKGradients(NamedTuple):
    """Gradients stored by :class:`~mfac_jax.TopKWindow`.

    A row has the same fields: ``values`` and ``indices`` without the leading axis, and
    the error after its gradient.

    Attributes:
      values: The entries kept, shape ``(m, num_blocks, k)``.
      indices: Their sorted indices in the blocks, shape ``(m, num_blocks, k)``, in the
        narrowest unsigned integer type that holds them.
      error: ``ξ``, the entries not stored yet, shape ``(num_blocks, block_size)``.

    Examples:
      >>> import jax.numpy as jnp, mfac_jax
      >>> stored = mfac_jax.TopKWindow(density=0.5).init(jnp.zeros(6), num_grads=4)
      >>> stored.values.shape, stored.indices.dtype, stored.error.shape
      ((4, 1, 3), dtype('uint8'), (1, 6))
    """

    values: jax.Array
    indices: jax.Array
    error: jax.Array

    not_gradients = ("error",)

    def mismatch(self, shape: tuple[int, ...]) -> str | None:
        blocks = self.error.shape
        return _storage.block_mismatch(blocks, shape, block_size=blocks[1])

    def encode(self, gradient: jax.Array, dtype: Any) -> Encoded["TopKGradients"]:
        blocks = _storage.to_blocks(gradient.astype(self.error.dtype), self.error.shape)
        total = self.error + blocks
        indices = jnp.sort(lax.top_k(jnp.abs(total), self.indices.shape[2])[1])
        largest = jnp.take_along_axis(total, indices, axis=1)
        values = largest.astype(self.values.dtype)
        error = jnp.put_along_axis(
            total, indices, largest - values.astype(total.dtype), axis=1, inplace=False
        )
        row = TopKGradients(values, indices.astype(self.indices.dtype), error)
        vector = jnp.zeros(gradient.size, dtype)
        vector = vector.at[self._places(indices[None])].add(
            values[None].astype(dtype), mode="drop"
        )
        return Encoded(row, vector.reshape(gradient.shape))

    def products(self, vector: jax.Array, dtype: Any) -> jax.Array:
        flat = vector.astype(dtype).reshape(-1)

        def of_rows(rows):
            values, indices = rows
            wanted = flat.at[self._places(indices)].get(mode="clip")
            return _reductions.inner_products(values.astype(dtype), wanted)

        return _reductions.map_gradients(of_rows, (self.values, self.indices))

    def combine(self, coefficients: jax.Array, start: jax.Array) -> jax.Array:
        def add(total, batch):
            coefficients, values, indices = batch
            weighted = coefficients[:, None, None] * values.astype(total.dtype)
            return total.at[self._places(indices)].add(weighted, mode="drop")

        rows = coefficients, self.values, self.indices
        return _reductions.fold_gradients(add, start.reshape(-1), rows).reshape(
            start.shape
        )

    def write(self, index: jax.Array, row: "TopKGradients", accepted: jax.Array):
        values, indices = _storage.write_row(self[:2], index, row[:2], accepted)
        return TopKGradients(
            values, indices, jnp.where(accepted, row.error, self.error)
        )

    def _places(self, indices: jax.Array) -> jax.Array:
        """Returns indices into the flattened leaf.

        Indices of the padding of the last block are past its end.
        """
        num_blocks, block_size = self.error.shape
        starts = block_size * jnp.arange(num_blocks, dtype=jnp.int32)
        return indices.astype(jnp.int32) + starts[None, :, None]
