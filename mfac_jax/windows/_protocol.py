"""The window interface: two protocols that every kind of window implements.

A :class:`Window` defines how the gradients of a leaf are stored. It is static, like the
arguments of the optimizer. Its ``init`` returns the :class:`StoredGradients` of the
leaf, which are part of the optimizer's state.
"""

from typing import Any, Generic, NamedTuple, Protocol, TypeVar, runtime_checkable

import jax

_Row = TypeVar("_Row")


class Encoded(NamedTuple, Generic[_Row]):
    """A gradient as a window stores it.

    Attributes:
      row: what :meth:`StoredGradients.write` puts into the window.
      vector: the gradient that the row represents, in the shape of the leaf.
    """

    row: _Row
    vector: jax.Array


class StoredGradients(Protocol[_Row]):
    """The last ``m`` gradients of a leaf: the rows of ``G``, restricted to the leaf.

    Implement it as a :class:`typing.NamedTuple` of arrays, so that the state can be
    jitted, donated, saved and restored anywhere. Its field names must differ from those
    of the kinds of this package, by which ``nnx.state`` is read.

    Arrays that hold gradients have a leading axis of length ``m``, or where the window
    is split over devices, of a device's share of ``m``. A kind with other arrays names
    their fields in a class attribute ``not_gradients``. A scalar int32 field
    whose name begins with ``num_`` is a counter: :func:`mfac_jax.diagnostics` reports
    its sum over the leaves, and :func:`mfac_jax.drop_windows` keeps it.

    ``dtype`` is the dtype of the Gram matrix, float32 or float64, in which all sums are
    taken. What :meth:`products` and :meth:`combine` see must be exactly what
    :meth:`encode` returned as ``vector``: a rounding residual outside the span of the
    window would come back multiplied by ``1 / λ``.
    """

    def mismatch(self, shape: tuple[int, ...]) -> str | None:
        """Returns the expected shape in words, or ``None`` if ``shape`` fits it."""
        ...

    def encode(self, gradient: jax.Array, dtype: Any) -> Encoded[_Row]:
        """Returns the gradient as stored, with the vector that it represents.

        A gradient that is not finite may give anything: it is never written.
        """
        ...

    def products(self, vector: jax.Array, dtype: Any) -> jax.Array:
        """Returns ``G x``, shape ``(m,)``: one pass over the window."""
        ...

    def combine(self, coefficients: jax.Array, start: jax.Array) -> jax.Array:
        """Returns ``start + cᵀ G`` in the leaf's shape: one pass over the window."""
        ...

    def write(
        self, index: jax.Array, row: _Row, accepted: jax.Array
    ) -> "StoredGradients[_Row]":
        """Returns the window with ``row`` at ``index`` if ``accepted``, else itself.

        Where the window is split, ``index`` is the number of rows on devices that do
        not hold the row: there only arrays without gradients change.
        :func:`mfac_jax.windows.write_row` does this, in place, for all arrays with a
        leading axis of gradients; ``lax.dynamic_update_index_in_dim`` alone would
        overwrite the last row.
        """
        ...


@runtime_checkable
class Window(Protocol):
    """A storage format for the gradients of a leaf, static.

    Subclass it as a frozen dataclass. Arguments are validated when it is created.
    """

    def init(self, leaf: Any, num_grads: int) -> StoredGradients:
        """Returns a window of ``num_grads`` zero gradients.

        Args:
          leaf: the parameter or its :class:`jax.ShapeDtypeStruct`.
          num_grads: the number of gradients ``m``.
        """
        ...

    def unsupported(self, leaf: Any, weight_decay: float = 0.0) -> str | None:
        """Returns why the gradients of a leaf cannot be stored, or ``None``.

        Args:
          leaf: the parameter or its :class:`jax.ShapeDtypeStruct`.
          weight_decay: the rate of coupled weight decay, which makes every gradient of
            the leaf dense; 0 if there is none or it is traced.

        Returns:
          A clause that follows the leaf's path in an error message, such as ``"is
          sharded over explicit mesh axes, which …"``.
        """
        del leaf, weight_decay
        return None
