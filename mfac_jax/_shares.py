"""The share of the window that each device of a mesh axis holds.

The rows of ``G`` are split over the devices in order. A device multiplies and writes
its own rows. Devices exchange the products of the new Gram row (``m`` elements) and the
sum ``cᵀ G`` (one gradient).
"""

import contextlib
import contextvars
import math
from collections.abc import Callable, Iterator, Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jax.sharding import AxisType, NamedSharding, PartitionSpec

from mfac_jax import _checks
from mfac_jax._state import gradient_fields, map_gradients

AxisName = str | tuple[str, ...]

_is_planning = contextvars.ContextVar("_is_planning", default=False)
_NOT_GRADIENTS = (
    "List arrays that hold no gradients in the class attribute not_gradients."
)
IN_SHARD_MAP = (
    "Inside jax.shard_map the optimizer needs window_axis, and its state the specs of "
    "mfac_jax.state_shardings."
)


class Shares(NamedTuple):
    """The split of the rows of ``G`` over devices.

    Attributes:
      num_grads: The number of rows ``m``.
      num_rows: The number of rows of a device.
      axes: The mesh axes that ``window_axis`` names.
      names: The same axes, or none if every device holds all rows.
      is_mapped: Whether the caller is inside :func:`jax.shard_map` over these axes.
    """

    num_grads: int
    num_rows: int
    axes: tuple[str, ...]
    names: tuple[str, ...]
    is_mapped: bool

    def init(self, function: Callable[[int], dict[str, Any]]) -> dict[str, Any]:
        """Returns the windows that ``function`` creates for a number of rows."""

        def make() -> dict[str, Any]:
            num_rows = self.num_rows if self.is_mapped else self.num_grads
            windows = function(num_rows)
            if self.names:
                self.check(windows, _NOT_GRADIENTS)
            return windows

        if not self.names:
            return make()
        if self.is_mapped:
            return map_gradients(self._varying, make())
        # Op by op, every array would be on one device first.
        return jax.jit(lambda: map_gradients(self._split, make()))()

    def run(
        self,
        function: Callable[..., Any],
        windows: Any,
        *args: Any,
        writes: bool = False,
    ) -> Any:
        """Calls ``function(windows, *args)`` on every device with the device's rows.

        Args:
          function: Returns windows if ``writes``, otherwise arrays that are the same on
            every device.
          windows: A tree of windows.
          *args: Trees of arrays, passed to every device in full.
          writes: Whether the function returns windows.
        """
        args = jax.tree.map(self.in_full, args)
        if self.is_mapped or not self.names:
            return function(windows, *args)
        if self._is_explicit():
            windows = map_gradients(self._split, windows)
        everywhere = PartitionSpec()
        split = jax.tree.map(
            lambda x: x if isinstance(x, PartitionSpec) else everywhere,
            map_gradients(lambda _: PartitionSpec(self.names), windows),
        )
        return jax.shard_map(
            function,
            in_specs=(split, *[everywhere] * len(args)),
            out_specs=split if writes else everywhere,
            axis_names=set(self.names),
        )(windows, *args)

    def gather(self, products: jax.Array) -> jax.Array:
        """Returns the products of all rows, given the products of a device's rows."""
        if not self.names:
            return products
        others = self._varying(jnp.zeros(self.num_grads, products.dtype))
        return self.total(
            lax.dynamic_update_slice_in_dim(others, products, self._first(), 0)
        )

    def own(self, coefficients: jax.Array) -> jax.Array:
        """Returns the coefficients of a device's rows."""
        if not self.names:
            return coefficients
        return lax.dynamic_slice_in_dim(coefficients, self._first(), self.num_rows)

    def once(self, x: jax.Array) -> jax.Array:
        """Returns ``x`` on the first device and zeros on the others."""
        if not self.names:
            return x
        return jnp.where(lax.axis_index(self.names) == 0, x, 0)

    def total(self, x: jax.Array) -> jax.Array:
        """Returns the sum over the devices."""
        return lax.psum(x, self.names) if self.names else x

    def position(self, index: jax.Array) -> jax.Array:
        """Returns the position of a row on a device; ``num_rows`` if not there."""
        if not self.names:
            return index
        position = index - self._first()
        is_there = (position >= 0) & (position < self.num_rows)
        return jnp.where(is_there, position, self.num_rows)

    def in_full(self, leaf: Any) -> Any:
        """Returns a leaf, or its shape, gathered over the axes of the window.

        :func:`jax.shard_map` gathers leaves itself, except over explicit axes.
        """
        sharding = jax.typeof(leaf).sharding
        spec = without_axes(sharding.spec, self.axes)
        if self.is_mapped or spec == sharding.spec:
            return leaf
        if isinstance(leaf, jax.ShapeDtypeStruct):
            return leaf.update(sharding=NamedSharding(sharding.mesh, spec))
        return jax.sharding.reshard(leaf, spec)

    def as_gradient(self, update: jax.Array, grad: jax.Array) -> jax.Array:
        """Returns an update, sharded like its gradient over explicit axes."""
        spec = jax.typeof(grad).sharding.spec
        if self.is_mapped or spec == jax.typeof(update).sharding.spec:
            return update
        return jax.sharding.reshard(update, spec)

    def check(self, windows: Any, remedy: str) -> None:
        """Raises a ValueError unless all windows hold the rows of this device."""
        expected = self.num_rows if self.is_mapped else self.num_grads
        for path, stored in windows.items() if isinstance(windows, Mapping) else ():
            for name in gradient_fields(stored):
                found = getattr(stored, name).shape[0]
                if found != expected:
                    raise ValueError(
                        f"{name} in the window of {_checks.named(path)} must hold "
                        f"{expected} gradients here, got {found}. {remedy}"
                    )

    def _first(self) -> jax.Array:
        return lax.axis_index(self.names) * self.num_rows

    def _varying(self, x: jax.Array) -> jax.Array:
        return lax.pcast(x, self.names, to="varying")

    def _is_explicit(self) -> bool:
        mesh = jax.sharding.get_abstract_mesh()
        return AxisType.Explicit in _types_of(mesh, self.names)

    def _split(self, x: jax.Array) -> jax.Array:
        if self._is_explicit():
            rest = jax.typeof(x).sharding.spec[1:]
            return jax.sharding.reshard(x, PartitionSpec(self.names, *rest))
        rest = [PartitionSpec.UNCONSTRAINED] * (x.ndim - 1)
        return lax.with_sharding_constraint(x, PartitionSpec(self.names, *rest))


@contextlib.contextmanager
def planning() -> Iterator[None]:
    """Treats windows as unsplit, to trace shapes without a mesh."""
    token = _is_planning.set(True)
    try:
        yield
    finally:
        _is_planning.reset(token)


def shares_of(num_grads: int, axis: AxisName | None) -> Shares:
    """Returns the shares over an axis of the mesh in context; ``None`` is one share.

    Raises:
      ValueError: If the mesh has no such axis, or the axis does not divide the window.
    """
    axes = names_of(axis)
    if not axes or _is_planning.get():
        return Shares(num_grads, num_grads, (), (), False)
    mesh = jax.sharding.get_abstract_mesh()
    check_axis(mesh, axis, "window_axis")
    num_rows = rows_per_device(num_grads, mesh, axis)
    names = axes if num_rows < num_grads else ()
    mapped = [name for name in names if name in mesh.manual_axes]
    if mapped and len(mapped) < len(names):
        raise ValueError(
            f"window_axis {axis!r}: jax.shard_map must map all of these axes or none, "
            f"but it maps {mapped}."
        )
    if not mapped and len(_types_of(mesh, names)) > 1:
        raise ValueError(
            f"window_axis {axis!r}: the axes must be all automatic or all explicit."
        )
    return Shares(num_grads, num_rows, axes, names, bool(mapped))


def _types_of(mesh: Any, names: tuple[str, ...]) -> set[AxisType]:
    types = zip(mesh.axis_names, mesh.axis_types, strict=True)
    return {kind for name, kind in types if name in names}


def check_axis(mesh: Any, axis: AxisName | None, argument: str) -> None:
    """Raises a ValueError unless the mesh has the axis."""
    for name in names_of(axis):
        if mesh.empty:
            raise ValueError(
                f"{argument} {name!r} needs a mesh: call init and update inside "
                "jax.set_mesh(mesh)."
            )
        if name not in mesh.axis_names:
            known = ", ".join(map(repr, mesh.axis_names))
            raise ValueError(
                f"{argument} {name!r} is not an axis of the mesh; its axes are {known}."
            )


def rows_per_device(num_grads: int, mesh: Any, axis: AxisName | None) -> int:
    """Returns the number of gradients on each device of an axis.

    Raises:
      ValueError: With the nearest multiples of the size of the axis.
    """
    size = math.prod(mesh.shape[name] for name in names_of(axis))
    if num_grads % size:
        below = num_grads - num_grads % size
        nearest = f"{below} or {below + size}" if below else f"{size}"
        raise ValueError(
            f"num_grads must be a multiple of the {size} devices of mesh axis "
            f"{axis!r}, over which the windows are split, got {num_grads}: take "
            f"{nearest}."
        )
    return num_grads // size


def names_of(axis: Any) -> tuple[str, ...]:
    """Returns the mesh axes that an entry of a PartitionSpec names."""
    return () if axis is None else axis if isinstance(axis, tuple) else (axis,)


def without_axes(spec: PartitionSpec, names: tuple[str, ...]) -> PartitionSpec:
    """Returns a PartitionSpec without these axes."""

    def without(entry: Any) -> Any:
        kept = tuple(name for name in names_of(entry) if name not in names)
        return kept if len(kept) > 1 else next(iter(kept), None)

    return PartitionSpec(*map(without, spec))
