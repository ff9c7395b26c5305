"""Storage helpers of all kinds of windows: in-place row writes, dtypes, blocks."""

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

    The function selects between rows instead of windows, so that XLA can write in
    place, also under ``vmap``.

    Args:
      window: A tree of arrays whose leading axis counts gradients.
      index: The position of the row, int32 scalar; the number of rows if the row is on
        another device.
      row: A tree like ``window`` without the leading axes, in the same dtypes.
      accepted: Whether the row replaces the one at ``index``, boolean scalar.

    Returns:
      The window after the write.

    Examples:
      >>> import jax.numpy as jnp
      >>> from mfac_jax import windows
      >>> window, row = jnp.zeros((3, 2)), jnp.ones(2)
      >>> windows.write_row(window, jnp.int32(1), row, jnp.array(True)).tolist()
      [[0.0, 0.0], [1.0, 1.0], [0.0, 0.0]]
      >>> windows.write_row(window, jnp.int32(1), row, jnp.array(False)).tolist()
      [[0.0, 0.0], [0.0, 0.0], [0.0, 0.0]]
    """
    is_here = accepted & (index < jax.tree.leaves(window)[0].shape[0])
    # The same value, in a type that varies over devices like the window's.
    row = jax.tree.map(lambda r: lax.select_n(is_here, r, r), row)

    def select():
        return jax.tree.map(lambda r, o: jnp.where(is_here, r, o), row, old_row())

    def old_row():
        return jax.tree.map(
            lambda w: lax.dynamic_index_in_dim(w, index, keepdims=False), window
        )

    # On the CPU, XLA fuses a select into the kernel of the write, which then reads the
    # window and is not in place (bfloat16 with jax 0.10). On a GPU, a conditional makes
    # the host wait.
    chosen = lax.platform_dependent(
        cpu=lambda: lax.cond(is_here, lambda: row, old_row), default=select
    )
    return jax.tree.map(
        lambda w, r: lax.dynamic_update_index_in_dim(w, r, index, 0), window, chosen
    )


def saturating_add(total: jax.Array, number: jax.Array) -> jax.Array:
    """Adds a nonnegative integer to a counter that saturates."""
    return total + jnp.minimum(number, jnp.iinfo(total.dtype).max - total)


def is_explicitly_sharded(leaf: Any) -> bool:
    """Returns whether a leaf is sharded over explicit mesh axes."""
    return any(axis is not None for axis in jax.typeof(leaf).sharding.spec)


def may_be_split(window_axes: tuple[str, ...] = ()) -> bool:
    """Returns whether a leaf may be sharded over axes other than its window's.

    Types do not show sharding over automatic axes. Reshaping such a leaf gathers it,
    which is too costly for a window.

    Args:
      window_axes: The axes of the window, which are manual inside its passes.
    """
    mesh = jax.sharding.get_abstract_mesh()
    return bool(window_axes or mesh.manual_axes) and any(
        kind == AxisType.Auto and mesh.shape[name] > 1
        for name, kind in zip(mesh.axis_names, mesh.axis_types, strict=True)
        if name not in window_axes
    )


def sharding_unsupported(leaf: Any) -> str | None:
    """Returns why a window cannot store an explicitly sharded leaf, or ``None``."""
    if not is_explicitly_sharded(leaf):
        return None
    return (
        "is sharded over explicit mesh axes, which only mfac_jax.DenseWindow can "
        "store. Pass a function (path, leaf) -> window that chooses it for this leaf."
    )


def float_dtype(dtype: jax.typing.DTypeLike | None, leaf: Any) -> Any:
    """Returns ``dtype``, by default the dtype of the leaf, float32 at least."""
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
    """Returns the expected blocks in words, or ``None`` if ``shape`` has them."""
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
