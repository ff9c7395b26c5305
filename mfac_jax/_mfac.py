"""M-FAC as an Optax gradient transformation.

Elias Frantar, Eldar Kurtic, Dan Alistarh, "M-FAC: Efficient Matrix-Free
Approximations of Second-Order Information", NeurIPS 2021,
https://arxiv.org/abs/2107.03356 (the dynamic algorithm).
"""

# No `from __future__ import annotations` here: Optax's contract suite compares the
# annotation of `learning_rate` with the object `optax.ScalarOrSchedule`.
from collections.abc import Callable, Mapping
from typing import Any

import jax
import optax

from mfac_jax import _checks, _step
from mfac_jax._shares import AxisName
from mfac_jax._transforms import add_decay, average_steps, keep_dtypes, value_at
from mfac_jax.windows import Window, WindowFn
from mfac_jax.windows._choice import check_window, named_leaves


def scale_by_mfac(
    num_grads: int = 1024,
    damp: optax.ScalarOrSchedule = 1e-6,
    *,
    window: Window | WindowFn | None = None,
    window_axis: AxisName | None = None,
) -> optax.GradientTransformationExtraArgs:
    r"""Multiplies gradients by the inverse of a damped empirical Fisher matrix.

    The state holds ``num_grads`` gradients: ``num_grads × parameters × 4`` bytes when
    stored densely in float32, 18 GB for BERT-tiny and 448 GB for BERT-base at
    the published 1024 gradients. Choose a ``window`` that fits in memory:

    * :func:`~mfac_jax.compact_windows` if embedding tables are most of the parameters:
      2 GB instead of 18 for BERT-tiny, but still 353 GB for BERT-base. Exact while a
      mini-batch has at most ``max_rows`` different tokens.
    * :class:`~mfac_jax.DenseWindow` for other models of up to a few million
      parameters; bfloat16 halves it.
    * :class:`~mfac_jax.Int8Window` (a quarter) or :class:`~mfac_jax.TopKWindow` (at
      density 0.01, 1.5 % plus one gradient) for tens and hundreds of millions.

    Memory is proportional to ``num_grads``. With fewer gradients, raise the learning
    rate: the step is proportional to ``learning_rate × num_grads``.

    The Fisher matrix uses the last :math:`m` mini-batch gradients, the newest included:

    .. math::
        F = \lambda I + \frac{1}{m} \sum_{j=1}^{m} g_j g_j^T, \qquad
        F^{-1} g_i = m \sum_j c_j g_j, \qquad
        (m \lambda I + G G^T)\, c = e_i .

    :math:`m` is constant while the window fills, so the first step is about
    :math:`m g / \lVert g \rVert^2`. A step costs two reads of the window and
    :math:`O(m^2)` for the solve, which updates the inverse of the previous step. The
    :math:`m \times m` matrix is factorized only when that inverse has lost accuracy or
    the damping has changed.

    The Gram matrix and the solve use float32, or float64 if any window stores float64.
    Where that precision cannot resolve the damping (nearly parallel gradients, or more
    gradients than parameters, and :math:`m \lambda` below the rounding of
    :math:`\lVert g \rVert^2`), the solve raises it by factors of four until it can;
    :func:`~mfac_jax.diagnostics` reports the damping used and the number of such
    updates. Updates are always finite.

    A gradient that is not finite, or too large for its squared norm to be finite, is
    rejected: the update is zero, the window and the Gram matrix stay unchanged, and
    the count that schedules see advances.

    The update preconditions the gradient as its window stores it: rounded, quantized
    or sparse. The residual lies outside the span of the window, where :math:`F^{-1}`
    multiplies by :math:`1 / \lambda`.

    .. warning::
        Donate the optimizer state (``donate_argnums``) when you jit the training step:
        the window is then updated in place; otherwise every step copies it. To
        accumulate gradients, average them before ``update``: :class:`optax.MultiSteps`
        evaluates this transformation at every micro-step.

    Args:
      num_grads: Number of gradients ``m`` in the window (static), at least 1.
      damp: Damping ``λ > 0``, in units of the squared gradient norm: a number, a traced
        scalar, or a schedule of the update count.
      window: Storage format of each leaf's gradients (static): one window for all
        leaves, or a callable ``(path, leaf) -> window``. ``path`` is the key path as a
        string, such as ``'encoder/dense/kernel'``, ``leaf`` the parameter or its
        :class:`jax.ShapeDtypeStruct`. ``None`` selects ``DenseWindow()``, the only
        built-in kind for parameters sharded over explicit mesh axes. Custom windows
        subclass :class:`mfac_jax.windows.Window`. With ``optax.inject_hyperparams``,
        list ``'window'`` in ``static_args``; otherwise Optax calls a function as a
        schedule.
      window_axis: Mesh axis, or a tuple of axes, over which windows are split (static):
        each of its ``n`` devices holds ``num_grads / n`` of the gradients. ``init`` and
        ``update`` must then be traced inside ``jax.set_mesh(mesh)``, or inside
        :func:`jax.shard_map` over the axis. ``None`` leaves their sharding to JAX. See
        :func:`~mfac_jax.state_shardings`.

    Returns:
      An :class:`optax.GradientTransformationExtraArgs`. Updates have the dtypes of the
      gradients; ``update`` does not need the parameters.

    Raises:
      TypeError: For a ``num_grads``, ``damp`` or ``window`` of the wrong type; from
        ``init``, for leaves that are not real floating-point arrays; from ``update``,
        for gradients whose paths differ from the parameters'.
      ValueError: For ``num_grads < 1`` or ``damp <= 0``; from ``init``, for a leaf that
        its window cannot store; from ``update``, for a state of another ``num_grads``
        or gradients whose shapes differ from the parameters'. Dense windows compare the
        full shape, others only the number of blocks or the size of a row. From both,
        for a ``window_axis`` that is not an axis of the mesh or does not divide
        ``num_grads``.

    Examples:
      The first step is ``m g / (m λ + gᵀ g)``:

      >>> import jax, jax.numpy as jnp, mfac_jax
      >>> opt = mfac_jax.scale_by_mfac(num_grads=8, damp=1e-6)
      >>> params = {'w': jnp.zeros(2)}
      >>> state = opt.init(params)
      >>> grads = {'w': jnp.array([3.0, 4.0])}
      >>> updates, state = jax.jit(opt.update, donate_argnums=1)(grads, state)
      >>> print('{:.4f} {:.4f}'.format(*updates['w']))
      0.9600 1.2800
      >>> print(f'{state.damp:.0e}', state.num_raised)
      1e-06 0

    References:
      Frantar et al., `M-FAC: Efficient Matrix-Free Approximations of Second-Order
      Information <https://arxiv.org/abs/2107.03356>`_, 2021
    """
    num_grads = _checks.check_num_grads(num_grads, ("num_grads", "window"))
    return _scale_by_mfac(num_grads, damp, window, window_axis, lambda params: {})


def _scale_by_mfac(
    num_grads: int,
    damp: optax.ScalarOrSchedule,
    window: Window | WindowFn | None,
    axis: AxisName | None,
    decays_of: Callable[[optax.Params], Mapping[str, float]],
) -> optax.GradientTransformationExtraArgs:
    """Builds :func:`scale_by_mfac`, given the coupled decay of each leaf by path."""
    damp = _checks.check_damp(damp)
    check_window(window)
    _checks.check_window_axis(axis)

    def damp_at(count, dtype):
        return value_at(damp, count, dtype)

    def init_fn(params):
        return _step.init_state(
            params, num_grads, damp_at, window, decays_of(params), axis
        )

    def update_fn(updates, state, params=None, **extra_args):
        del params, extra_args

        def system_of(gram):
            return _step.System(
                damp_at(state.count, gram.dtype), None, lambda damp: num_grads
            )

        updates, state, _ = _step.precondition(
            updates, state, num_grads, system_of, axis
        )
        return updates, state

    return optax.GradientTransformationExtraArgs(init_fn, update_fn)


def mfac(
    learning_rate: optax.ScalarOrSchedule,
    num_grads: int = 1024,
    damp: optax.ScalarOrSchedule = 1e-6,
    momentum: optax.ScalarOrSchedule | None = None,
    weight_decay: optax.ScalarOrSchedule = 0.0,
    *,
    mask: Any | Callable[[optax.Params], Any] | None = None,
    window: Window | WindowFn | None = None,
    window_axis: AxisName | None = None,
) -> optax.GradientTransformationExtraArgs:
    r"""Builds the M-FAC optimizer.

    The state holds ``num_grads`` gradients, ``num_grads × parameters × 4`` bytes in
    float32: 448 GB for BERT-base at the published 1024. Pass
    :func:`~mfac_jax.compact_windows` as ``window`` for a model with embedding tables,
    and see :func:`~mfac_jax.scale_by_mfac` for the windows that suit other models.

    With :math:`F` the damped empirical Fisher of the last :math:`m` gradients, one step
    is

    .. math::
        g_t = \nabla f(\theta_t) + w\, \theta_t, \qquad
        v_t = \beta v_{t-1} + (1 - \beta) F^{-1} g_t, \qquad
        \theta_{t+1} = \theta_t - \eta v_t .

    As in the published optimizer, weight decay is coupled: it is part of the gradient
    that enters the window. For decoupled decay leave it 0 and chain::

        optax.chain(
            mfac_jax.scale_by_mfac(num_grads, damp),
            optax.add_decayed_weights(weight_decay),
            optax.scale_by_learning_rate(learning_rate),
        )

    Coupled decay makes every gradient dense, so it cannot be combined with a row-sparse
    window of a leaf that decays. ``init`` raises if ``weight_decay`` is a nonzero
    number. It cannot check schedules or traced values; rows are then dropped and
    counted in ``num_dropped`` of :func:`~mfac_jax.diagnostics`.

    Args:
      learning_rate: Step size ``η``: a number, a traced scalar or a schedule.
      num_grads: Number of gradients ``m`` in the window (static), at least 1.
      damp: Damping ``λ > 0``, in units of the squared gradient norm: a number, a traced
        scalar or a schedule.
      momentum: Rate ``0 <= β < 1`` of the moving average of the preconditioned steps,
        without bias correction: a number, a traced scalar or a schedule. The average
        takes one array like each parameter, float32 at least. ``None`` and the number
        0 need none; a JAX array keeps it, because an injected value may change.
      weight_decay: ``w >= 0``: a number, a traced scalar or a schedule. Unless it is
        the number 0, ``update`` needs the parameters.
      mask: Which leaves decay (static): a tree of booleans with the structure of the
        parameters or a prefix of it, or a function from parameters to such a tree.
      window: Storage format of each leaf's gradients (static); see
        :func:`~mfac_jax.scale_by_mfac`.
      window_axis: Mesh axis over which windows are split (static); see
        :func:`~mfac_jax.scale_by_mfac`.

    Returns:
      An :class:`optax.GradientTransformationExtraArgs`. Updates have the dtypes of the
      gradients.

    Raises:
      TypeError: As :func:`~mfac_jax.scale_by_mfac`, and for any other hyperparameter
        that is not a scalar or a schedule.
      ValueError: As :func:`~mfac_jax.scale_by_mfac`, and for a ``learning_rate`` that
        is not finite, ``momentum`` outside ``[0, 1)`` or a negative ``weight_decay``;
        from ``init``, for a ``weight_decay`` above 0 on a leaf whose window is
        row-sparse.

    Examples:
      >>> import jax, jax.numpy as jnp, mfac_jax, optax
      >>> def loss(params):
      ...   return jnp.sum((params['w'] - 1.0) ** 2)
      >>> opt = mfac_jax.mfac(learning_rate=1e-2, num_grads=8, damp=10.0)
      >>> params = {'w': jnp.zeros(3)}
      >>> state = opt.init(params)
      >>> @jax.jit
      ... def step(params, state):
      ...   updates, state = opt.update(jax.grad(loss)(params), state, params)
      ...   return optax.apply_updates(params, updates), state
      >>> for _ in range(5):
      ...   params, state = step(params, state)
      >>> print(f'{loss(params):.4f}')
      2.9579

      Hyperparameters may be injected. ``hyperparam_dtype`` keeps them in float32; in
      the dtype of bfloat16 parameters, ``momentum=0.999`` would round to 1.

      >>> inject = optax.inject_hyperparams(
      ...   mfac_jax.mfac,
      ...   static_args=('num_grads', 'mask', 'window'),
      ...   hyperparam_dtype=jnp.float32,
      ... )
      >>> opt = inject(learning_rate=1e-2, num_grads=8, damp=10.0, momentum=0.999)
      >>> state = opt.init({'w': jnp.zeros(3, jnp.bfloat16)})
      >>> print(state.hyperparams['momentum'])
      0.999

    References:
      See :func:`~mfac_jax.scale_by_mfac`.
    """
    learning_rate = _checks.check_learning_rate(learning_rate)
    num_grads = _checks.check_num_grads(num_grads, ("num_grads", "mask", "window"))
    beta = 0.0 if momentum is None else momentum
    beta = _checks.check_scalar("momentum", beta, *_checks.RATE)
    weight_decay = _checks.check_scalar("weight_decay", weight_decay, *_checks.DECAY)
    has_momentum = isinstance(beta, jax.Array) or beta != 0

    def decays_of(params):
        decay = _checks.number_of(weight_decay)
        if not decay:
            return {}
        decaying = True if mask is None else mask(params) if callable(mask) else mask
        decaying = named_leaves(jax.tree.broadcast(decaying, params))
        return {path: decay for path, decays in decaying.items() if decays}

    chain = optax.chain(
        add_decay(weight_decay, mask),
        _scale_by_mfac(num_grads, damp, window, window_axis, decays_of),
        average_steps(beta) if has_momentum else optax.identity(),
        keep_dtypes(optax.scale_by_learning_rate(learning_rate)),
    )
    return optax.GradientTransformationExtraArgs(chain.init, chain.update)
