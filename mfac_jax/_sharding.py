"""Shardings of an optimizer state on a mesh."""

from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
import optax
from jax import tree_util
from jax.sharding import AxisType, NamedSharding, PartitionSpec

from mfac_jax import _checks
from mfac_jax._shares import (
    AxisName,
    check_axis,
    names_of,
    planning,
    rows_per_device,
    without_axes,
)
from mfac_jax._state import gradient_fields, is_state
from mfac_jax.windows._choice import named_leaves
from mfac_jax.windows._layout import trailing_axes


def state_shardings(
    opt: optax.GradientTransformation,
    params_or_shapes: Any,
    mesh: jax.sharding.Mesh | jax.sharding.AbstractMesh,
    axis: AxisName,
) -> Any:
    """Returns the shardings of an optimizer state with windows split over devices.

    Each of the ``n`` devices of ``axis`` holds ``num_grads / n`` of the stored
    gradients. Pass the result wherever JAX takes shardings of the state: to ``jax.jit``
    as ``out_shardings`` of ``opt.init``, to the training step, and to restore a
    checkpoint.

    * A window is split along its gradients. Where the parameter is split over other
      mesh axes, a dense or row-sparse window is split like it; windows of the other
      kinds are replicated over these axes.
    * Trees like the parameters, such as momentum or Adam's moments, are sharded like
      the parameters.
    * Everything else is replicated: the Gram matrix and its inverse, the error of
      :class:`~mfac_jax.TopKWindow`, counters.

    Build the optimizer with ``window_axis=axis``, and trace its ``init`` and ``update``
    inside ``jax.set_mesh(mesh)``.

    Args:
      opt: Any Optax optimizer, with or without M-FAC.
      params_or_shapes: The parameters, or their :class:`jax.ShapeDtypeStruct`. A leaf
        whose ``sharding`` is a :class:`jax.sharding.NamedSharding` keeps it; other
        leaves are replicated.
      mesh: The mesh, with automatic or explicit axes, or a
        :class:`jax.sharding.AbstractMesh` to plan without devices.
      axis: The mesh axis over which windows are split, or a tuple of axes.

    Returns:
      A tree of :class:`jax.sharding.NamedSharding` with the structure of
      ``opt.init(params)``.

    Raises:
      ValueError: If ``mesh`` has no such axis, ``num_grads`` is not a multiple of its
        size, or a parameter is split over an axis that ``mesh`` lacks.

    Examples:
      >>> import jax, jax.numpy as jnp, mfac_jax
      >>> mesh = jax.sharding.AbstractMesh((8,), ('data',))
      >>> params = {'w': jnp.zeros((3, 4))}
      >>> opt = mfac_jax.scale_by_mfac(num_grads=16, window_axis='data')
      >>> shardings = mfac_jax.state_shardings(opt, params, mesh, 'data')
      >>> shardings.window['w'].values.shard_shape((16, 3, 4))
      (2, 3, 4)
      >>> shardings.gram.is_fully_replicated
      True
    """
    check_axis(mesh, axis, "axis")
    leaves = named_leaves(params_or_shapes)
    specs = {name: _spec_of(name, leaf, mesh) for name, leaf in leaves.items()}
    paths = [path for path, _ in tree_util.tree_leaves_with_path(params_or_shapes)]
    shapes = map(jnp.shape, leaves.values())
    by_path = dict(zip(paths, zip(shapes, specs.values(), strict=True), strict=True))

    def of_array(path: tuple[Any, ...], x: Any) -> NamedSharding:
        # Found by the end of its path: optax.tree.map_params fails for optimizers that
        # change the tree or the shapes of the parameters.
        for start in range(len(path) + 1):
            shape, spec = by_path.get(path[start:], (None, PartitionSpec()))
            if shape == x.shape:
                return _sharding(mesh, spec, x)
        return _sharding(mesh, PartitionSpec(), x)

    def of_node(path: tuple[Any, ...], node: Any) -> Any:
        if not is_state(node):
            return of_array(path, node)
        shardings = jax.tree.map(lambda x: _sharding(mesh, PartitionSpec(), x), node)
        if not isinstance(node.window, Mapping):
            return shardings
        num_grads = len(node.gram)
        is_split = rows_per_device(num_grads, mesh, axis) < num_grads
        window = {}
        for name, stored in node.window.items():
            of_leaf = without_axes(specs.get(name, PartitionSpec()), names_of(axis))
            over = axis if is_split else None
            window[name] = _of_window(stored, mesh, over, tuple(of_leaf))
        return shardings._replace(window=window)

    with planning():
        # JAX caches traces by function: without the lambda, opt.init would reuse this.
        state = jax.eval_shape(
            lambda params: opt.init(params), jax.tree.map(_shape_of, params_or_shapes)
        )
    return tree_util.tree_map_with_path(of_node, state, is_leaf=is_state)


def _sharding(mesh: Any, spec: PartitionSpec, x: Any) -> NamedSharding:
    """Returns a sharding in the form that steps return, to avoid recompilation."""
    axes = [*spec, *[None] * (x.ndim - len(spec))]
    while axes and axes[-1] is None and AxisType.Explicit not in mesh.axis_types:
        axes.pop()
    return NamedSharding(mesh, PartitionSpec(*axes))


def _spec_of(name: str, leaf: Any, mesh: Any) -> PartitionSpec:
    """Returns how a parameter is split over the mesh."""
    sharding = getattr(leaf, "sharding", None)
    if not isinstance(sharding, NamedSharding):
        return PartitionSpec()
    axes = {axis for entry in sharding.spec for axis in names_of(entry)}
    if unknown := axes.difference(mesh.axis_names):
        raise ValueError(
            f"{_checks.named(name)} is split over {min(unknown)!r}, which is not an "
            f"axis of the mesh; its axes are {', '.join(map(repr, mesh.axis_names))}."
        )
    return sharding.spec


def _shape_of(leaf: Any) -> jax.ShapeDtypeStruct:
    """Returns the shape and dtype of a leaf, without its sharding."""
    return jax.ShapeDtypeStruct(jnp.shape(leaf), jnp.result_type(leaf))


def _of_window(
    stored: Any, mesh: Any, axis: AxisName | None, of_leaf: tuple[Any, ...]
) -> Any:
    """Returns the shardings of a window; fields without gradients are replicated."""
    trailing = trailing_axes(stored, of_leaf)
    specs = {
        name: PartitionSpec(axis, *trailing.get(name, []))
        for name in gradient_fields(stored)
    }
    return stored._replace(
        **{
            name: _sharding(mesh, specs.get(name, PartitionSpec()), x)
            for name, x in stored._asdict().items()
        }
    )
