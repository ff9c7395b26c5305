"""Layout of windows over the mesh axes that split their leaves."""

from collections.abc import Sequence
from typing import Any

import jax
from jax import lax
from jax.sharding import PartitionSpec

from mfac_jax.windows._dense import DenseGradients
from mfac_jax.windows._row_sparse import RowSparseGradients
from mfac_jax.windows._storage import may_be_split


def trailing_axes(stored: Any, of_leaf: Sequence[Any]) -> dict[str, Sequence[Any]]:
    """Returns the mesh axes that split the trailing axes of a window, by field.

    Args:
      stored: The window.
      of_leaf: The mesh axes that split each axis of the leaf.
    """
    if isinstance(stored, DenseGradients):
        return {"values": of_leaf}
    if isinstance(stored, RowSparseGradients):
        return {"values": [None, *of_leaf[1:]]}
    return {}


def split_as(stored: Any, leaf: jax.Array) -> jax.Array:
    """Constrains a leaf to be split at most like its window.

    Otherwise XLA may gather the window, which is larger.
    """
    free = [PartitionSpec.UNCONSTRAINED] * leaf.ndim
    spec = trailing_axes(stored, free).get("values", [None] * leaf.ndim)
    if not may_be_split() or None not in spec:
        return leaf
    return lax.with_sharding_constraint(leaf, PartitionSpec(*spec))
