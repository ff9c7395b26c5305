"""The window interface: two protocols that every kind of window implements."""

from typing import Any, Generic, NamedTuple, Protocol, TypeVar, runtime_checkable

import jax

_Row = TypeVar("_Row")


class Encoded(NamedTuple, Generic[_Row]):
    """A gradient as a window stores it.

    Attributes:
      row: The row for :meth:`StoredGradients.write()
        <mfac_jax.windows.StoredGradients.write>`, a tree of arrays.
      vector: The gradient that the row represents, in the shape of the leaf and the
        dtype of the Gram matrix.

    Examples:
      >>> import jax.numpy as jnp, mfac_jax
      >>> stored = mfac_jax.DenseWindow(jnp.bfloat16).init(jnp.zeros(2), num_grads=4)
      >>> encoded = stored.encode(jnp.array([1.0, 1.001]), jnp.float32)
      >>> encoded.row.values.dtype, encoded.vector.tolist()
      (dtype(bfloat16), [1.0, 1.0])
    """

    row: _Row
    vector: jax.Array


class StoredGradients(Protocol[_Row]):
    """The last ``m`` gradients of a leaf: the rows of ``G``, restricted to the leaf.

    Implement it as a :class:`typing.NamedTuple` of arrays, so that the state can be
    jitted, donated, saved and restored anywhere. Its set of field names must differ
    from every built-in kind's, because ``nnx.state`` keeps only the names.

    Arrays that hold gradients have a leading axis of length ``m``, or of a device's
    share of ``m`` where the window is split over devices. A class attribute
    ``not_gradients`` lists the fields of other arrays. A scalar int32 field whose name
    begins with ``num_`` is a counter: :func:`~mfac_jax.diagnostics` reports its sum
    over the leaves, and :func:`~mfac_jax.drop_windows` keeps it.

    ``dtype`` is the dtype of the Gram matrix, float32 or float64, in which all sums are
    taken. ``products`` and ``combine`` must use exactly the values that ``encode``
    returned as ``vector``: otherwise the Gram matrix is the Gram matrix of no
    gradients, and the direction is wrong.

    Examples:
      >>> import jax.numpy as jnp, mfac_jax
      >>> stored = mfac_jax.DenseWindow().init(jnp.zeros(2), num_grads=3)
      >>> encoded = stored.encode(jnp.array([3.0, 4.0]), jnp.float32)
      >>> stored = stored.write(jnp.int32(0), encoded.row, accepted=jnp.array(True))
      >>> stored.products(encoded.vector, jnp.float32).tolist()
      [25.0, 0.0, 0.0]
      >>> stored.combine(jnp.array([2.0, 0.0, 0.0]), start=jnp.zeros(2)).tolist()
      [6.0, 8.0]
    """

    def mismatch(self, shape: tuple[int, ...]) -> str | None:
        """Returns the expected shape in words, or ``None`` if ``shape`` fits.

        Args:
          shape: The shape of a gradient.
        """
        ...

    def encode(self, gradient: jax.Array, dtype: Any) -> Encoded[_Row]:
        """Returns the gradient as stored, and the vector that it represents.

        Args:
          gradient: The gradient of the leaf, in its shape and dtype. The result for a
            gradient that is not finite does not matter: it is never written.
          dtype: The dtype of the vector.
        """
        ...

    def products(self, vector: jax.Array, dtype: Any) -> jax.Array:
        """Returns ``G x``, shape ``(m,)``, in one pass over the window.

        Args:
          vector: ``x``, in the shape of the leaf.
          dtype: The dtype of the products.
        """
        ...

    def combine(self, coefficients: jax.Array, start: jax.Array) -> jax.Array:
        """Returns ``start + cᵀ G``, in one pass over the window.

        Args:
          coefficients: ``c``, shape ``(m,)``, in the dtype of the Gram matrix.
          start: The vector to add to, in the shape of the leaf and the same dtype.
        """
        ...

    def write(
        self, index: jax.Array, row: _Row, accepted: jax.Array
    ) -> "StoredGradients[_Row]":
        """Returns the window with ``row`` at ``index`` if ``accepted``, else itself.

        :func:`~mfac_jax.windows.write_row` does this in place for all arrays with a
        leading axis of gradients.

        Args:
          index: The position of the row, int32 scalar. Where the window is split, it is
            the number of rows on devices that do not hold the row: there only arrays
            without gradients change. ``lax.dynamic_update_index_in_dim`` alone would
            overwrite the last row.
          row: The row that ``encode`` returned.
          accepted: Whether to write it, boolean scalar.
        """
        ...


@runtime_checkable
class Window(Protocol):
    """A storage format for the gradients of a leaf (static).

    Subclass it as a frozen dataclass, and validate its arguments in ``__post_init__``.

    Examples:
      A window that stores half-precision gradients densely, but no vectors:

      >>> import dataclasses, jax.numpy as jnp, mfac_jax
      >>> from mfac_jax import windows
      >>> @dataclasses.dataclass(frozen=True)
      ... class HalfWindow(windows.Window):
      ...   def init(self, leaf, num_grads):
      ...     zeros = jnp.zeros((num_grads, *leaf.shape), jnp.float16)
      ...     return windows.DenseGradients(zeros)
      ...   def unsupported(self, leaf, weight_decay=0.0):
      ...     return 'is a vector' if len(leaf.shape) == 1 else None
      >>> opt = mfac_jax.scale_by_mfac(4, window=HalfWindow())
      >>> opt.init({'w': jnp.zeros((2, 3))}).window['w'].values.dtype
      dtype('float16')
    """

    def init(self, leaf: Any, num_grads: int) -> StoredGradients:
        """Returns a window of ``num_grads`` zero gradients.

        Args:
          leaf: The parameter or its :class:`jax.ShapeDtypeStruct`.
          num_grads: The number of gradients ``m``, or a device's share of them.
        """
        ...

    def unsupported(self, leaf: Any, weight_decay: float = 0.0) -> str | None:
        """Returns why the gradients of a leaf cannot be stored, or ``None``.

        Args:
          leaf: The parameter or its :class:`jax.ShapeDtypeStruct`.
          weight_decay: The rate of coupled weight decay, which makes every gradient of
            the leaf dense; 0 if there is none or it is a schedule or traced.

        Returns:
          A clause that follows the leaf's path in an error message, such as ``"is
          sharded over explicit mesh axes, which …"``.
        """
        del leaf, weight_decay
        return None
