"""The shardings of an optimizer state on a mesh."""

from collections.abc import Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import optax
from jax.sharding import NamedSharding, PartitionSpec

from mfac_jax._shares import (
    AxisName,
    check_axis,
    names_of,
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

    On each device of ``axis`` are ``num_grads / n`` of the stored gradients. Use the
    result wherever JAX asks where the state is: ``jax.jit(opt.init,
    out_shardings=...)``, the training step, a checkpoint to restore.

    * A window is split along its gradients. Where the parameter is split over other
      mesh axes, its dense or row-sparse window is too; of the other kinds every device
      of such an axis holds the same, unless ``axis`` names it as well.
    * Trees like the parameters, such as momentum or Adam's moments, are split as the
      parameters are.
    * All else is on every device: the Gram matrix and its inverse, the error of
      :class:`~mfac_jax.TopKWindow`, counters.

    Build the optimizer with the same ``window_axis``, and trace its ``init`` and
    ``update`` inside ``jax.set_mesh(mesh)``.

    Args:
      opt: Any Optax optimizer, with or without M-FAC.
      params_or_shapes: The parameters, or their :class:`jax.ShapeDtypeStruct`. Their
        ``sharding`` counts where it is a :class:`jax.sharding.NamedSharding`; other
        leaves are on every device.
      mesh: The mesh, with automatic or explicit axes; to plan without devices a
        :class:`jax.sharding.AbstractMesh`.
      axis: The mesh axis over which windows are split, or a tuple of axes.

    Returns:
      A tree of :class:`jax.sharding.NamedSharding` with the structure of
      ``opt.init(params)``.

    Raises:
      ValueError: If ``mesh`` has no such axis, or ``num_grads`` is not a multiple of
        its devices.

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
    in_full = NamedSharding(mesh, PartitionSpec())

    def of_parameter(leaf: Any) -> NamedSharding:
        sharding = getattr(leaf, "sharding", None)
        is_named = isinstance(sharding, NamedSharding)
        return NamedSharding(mesh, sharding.spec) if is_named else in_full

    def is_masked(node: Any) -> bool:
        return isinstance(node, optax.MaskedNode)

    of_params = jax.tree.map(of_parameter, params_or_shapes)
    with jax.sharding.use_abstract_mesh(mesh.abstract_mesh):
        shapes = jax.eval_shape(opt.init, params_or_shapes)
        shardings = optax.tree.map_params(
            lambda params: jax.eval_shape(opt.init, params),
            lambda node, sharding: node if is_masked(node) else sharding,
            shapes,
            of_params,
            transform_non_params=lambda _: in_full,
            is_leaf=is_masked,
        )
    leaves, names = named_leaves(params_or_shapes), names_of(axis)
    specs = {
        path: without_axes(sharding.spec, names)
        for path, sharding in named_leaves(of_params).items()
    }

    def with_windows(node: Any, sharding: Any) -> Any:
        if not is_state(node) or not isinstance(node.window, Mapping):
            return sharding
        num_grads = len(node.gram)
        is_split = rows_per_device(num_grads, mesh, axis) < num_grads
        window = {}
        for path, stored in node.window.items():
            missing = jnp.ndim(leaves[path]) - len(specs[path])
            of_leaf = [*specs[path], *[None] * missing]
            of_fields = _specs(stored, axis if is_split else None, of_leaf)
            window[path] = stored._replace(
                **{name: NamedSharding(mesh, spec) for name, spec in of_fields.items()}
            )
        return sharding._replace(window=window)

    return jax.tree.map(with_windows, shapes, shardings, is_leaf=is_state)


def _specs(
    stored: Any, axis: AxisName | None, of_leaf: Sequence[Any]
) -> dict[str, PartitionSpec]:
    """Returns the specs of the fields of a window."""
    gradients, trailing = gradient_fields(stored), trailing_axes(stored, of_leaf)
    return {
        name: PartitionSpec(axis, *trailing.get(name, []))
        if name in gradients
        else PartitionSpec()
        for name in stored._fields
    }
