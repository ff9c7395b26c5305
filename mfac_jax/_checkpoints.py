"""Optimizer states without windows, for small checkpoints."""

from typing import Any

import jax

from mfac_jax._state import ScaleByMFACState, is_counter, is_state, map_windows


def drop_windows(opt_state: Any) -> Any:
    """Empties the windows of an optimizer state, for a small checkpoint.

    Args:
      opt_state: A tree that contains optimizer states, such as a training state or
        ``optimizer.opt_state`` of an ``nnx.Optimizer``, or its shapes. States of other
        optimizers are returned unchanged.

    Returns:
      The tree with ``None`` in place of every stored gradient, Gram matrix and inverse.
      Counters, damping and momentum are kept, except the momentum of
      :func:`~mfac_jax.scale_by_adam_mfac`, which is in the window.
      :func:`~mfac_jax.refill_windows` makes the state usable again.

    Raises:
      TypeError: For ``nnx.state(optimizer)``, which loses the class of the state.

    Examples:
      >>> import jax, jax.numpy as jnp, mfac_jax
      >>> opt = mfac_jax.mfac(1e-2, num_grads=4)
      >>> params = {'w': jnp.ones(1000)}
      >>> _, state = opt.update(params, opt.init(params))
      >>> small = mfac_jax.drop_windows(state)
      >>> sum(x.size for x in jax.tree.leaves(small))
      6
    """

    def drop(node: Any) -> Any:
        if not is_state(node):
            return node
        _check_class(node)
        window = map_windows(
            lambda stored: stored._replace(
                **{name: None for name in stored._fields if not is_counter(name)}
            ),
            node.window,
        )
        return node._replace(gram=None, inverse=None, window=window)

    return jax.tree.map(drop, opt_state, is_leaf=is_state)


def refill_windows(opt_state: Any, like: Any) -> Any:
    """Adds empty windows to an optimizer state that has none.

    Args:
      opt_state: The result of :func:`~mfac_jax.drop_windows`, for example restored
        from a checkpoint.
      like: The initial state of the same optimizer, ``opt.init(params)``, or the tree
        that contains it. For ``flax.nnx``, the ``opt_state`` of a new
        ``nnx.Optimizer``.

    Returns:
      ``opt_state`` with the windows, Gram matrices and inverses of ``like``. The
      windows fill again as at the start of training.

    Raises:
      TypeError: For ``nnx.state(optimizer)``, which loses the class of the state.
      ValueError: If ``like`` has no window, or is the state of other parameters.

    Examples:
      >>> import jax.numpy as jnp, mfac_jax
      >>> opt = mfac_jax.mfac(1e-2, num_grads=4)
      >>> params = {'w': jnp.ones(3)}
      >>> _, state = opt.update(params, opt.init(params))
      >>> restored = mfac_jax.drop_windows(state)
      >>> state = mfac_jax.refill_windows(restored, opt.init(params))
      >>> updates, state = opt.update(params, state)
      >>> print(mfac_jax.diagnostics(state)['num_stored'])
      1
    """

    def refill(node: Any, empty: Any) -> Any:
        if not is_state(node):
            return node
        _check_class(node)
        if not is_state(empty) or empty.gram is None:
            raise ValueError(
                "`like` must hold a state with a window where `opt_state` holds one: "
                "refill_windows(opt_state, opt.init(params))."
            )
        if map_windows(lambda _: 0, node.window) != map_windows(
            lambda _: 0, empty.window
        ):
            raise ValueError(
                "`like` is the state of other parameters: it has windows for "
                f"{sorted(empty.window)}, `opt_state` for {sorted(node.window)}."
            )
        window = map_windows(
            # If the kind of window differs, only the counters of both are kept.
            lambda stored, counted: stored._replace(
                **{
                    name: value
                    for name, value in counted._asdict().items()
                    if is_counter(name) and name in stored._fields
                }
            ),
            empty.window,
            node.window,
        )
        return node._replace(
            index=empty.index, gram=empty.gram, inverse=empty.inverse, window=window
        )

    return jax.tree.map(refill, opt_state, like, is_leaf=is_state)


def _check_class(node: Any) -> None:
    if not isinstance(node, ScaleByMFACState):
        raise TypeError(
            "nnx.state(optimizer) loses the class of the state; pass "
            "optimizer.opt_state."
        )
