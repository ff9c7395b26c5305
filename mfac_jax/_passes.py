"""The window operations of a step: two passes over the windows and a row write."""

from collections.abc import Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from mfac_jax._shares import Shares
from mfac_jax.windows._groups import Groups
from mfac_jax.windows._layout import split_as
from mfac_jax.windows._protocol import Encoded


class Passes(NamedTuple):
    """The passes over the windows of some leaves.

    Attributes:
      shares: The split of the rows over devices.
      groups: The leaves that are read together.
      dtype: The dtype of the Gram matrix.
    """

    shares: Shares
    groups: Groups
    dtype: Any

    def multiply(
        self, stored: Sequence[Any], grads: Sequence[jax.Array]
    ) -> tuple[list[Encoded], jax.Array, jax.Array, jax.Array]:
        """Returns the gradient as stored, ``‖g‖²``, whether it is finite, ``G g``.

        The gradient as stored is a list with an element for each group.
        """

        def on_device(stored, grads):
            windows, grads = self.groups.pack_windows(stored), self.groups.pack(grads)
            encoded = [
                w.encode(split_as(w, g), self.dtype)
                for w, g in zip(windows, grads, strict=True)
            ]
            squared_norm = sum(
                (jnp.sum(jnp.square(e.vector)) for e in encoded),
                start=jnp.zeros((), self.dtype),
            )
            finite = jnp.isfinite(squared_norm)
            for g in grads:
                finite &= jnp.all(jnp.isfinite(g))
            products = sum(
                (
                    w.products(e.vector, self.dtype)
                    for w, e in zip(windows, encoded, strict=True)
                ),
                start=jnp.zeros(self.shares.num_rows, self.dtype),
            )
            return encoded, squared_norm, finite, self.shares.gather(products)

        return self.shares.run(on_device, stored, grads)

    def combine(
        self,
        stored: Sequence[Any],
        encoded: Sequence[Encoded],
        newest: jax.Array,
        others: jax.Array,
    ) -> list[jax.Array]:
        """Returns ``newest · g + Σ others_j g_j`` of each group."""

        def on_device(stored, vectors, newest, others):
            windows, own = self.groups.pack_windows(stored), self.shares.own(others)
            starts = [self.shares.once(newest * vector) for vector in vectors]
            return [
                self.shares.total(w.combine(own, split_as(w, start)))
                for w, start in zip(windows, starts, strict=True)
            ]

        vectors = [e.vector for e in encoded]
        return self.shares.run(on_device, stored, vectors, newest, others)

    def write(
        self,
        stored: Sequence[Any],
        encoded: Sequence[Encoded],
        index: jax.Array,
        accepted: jax.Array,
    ) -> list[Any]:
        """Returns the windows with the gradient at ``index`` if it is accepted."""

        def on_device(stored, rows, index, accepted):
            windows, index = (
                self.groups.pack_windows(stored),
                self.shares.position(index),
            )
            return self.groups.unpack_windows(
                [
                    w.write(index, row, accepted)
                    for w, row in zip(windows, rows, strict=True)
                ]
            )

        rows = [e.row for e in encoded]
        return self.shares.run(on_device, stored, rows, index, accepted, writes=True)
