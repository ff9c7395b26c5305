"""M-FAC in Adam's metric, an Optax transformation with steps in Adam's units."""

# No `from __future__ import annotations` here: Optax's contract suite compares the
# annotation of `learning_rate` with the object `optax.ScalarOrSchedule`.
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

from mfac_jax import _checks, _step
from mfac_jax._shares import AxisName
from mfac_jax._state import ScaleByMFACState, check_state, match_windows
from mfac_jax._transforms import add_decay, keep_dtypes, value_at
from mfac_jax.windows import Window, WindowFn
from mfac_jax.windows._choice import check_window, named_leaves
from mfac_jax.windows._storage import float_dtype

# Relative change of the damping below which the previous one is kept, so that the
# inverse follows from the previous step without a factorization.
_DRIFT = 0.1


class ScaleByAdamMFACState(NamedTuple):
    """State of :func:`~mfac_jax.scale_by_adam_mfac`.

    Attributes:
      mfac: State of the window, which stores the gradients in Adam's metric.
      nu: Moving averages of the squared gradients, a tree like the parameters, float32
        at least.

    Examples:
      >>> import jax.numpy as jnp, mfac_jax
      >>> state = mfac_jax.scale_by_adam_mfac(num_grads=8).init({'w': jnp.zeros(3)})
      >>> state.mfac.gram.shape, state.nu['w'].shape
      ((8, 8), (3,))
    """

    mfac: ScaleByMFACState
    nu: optax.Updates


def scale_by_adam_mfac(
    num_grads: int = 128,
    damp: optax.ScalarOrSchedule = 0.3,
    b1: jax.typing.ArrayLike = 0.9,
    b2: jax.typing.ArrayLike = 0.99,
    eps: jax.typing.ArrayLike = 1e-8,
    *,
    window: Window | WindowFn | None = None,
    window_axis: AxisName | None = None,
) -> optax.GradientTransformationExtraArgs:
    r"""Multiplies gradients by the inverse of a Fisher matrix in Adam's metric.

    :func:`~mfac_jax.scale_by_mfac` damps the Fisher matrix by a multiple of the
    identity: its damping has the units of a squared gradient, and its step the units of
    an inverse gradient. Here the damping is a multiple of Adam's diagonal, relative to
    the size of the stored gradients, and the step has Adam's units for any scale of the
    loss. Start with one to three times the learning rate that suits AdamW.

    With :math:`\hat\nu_t` the bias-corrected average of the squared gradients
    (:math:`\beta_2`), Adam's metric is :math:`D_t = \sqrt{\hat\nu_t} + \epsilon`. The
    window stores :math:`w_t = D_t^{-1/2} g_t`. With the last :math:`m` of these as the
    rows of :math:`W`, and :math:`\kappa` the mean squared norm of the nonzero rows,
    the update is

    .. math::
        u_t = (1 + \rho)\, \kappa\, D_t^{-1/2}
              (\rho \kappa I + W^T W)^{-1} W^T e
            = (1 + \rho)\, \kappa\, D_t^{-1/2} W^T c, \qquad
        (\rho \kappa I + W W^T)\, c = e .

    The weights :math:`e_j \propto \beta_1^{t - j}` sum to 1 and make :math:`W^T e` the
    bias-corrected momentum of the stored gradients. The momentum needs no memory, and
    all of it is preconditioned by the newest matrix.

    If the stored gradients are orthogonal and of equal norm, the update is Adam's, with
    momentum over the window and :math:`D_t^{-1/2} D_j^{-1/2}` as the metric of an older
    gradient. For :math:`\rho \to \infty` it tends to the same limit for any gradients;
    in the metric's norm it is at most :math:`(1 + \rho) / \rho` times as long as that
    limit. Directions that the stored gradients share get shorter steps: a constant
    gradient gets :math:`(1 + \rho) / (m + \rho)` of Adam's step.

    :math:`\rho \kappa / m` is the :math:`\lambda` of :func:`~mfac_jax.scale_by_mfac`;
    :func:`~mfac_jax.diagnostics` reports it as ``damp``. The previous value is kept
    while the requested one is within 10 % of it, so that the solve can update the
    previous inverse.

    Windows and their memory, rejected gradients and the need to donate the state are as
    for :func:`~mfac_jax.scale_by_mfac`. The second moments add one array like each
    parameter, float32 at least. :func:`~mfac_jax.drop_windows` keeps them, but drops
    the momentum together with the window.

    Args:
      num_grads: Number of gradients ``m`` in the window (static), at least 1.
      damp: Damping ``ρ > 0`` relative to the mean squared norm of the stored gradients:
        a number, a traced scalar, or a schedule of the update count.
      b1: Rate ``0 <= β₁ < 1`` of the momentum: a number or a traced scalar.
      b2: Rate ``0 <= β₂ < 1`` of the second moments: a number or a traced scalar.
      eps: Term ``ε > 0`` of the metric: a number or a traced scalar.
      window: Storage format of each leaf's gradients (static); see
        :func:`~mfac_jax.scale_by_mfac`.
      window_axis: Mesh axis over which windows are split (static); see
        :func:`~mfac_jax.scale_by_mfac`.

    Returns:
      An :class:`optax.GradientTransformationExtraArgs`. Updates have the dtypes of the
      gradients; ``update`` does not need the parameters.

    Raises:
      TypeError: As :func:`~mfac_jax.scale_by_mfac`, and for ``b1``, ``b2`` or ``eps``
        that is not a scalar.
      ValueError: As :func:`~mfac_jax.scale_by_mfac`, and for ``b1`` or ``b2`` outside
        ``[0, 1)`` or ``eps <= 0``.

    Examples:
      The first step is Adam's; its size is independent of the scale of the gradient:

      >>> import jax.numpy as jnp, mfac_jax
      >>> opt = mfac_jax.scale_by_adam_mfac(num_grads=8)
      >>> state = opt.init({'w': jnp.zeros(2)})
      >>> for scale in 1.0, 1000.0:
      ...   updates, _ = opt.update({'w': scale * jnp.array([3.0, -4.0])}, state)
      ...   print('{:.4f} {:.4f}'.format(*updates['w']))
      1.0000 -1.0000
      1.0000 -1.0000

    References:
      Frantar et al., `M-FAC: Efficient Matrix-Free Approximations of Second-Order
      Information <https://arxiv.org/abs/2107.03356>`_, 2021

      Kingma and Ba, `Adam: A Method for Stochastic Optimization
      <https://arxiv.org/abs/1412.6980>`_, 2014
    """
    num_grads = _checks.check_num_grads(num_grads, ("num_grads", "window"))
    damp = _checks.check_damp(damp)
    b1 = _checks.check_number("b1", b1, *_checks.RATE)
    b2 = _checks.check_number("b2", b2, *_checks.RATE)
    eps = _checks.check_number("eps", eps, *_checks.EPSILON)
    check_window(window)
    _checks.check_window_axis(window_axis)

    def init_fn(params):
        def damp_at(count, dtype):
            return value_at(damp, count, dtype) / num_grads

        return ScaleByAdamMFACState(
            mfac=_step.init_state(params, num_grads, damp_at, window, {}, window_axis),
            nu=jax.tree.map(lambda p: jnp.zeros_like(p, float_dtype(None, p)), params),
        )

    def update_fn(updates, state, params=None, **extra_args):
        del params, extra_args
        mfac = state.mfac
        check_state(mfac, num_grads)
        grads = match_windows(updates, mfac.window)
        num_seen = mfac.count - mfac.num_rejected + 1

        def average(path, v):
            beta = jnp.asarray(b2, v.dtype)
            return beta * v + (1 - beta) * jnp.square(grads[path].astype(v.dtype))

        def inverse_root(v):
            corrected = v / (1 - jnp.asarray(b2, v.dtype) ** num_seen)
            # optax.inject_hyperparams may cast 1e-8 to float16, which rounds it to 0.
            positive = jnp.maximum(jnp.asarray(eps, v.dtype), jnp.finfo(v.dtype).tiny)
            root = 1 / jnp.sqrt(jnp.sqrt(corrected) + positive)
            # NaN rejects a gradient whose square overflows.
            return jnp.where(jnp.isfinite(v), root, jnp.nan)

        def system_of(gram):
            squares = jnp.diagonal(gram)
            mean = jnp.sum(squares / jnp.maximum(jnp.sum(squares > 0), 1))
            wanted = value_at(damp, mfac.count, gram.dtype) * mean / num_grads
            is_near = jnp.abs(wanted - mfac.damp) <= _DRIFT * mfac.damp
            age = (mfac.index - jnp.arange(num_grads)) % num_grads
            oldest = jnp.max(jnp.where(squares > 0, age, 0))
            weights = jnp.where(age <= oldest, jnp.asarray(b1, gram.dtype) ** age, 0)
            return _step.System(
                damp=jnp.where(is_near, mfac.damp, wanted),
                weights=weights / jnp.sum(weights),
                scale_of=lambda damp: mean + num_grads * damp,
            )

        old = named_leaves(state.nu)
        new = {path: average(path, v) for path, v in old.items()}
        roots = {path: inverse_root(new[path]) for path in grads}
        updates, mfac, accepted = _step.precondition(
            updates, mfac, num_grads, system_of, window_axis, roots
        )
        nu = jax.tree.structure(state.nu).unflatten(
            jnp.where(accepted, new[path], v) for path, v in old.items()
        )
        return updates, ScaleByAdamMFACState(mfac, nu)

    return optax.GradientTransformationExtraArgs(init_fn, update_fn)


def adam_mfac(
    learning_rate: optax.ScalarOrSchedule,
    num_grads: int = 128,
    damp: optax.ScalarOrSchedule = 0.3,
    b1: jax.typing.ArrayLike = 0.9,
    b2: jax.typing.ArrayLike = 0.99,
    eps: jax.typing.ArrayLike = 1e-8,
    weight_decay: optax.ScalarOrSchedule = 0.0,
    *,
    mask: Any | Callable[[optax.Params], Any] | None = None,
    window: Window | WindowFn | None = None,
    window_axis: AxisName | None = None,
) -> optax.GradientTransformationExtraArgs:
    r"""Builds M-FAC in Adam's metric, which requires only a learning rate.

    The update of :func:`~mfac_jax.scale_by_adam_mfac` replaces Adam's in AdamW:

    .. math::
        \theta_{t+1} = \theta_t - \eta\, (u_t + w\, \theta_t) .

    Weight decay is decoupled and therefore works with any window.

    Args:
      learning_rate: Step size ``η`` in AdamW's units: a number, a traced scalar or a
        schedule.
      num_grads: Number of gradients ``m`` in the window (static), at least 1.
      damp: Damping ``ρ > 0`` relative to the mean squared norm of the stored gradients:
        a number, a traced scalar or a schedule.
      b1: Rate ``0 <= β₁ < 1`` of the momentum: a number or a traced scalar.
      b2: Rate ``0 <= β₂ < 1`` of the second moments: a number or a traced scalar.
      eps: Term ``ε > 0`` of the metric: a number or a traced scalar.
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
      TypeError: As :func:`~mfac_jax.scale_by_adam_mfac`, and for any other
        hyperparameter that is not a scalar or a schedule.
      ValueError: As :func:`~mfac_jax.scale_by_adam_mfac`, and for a ``learning_rate``
        that is not finite or a negative ``weight_decay``.

    Examples:
      >>> import jax, jax.numpy as jnp, mfac_jax, optax
      >>> def loss(params):
      ...   return jnp.sum(jnp.array([1.0, 100.0]) * (params['w'] - 1.0) ** 2)
      >>> opt = mfac_jax.adam_mfac(optax.linear_schedule(0.3, 0.0, 100), num_grads=8)
      >>> params = {'w': jnp.zeros(2)}
      >>> state = opt.init(params)
      >>> @jax.jit
      ... def step(params, state):
      ...   updates, state = opt.update(jax.grad(loss)(params), state, params)
      ...   return optax.apply_updates(params, updates), state
      >>> for _ in range(100):
      ...   params, state = step(params, state)
      >>> bool(loss(params) < 1e-6)
      True

    References:
      See :func:`~mfac_jax.scale_by_adam_mfac`.
    """
    learning_rate = _checks.check_learning_rate(learning_rate)
    num_grads = _checks.check_num_grads(num_grads, ("num_grads", "mask", "window"))
    weight_decay = _checks.check_scalar("weight_decay", weight_decay, *_checks.DECAY)
    chain = optax.chain(
        scale_by_adam_mfac(
            num_grads, damp, b1, b2, eps, window=window, window_axis=window_axis
        ),
        add_decay(weight_decay, mask),
        keep_dtypes(optax.scale_by_learning_rate(learning_rate)),
    )
    return optax.GradientTransformationExtraArgs(chain.init, chain.update)
