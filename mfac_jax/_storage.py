"""What the window kinds share: dtypes, blocks, and how a row is written."""

import math
from typing import Any, Generic, NamedTuple, TypeVar

import jax
import jax.numpy as jnp
from jax import lax

_Stored = TypeVar("_Stored")


class Encoded(NamedTuple, Generic[_Stored]):
    """A gradient as a window stores it.

    Attributes:
      row: what is stored.
      vector: the gradient that this stands for, in the shape of the leaf.
      num_dropped: rows of the gradient that are left out for good.
    """

    row: _Stored
    vector: jax.Array
    num_dropped: jax.Array | int = 0


def write_row(
    window: _Stored, index: jax.Array, row: _Stored, accepted: jax.Array
) -> _Stored:
    """Writes ``row`` at ``index`` where ``accepted``; else the window stays as it is.

    Choosing the row, not the window, lets XLA write in place, also under ``vmap``.
    """

    def select():
        return jax.tree.map(lambda r, o: jnp.where(accepted, r, o), row, old_row())

    def old_row():
        return jax.tree.map(
            lambda w: lax.dynamic_index_in_dim(w, index, keepdims=False), window
        )

    # On the CPU a select would become part of XLA's kernel for the write, which then
    # reads the window and is not in place (bfloat16 with jax 0.10). On a GPU a
    # condition would make the host wait.
    chosen = lax.platform_dependent(
        cpu=lambda: lax.cond(accepted, lambda: row, old_row), default=select
    )
    return jax.tree.map(
        lambda w, r: lax.dynamic_update_index_in_dim(w, r, index, 0), window, chosen
    )


def check_integer(name: str, value: Any, minimum: int) -> None:
    """Refuses what is not an integer of at least ``minimum``."""
    if isinstance(value, bool) or not hasattr(value, "__index__"):
        raise TypeError(f"{name} must be an integer, got {value!r}.")
    if value < minimum:
        raise ValueError(f"{name} must be at least {minimum}, got {value}.")


def check_dtype(kind: str, dtype: jax.typing.DTypeLike | None) -> None:
    """Refuses what no gradient is stored in; ``None`` passes."""
    allowed = ("float64", "float32", "bfloat16", "float16")
    if dtype is None:
        return
    try:
        name = jnp.dtype(dtype).name
    except TypeError:
        name = repr(dtype)
    if name not in allowed:
        raise ValueError(
            f"{kind} dtype must be one of {', '.join(allowed)} or None, got {name}."
        )


def float_dtype(dtype: jax.typing.DTypeLike | None, leaf: Any) -> Any:
    """Returns ``dtype``; for ``None`` that of the leaf, but float32 at least."""
    return jnp.promote_types(leaf.dtype, jnp.float32) if dtype is None else dtype


def index_dtype(size: int) -> Any:
    """Returns the narrowest unsigned integer type that holds ``0 … size − 1``."""
    return next(
        dtype
        for dtype in (jnp.uint8, jnp.uint16, jnp.uint32)
        if size - 1 <= jnp.iinfo(dtype).max
    )


def block_shape(size: int, block_size: int) -> tuple[int, int]:
    """Returns the number of blocks and their size, for a leaf of ``size`` numbers."""
    block_size = max(1, min(size, block_size))
    return -(-size // block_size), block_size


def to_blocks(leaf: jax.Array, shape: tuple[int, ...]) -> jax.Array:
    """Flattens a leaf and cuts it into blocks, the last filled up with zeros."""
    flat = leaf.reshape(-1)
    return jnp.pad(flat, (0, math.prod(shape) - flat.size)).reshape(shape)


def from_blocks(blocks: jax.Array, shape: tuple[int, ...]) -> jax.Array:
    """Undoes :func:`to_blocks`."""
    return blocks.reshape(-1)[: math.prod(shape)].reshape(shape)
