"""A custom window, defined outside the package as a user would."""

import dataclasses
from typing import NamedTuple

import jax
import jax.numpy as jnp

from mfac_jax import windows

_LARGEST = 448.0  # The largest float8_e4m3fn value.


@dataclasses.dataclass(frozen=True)
class Float8Window(windows.Window):
    """Stores gradients in 8-bit floating point, with one scale per gradient."""

    def init(self, leaf, num_grads):
        return Float8Gradients(
            jnp.zeros((num_grads, *leaf.shape), jnp.float8_e4m3fn),
            jnp.zeros(num_grads, jnp.float32),
            jnp.zeros((), jnp.int32),
        )


class Float8Gradients(NamedTuple):
    values: jax.Array
    scales: jax.Array
    num_flushed: jax.Array

    def mismatch(self, shape):
        expected = self.values.shape[1:]
        return None if shape == expected else str(expected)

    def encode(self, gradient, dtype):
        gradient = gradient.astype(jnp.float32)
        scale = jnp.max(jnp.abs(gradient), initial=0.0) / _LARGEST
        values = (gradient / jnp.where(scale > 0, scale, 1)).astype(jnp.float8_e4m3fn)
        flushed = (values.astype(jnp.float32) == 0) & (gradient != 0)
        row = Float8Gradients(values, scale, jnp.sum(flushed, dtype=jnp.int32))
        return windows.Encoded(row, _widened(values, scale, dtype))

    def products(self, vector, dtype):
        vector = vector.astype(dtype)[None]
        return windows.map_gradients(
            lambda rows: windows.inner_products(_widened(*rows, dtype), vector),
            (self.values, self.scales),
        )

    def combine(self, coefficients, start):
        def add(total, batch):
            coefficients, *rows = batch
            return total + jnp.tensordot(
                coefficients, _widened(*rows, total.dtype), 1, precision="highest"
            )

        rows = coefficients, self.values, self.scales
        return windows.fold_gradients(add, start, rows)

    def write(self, index, row, accepted):
        values, scales = windows.write_row(self[:2], index, row[:2], accepted)
        flushed = jnp.where(accepted, row.num_flushed, 0)
        return Float8Gradients(values, scales, self.num_flushed + flushed)


def _widened(values, scales, dtype):
    scales = jnp.expand_dims(scales, tuple(range(scales.ndim, values.ndim)))
    return values.astype(dtype) * scales.astype(dtype)
