"""Storage that window kinds share: rows written in place, dtypes, blocks."""

import math
from typing import Any, TypeVar

import jax
import jax.numpy as jnp
from jax import lax
from jax.sharding import AxisType

_Stored = TypeVar("_Stored")


def write_row(
    window: _Stored, index: jax.Array, row: _Stored, accepted: jax.Array
) -> _Stored:
    """Writes a row into a window in place if it is accepted.

    Choosing the row, not the window, lets XLA write in place, also under ``vmap``.

    Args:
      window: a tree of arrays whose leading axis counts gradients.
      index: the position of the row, int32 scalar; the number of rows if it is on
        another device.
      row: a tree like ``window`` without the leading axes.
      accepted: whether the row replaces the one at ``index``, boolean scalar.

    Returns:
      The window after the write.
    """
    is_here = accepted & (index < jax.tree.leaves(window)[0].shape[0])
    # The same value, of a type that differs between devices as the window does.
    row = jax.tree.map(lambda r: lax.select_n(is_here, r, r), row)

    def select():
        return jax.tree.map(lambda r, o: jnp.where(is_here, r, o), row, old_row())

    def old_row():
        return jax.tree.map(
            lambda w: lax.dynamic_index_in_dim(w, index, keepdims=False), window
        )

    # On the CPU a select would become part of XLA's kernel for the write, which then
    # reads the window and is not in place (bfloat16 with jax 0.10). On a GPU a
    # condition would make the host wait.
    chosen = lax.platform_dependent(
        cpu=lambda: lax.cond(is_here, lambda: row, old_row), default=select
    )
    return jax.tree.map(
        lambda w, r: lax.dynamic_update_index_in_dim(w, r, index, 0), window, chosen
    )


def saturating_add(total: jax.Array, number: jax.Array) -> jax.Array:
    """Adds a nonnegative integer to a counter, which stops at its largest value."""
    return total + jnp.minimum(number, jnp.iinfo(total.dtype).max - total)


def is_explicitly_sharded(leaf: Any) -> bool:
    """Returns whether a leaf is sharded over explicit mesh axes."""
    return any(axis is not None for axis in jax.typeof(leaf).sharding.spec)


def may_be_split(window_axes: tuple[str, ...] = ()) -> bool:
    """Returns whether a leaf may be sharded where its window is split over devices.

    Types do not show it if the axis is automatic. To reshape such a leaf is to gather
    it, and of a window that is too much.

    Args:
      window_axes: The axes of the window; inside its passes they are manual.
    """
    mesh = jax.sharding.get_abstract_mesh()
    return bool(window_axes or mesh.manual_axes) and any(
        kind == AxisType.Auto and mesh.shape[name] > 1
        for name, kind in zip(mesh.axis_names, mesh.axis_types, strict=True)
        if name not in window_axes
    )


def sharding_unsupported(leaf: Any) -> str | None:
    """Returns the reason of a window that cannot follow explicit sharding."""
    if not is_explicitly_sharded(leaf):
        return None
    return (
        "is sharded over explicit mesh axes, which only mfac_jax.DenseWindow can "
        "store. Pass a function (path, leaf) -> window that chooses it for this leaf."
    )


def float_dtype(dtype: jax.typing.DTypeLike | None, leaf: Any) -> Any:
    """Returns ``dtype``, or for ``None`` the dtype of the leaf, float32 at least."""
    if dtype is not None:
        return dtype
    dtype = jnp.result_type(leaf)
    return dtype if jnp.finfo(dtype).bits >= 32 else jnp.float32


def index_dtype(size: int) -> Any:
    """Returns the narrowest unsigned integer type that holds ``0 … size − 1``."""
    return next(
        dtype
        for dtype in (jnp.uint8, jnp.uint16, jnp.uint32)
        if size - 1 <= jnp.iinfo(dtype).max
    )


def block_shape(size: int, block_size: int) -> tuple[int, int]:
    """Returns the number of blocks and their size, for a leaf of ``size`` elements."""
    block_size = max(1, min(size, block_size))
    return -(-size // block_size), block_size


def block_mismatch(
    blocks: tuple[int, ...], shape: tuple[int, ...], block_size: int
) -> str | None:
    """Returns the expected blocks in words, unless a leaf of ``shape`` has them."""
    if block_shape(math.prod(shape), block_size) == blocks:
        return None
    return f"{blocks[0]} block(s) of {blocks[1]} elements"


def to_blocks(leaf: jax.Array, shape: tuple[int, ...]) -> jax.Array:
    """Flattens a leaf and cuts it into blocks; the last one is padded with zeros."""
    flat = leaf.reshape(-1)
    return jnp.pad(flat, (0, math.prod(shape) - flat.size)).reshape(shape)


def from_blocks(blocks: jax.Array, shape: tuple[int, ...]) -> jax.Array:
    """Inverse of :func:`to_blocks`."""
    return blocks.reshape(-1)[: math.prod(shape)].reshape(shape)
