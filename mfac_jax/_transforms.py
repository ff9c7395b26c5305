"""Transformations chained around M-FAC: averaged steps, weight decay, dtypes."""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

from mfac_jax import _checks
from mfac_jax.windows._storage import float_dtype


class _AverageStepsState(NamedTuple):
    count: jax.Array  # shape=(), dtype=jnp.int32
    average: optax.Updates  # like the parameters, float32 at least


def average_steps(momentum: optax.ScalarOrSchedule) -> optax.GradientTransformation:
    """Averages steps: ``v ← β v + (1 − β) s``.

    :func:`optax.ema` takes no schedule for ``β``.
    """

    def init_fn(params):
        return _AverageStepsState(
            count=jnp.zeros((), jnp.int32),
            average=jax.tree.map(
                lambda p: jnp.zeros_like(p, float_dtype(None, p)), params
            ),
        )

    def update_fn(updates, state, params=None):
        del params

        def average(step, previous):
            beta = value_at(momentum, state.count, previous.dtype)
            return beta * previous + (1 - beta) * step.astype(previous.dtype)

        averages = jax.tree.map(average, updates, state.average)
        updates = jax.tree.map(lambda v, s: v.astype(s.dtype), averages, updates)
        return updates, _AverageStepsState(
            count=jnp.asarray(optax.safe_increment(state.count)), average=averages
        )

    return optax.GradientTransformation(init_fn, update_fn)


def add_decay(
    weight_decay: optax.ScalarOrSchedule, mask: Any
) -> optax.GradientTransformation:
    """Adds ``weight_decay · params``; the number 0 needs no parameters."""
    inner = keep_dtypes(optax.add_decayed_weights(weight_decay, mask))

    def update_fn(updates, state, params=None):
        if _checks.number_of(weight_decay) == 0:
            return updates, state
        return inner.update(updates, state, params)

    return optax.GradientTransformation(inner.init, update_fn)


def keep_dtypes(
    inner: optax.GradientTransformation,
) -> optax.GradientTransformation:
    """Casts the updates of ``inner`` back to the dtypes of its inputs.

    A traced float32 factor would widen bfloat16 leaves.
    """

    def update_fn(updates, state, params=None):
        new_updates, state = inner.update(updates, state, params)
        updates = jax.tree.map(
            lambda n, u: jnp.asarray(n, jnp.result_type(u)), new_updates, updates
        )
        return updates, state

    return optax.GradientTransformation(inner.init, update_fn)


def value_at(value: optax.ScalarOrSchedule, count: jax.Array, dtype: Any) -> jax.Array:
    """Returns a hyperparameter, evaluated at ``count`` if it is a schedule."""
    return jnp.asarray(value(count) if callable(value) else value, dtype)
