"""Block-wise 8-bit storage: symmetric integers with one scale per block."""

import dataclasses
import math
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from mfac_jax import _checks
from mfac_jax.windows import _reductions, _storage
from mfac_jax.windows._protocol import Encoded, Window

_LARGEST = 127


@dataclasses.dataclass(frozen=True)
class Int8Window(Window):
    r"""Stores gradients as 8-bit integers with one scale per block.

    A leaf is flattened and cut into blocks. A block :math:`x` with
    :math:`s = \max |x| / 127` is stored as :math:`s` and the integers
    :math:`\mathrm{round}(x / s)`, ties to even. Their product is preconditioned.

    The window takes about ``num_grads × leaf.size × (1 + 4 / block_size)`` bytes. The
    scales have the dtype of the leaf, float32 at least; the last block is padded. A
    smaller leaf forms one block.

    Args:
      block_size: Elements in a block (static), at least 128.

    Raises:
      TypeError: If ``block_size`` is not an integer.
      ValueError: If ``block_size`` is below 128, where the scales take too much memory.

    Examples:
      >>> import jax.numpy as jnp, mfac_jax
      >>> opt = mfac_jax.scale_by_mfac(4, window=mfac_jax.Int8Window())
      >>> window = opt.init({'w': jnp.zeros((5, 100))}).window['w']
      >>> window.values.shape, window.scales.shape
      ((4, 4, 128), (4, 4))

    References:
      Dettmers et al., `8-bit Optimizers via Block-wise Quantization
      <https://arxiv.org/abs/2110.02861>`_, 2021
    """

    block_size: int = 128

    def __post_init__(self):
        _checks.check_integer("Int8Window block_size", self.block_size, 128)

    def unsupported(self, leaf: Any, weight_decay: float = 0.0) -> str | None:
        """Returns why the gradients of a leaf cannot be stored, or ``None``."""
        del weight_decay
        return _storage.sharding_unsupported(leaf)

    def init(self, leaf: Any, num_grads: int) -> "Int8Gradients":
        """Returns a window of ``num_grads`` zero gradients."""
        blocks = _storage.block_shape(math.prod(leaf.shape), self.block_size)
        return Int8Gradients(
            jnp.zeros((num_grads, *blocks), jnp.int8),
            jnp.zeros((num_grads, blocks[0]), _storage.float_dtype(None, leaf)),
        )


class Int8Gradients(NamedTuple):
    """Gradients stored by :class:`~mfac_jax.Int8Window`.

    A row has the same fields without the leading axis.

    Attributes:
      values: The integers, int8, shape ``(m, num_blocks, block_size)``.
      scales: The scale of each block, shape ``(m, num_blocks)``.

    Examples:
      >>> import jax.numpy as jnp, mfac_jax
      >>> stored = mfac_jax.Int8Window().init(jnp.zeros(200), num_grads=4)
      >>> row = stored.encode(jnp.full(200, 0.5), jnp.float32).row
      >>> row.values.shape, row.values[0, 0].item(), row.scales.shape
      ((2, 128), 127, (2,))
    """

    values: jax.Array
    scales: jax.Array

    def mismatch(self, shape: tuple[int, ...]) -> str | None:
        blocks = self.values.shape[1:]
        return _storage.block_mismatch(blocks, shape, block_size=blocks[1])

    def encode(self, gradient: jax.Array, dtype: Any) -> Encoded["Int8Gradients"]:
        blocks = _storage.to_blocks(
            gradient.astype(self.scales.dtype), self.values.shape[1:]
        )
        scales = jnp.max(jnp.abs(blocks), axis=1) / _LARGEST
        quotients = blocks / jnp.where(scales > 0, scales, 1)[:, None]
        # A scale so small that it has lost digits gives quotients above 127.
        values = jnp.clip(jnp.round(quotients), -_LARGEST, _LARGEST).astype(jnp.int8)
        row = Int8Gradients(values, scales)
        vector = _storage.from_blocks(_dequantized(row, dtype), gradient.shape)
        return Encoded(row, vector)

    def products(self, vector: jax.Array, dtype: Any) -> jax.Array:
        blocks = _storage.to_blocks(vector.astype(dtype), self.values.shape[1:])
        return _reductions.map_gradients(
            lambda rows: _reductions.inner_products(
                _dequantized(rows, dtype), blocks[None]
            ),
            self,
        )

    def combine(self, coefficients: jax.Array, start: jax.Array) -> jax.Array:
        def add(total, batch):
            coefficients, rows = batch
            weights = coefficients[:, None, None]
            return total + jnp.sum(weights * _dequantized(rows, total.dtype), axis=0)

        blocks = _storage.to_blocks(start, self.values.shape[1:])
        total = _reductions.fold_gradients(add, blocks, (coefficients, self))
        return _storage.from_blocks(total, start.shape)

    def write(self, index: jax.Array, row: "Int8Gradients", accepted: jax.Array):
        return _storage.write_row(self, index, row, accepted)


def _dequantized(rows: Int8Gradients, dtype: Any) -> jax.Array:
    return rows.values.astype(dtype) * rows.scales.astype(dtype)[..., None]
