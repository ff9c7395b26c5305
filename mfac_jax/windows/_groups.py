"""Groups small dense leaves, so that an update runs fewer and larger kernels.

Most leaves of a network are vectors of a few hundred elements. On a GPU a kernel for
each takes longer to launch than to run, and every kernel has to be compiled. Their
windows stay separate in the state; the two passes read a concatenated copy, for which
leaves that are sharded over automatic mesh axes are gathered.
"""

import math
from collections.abc import Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from mfac_jax.windows._dense import DenseGradients
from mfac_jax.windows._protocol import Encoded
from mfac_jax.windows._storage import may_be_split

# Leaves with fewer elements are small.
_SMALL = 2**12
# Nothing is grouped if the small leaves are a larger share of the windows: the copy
# would cost too much.
_SHARE = 1 / 16


class DenseGroup(NamedTuple):
    """The dense windows of several leaves, whose gradients form one vector."""

    windows: tuple[DenseGradients, ...]

    def encode(self, gradient: jax.Array, dtype: Any) -> Encoded[DenseGradients]:
        return self.windows[0].encode(gradient, dtype)

    def products(self, vector: jax.Array, dtype: Any) -> jax.Array:
        return self._concatenated().products(vector, dtype)

    def combine(self, coefficients: jax.Array, start: jax.Array) -> jax.Array:
        return self._concatenated().combine(coefficients, start)

    def write(
        self, index: jax.Array, row: DenseGradients, accepted: jax.Array
    ) -> "DenseGroup":
        rows = _split(row.values, [w.values.shape[1:] for w in self.windows])
        return DenseGroup(
            tuple(
                w.write(index, DenseGradients(r), accepted)
                for w, r in zip(self.windows, rows, strict=True)
            )
        )

    def _concatenated(self) -> DenseGradients:
        values = [w.values.reshape(w.values.shape[0], -1) for w in self.windows]
        return DenseGradients(jnp.concatenate(values, axis=1))


class Groups(NamedTuple):
    """A partition of the leaves.

    Attributes:
      members: The positions of the leaves of each group; most groups have one leaf.
    """

    members: list[list[int]]

    def pack_windows(self, windows: Sequence[Any]) -> list[Any]:
        """Returns the window of each group."""
        return [
            windows[group[0]]
            if len(group) == 1
            else DenseGroup(tuple(windows[i] for i in group))
            for group in self.members
        ]

    def unpack_windows(self, packed: Sequence[Any]) -> list[Any]:
        """Inverse of :meth:`pack_windows`."""
        return self._in_order(
            [w.windows if isinstance(w, DenseGroup) else [w] for w in packed]
        )

    def pack(self, leaves: Sequence[jax.Array]) -> list[jax.Array]:
        """Returns the gradient of each group; several leaves form one vector."""
        return [
            leaves[group[0]]
            if len(group) == 1
            else jnp.concatenate([leaves[i].reshape(-1) for i in group])
            for group in self.members
        ]

    def unpack(
        self, packed: Sequence[jax.Array], like: Sequence[jax.Array]
    ) -> list[jax.Array]:
        """Inverse of :meth:`pack`, for leaves of the shapes of ``like``."""
        return self._in_order(
            [
                [x] if len(group) == 1 else _split(x, [like[i].shape for i in group])
                for group, x in zip(self.members, packed, strict=True)
            ]
        )

    def _in_order(self, parts: Sequence[Sequence[Any]]) -> list[Any]:
        pairs = [
            pair
            for group, part in zip(self.members, parts, strict=True)
            for pair in zip(group, part, strict=True)
        ]
        return [part for _, part in sorted(pairs, key=lambda pair: pair[0])]


def group_leaves(windows: Sequence[Any], window_axes: tuple[str, ...] = ()) -> Groups:
    """Groups the small dense leaves of each dtype.

    ``window_axes`` are the mesh axes over which the windows are split.
    """
    small: dict[Any, list[int]] = {}
    others: list[list[int]] = []
    for i, w in enumerate(windows):
        if _is_small(w):
            small.setdefault(w.values.dtype, []).append(i)
        else:
            others.append([i])
    copied = sum(windows[i].values.size for group in small.values() for i in group)
    stored = sum(leaf.size for leaf in jax.tree.leaves(windows))
    if copied > _SHARE * stored or may_be_split(window_axes):
        return Groups([[i] for i in range(len(windows))])
    return Groups([*others, *small.values()])


def _is_small(window: Any) -> bool:
    if not isinstance(window, DenseGradients):
        return False
    # The two passes see the gradients of one device.
    if any(axis is not None for axis in jax.typeof(window.values).sharding.spec[1:]):
        return False
    return math.prod(window.values.shape[1:]) < _SMALL


def _split(vector: jax.Array, shapes: Sequence[tuple[int, ...]]) -> list[jax.Array]:
    ends = [sum(map(math.prod, shapes[: i + 1])) for i in range(len(shapes) - 1)]
    return [
        part.reshape(shape)
        for part, shape in zip(jnp.split(vector, ends), shapes, strict=True)
    ]
