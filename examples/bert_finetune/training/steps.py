"""The train step, for any loss and any Optax optimizer."""

import collections
import functools
import math
from collections.abc import Callable, Iterable, Mapping
from concurrent.futures import ThreadPoolExecutor
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax

import mfac_jax
from bert_finetune.errors import UserError
from bert_finetune.model import bert
from bert_finetune.training import devices
from bert_finetune.training.losses import LossFn

# Maximum number of dispatched but unfinished steps.
_MAX_STEPS_IN_FLIGHT = 16


class TrainState(NamedTuple):
    """Everything a training step changes."""

    step: jax.Array  # int32 scalar, steps taken.
    params: bert.Params
    opt_state: optax.OptState
    dropout_key: jax.Array  # Of the run; each step folds in its index.


def init_state(
    params: bert.Params, optimizer: optax.GradientTransformation, seed: int
) -> TrainState:
    """Returns the state before the first step, each array on its devices."""
    params = devices.put(params)
    shapes = state_shapes(params, optimizer)

    @functools.partial(jax.jit, out_shardings=shardings_of(shapes))
    def init(params):
        return _initial_state(params, optimizer, seed)

    return init(params)


def _initial_state(params, optimizer, seed):
    return TrainState(
        step=jnp.zeros((), jnp.int32),
        params=params,
        opt_state=optimizer.init(params),
        dropout_key=jax.random.key(seed),
    )


def state_shapes(
    params: bert.Params, optimizer: optax.GradientTransformation
) -> TrainState:
    """Returns the shapes of the state with their shardings.

    M-FAC's window is split over the devices; everything else is replicated.
    """
    shapes = jax.eval_shape(lambda x: _initial_state(x, optimizer, 0), params)
    shardings = jax.tree.map(lambda _: devices.sharding(), shapes)._replace(
        opt_state=mfac_jax.state_shardings(
            optimizer, params, devices.mesh(), devices.AXIS
        )
    )
    return jax.tree.map(lambda x, s: x.update(sharding=s), shapes, shardings)


def shardings_of(state: TrainState) -> Any:
    """Returns the sharding of each array, or shape, of a state."""
    return jax.tree.map(lambda x: x.sharding, state)


def make_train_step(
    loss_fn: LossFn,
    optimizer: optax.GradientTransformation,
    *,
    schedule: optax.Schedule | None = None,
    accumulation_steps: int = 1,
    shardings: TrainState | None = None,
) -> Any:
    """Returns the jitted step ``(state, batch) -> (state, metrics)``; state is donated.

    ``metrics`` are scalars on the device: the loss, further metrics of ``loss_fn``,
    M-FAC's diagnostics, and the learning rate if ``schedule`` is given. The model
    processes the batch in ``accumulation_steps`` equal parts, one after the other, each
    over all devices; loss and gradient are means over all examples. (`optax.MultiSteps`
    would hold a second optimizer state.) ``shardings`` keep the state in place on
    several devices.
    """
    grad_fn = jax.value_and_grad(loss_fn, has_aux=True)
    of_parts = devices.sharding(None, devices.AXIS)

    def accumulated(params, batch, dropout_key):
        total = jnp.sum(batch["weights"])
        num_parts = accumulation_steps
        parts = jax.tree.map(lambda x: x.reshape(num_parts, -1, *x.shape[1:]), batch)
        parts = jax.lax.with_sharding_constraint(parts, of_parts)

        def add_part(sums, numbered_part):
            i, part = numbered_part
            result = grad_fn(params, part, jax.random.fold_in(dropout_key, i))
            share = jnp.sum(part["weights"]) / total
            return jax.tree.map(lambda a, b: a + share * b, sums, result), None

        first = jax.tree.map(lambda x: x[0], parts)
        shapes = jax.eval_shape(grad_fn, params, first, dropout_key)
        zeros = jax.tree.map(lambda x: jnp.zeros(x.shape, x.dtype), shapes)
        return jax.lax.scan(add_part, zeros, (jnp.arange(num_parts), parts))[0]

    @functools.partial(jax.jit, donate_argnums=0, out_shardings=(shardings, None))
    def train_step(state, batch):
        dropout_key = jax.random.fold_in(state.dropout_key, state.step)
        compute = grad_fn if accumulation_steps == 1 else accumulated
        (loss, metrics), grads = compute(state.params, batch, dropout_key)
        updates, opt_state = optimizer.update(grads, state.opt_state, state.params)
        params: Any = optax.apply_updates(state.params, updates)
        metrics |= mfac_jax.diagnostics(opt_state)
        if schedule is not None:
            metrics["learning_rate"] = schedule(state.step)
        metrics["loss"] = loss
        state = TrainState(state.step + 1, params, opt_state, state.dropout_key)
        return state, metrics

    return train_step


def compile_ahead(
    train_step: Any, state: Any, batches: Iterable[Mapping[str, np.ndarray]]
) -> Callable[[TrainState, Mapping[str, Any]], tuple[TrainState, dict[str, jax.Array]]]:
    """Returns the step, compiled in parallel for the lengths of these batches.

    Other lengths are compiled on first use. Batches are split over the devices.
    ``state`` may be shapes.
    """
    by_length = {batch["input_ids"].shape[1]: batch for batch in batches}
    lowered = [
        train_step.lower(state, devices.put(batch, devices.AXIS))
        for batch in by_length.values()
    ]
    # XLA releases the GIL while it compiles.
    with ThreadPoolExecutor() as pool:
        compiled = pool.map(lambda step: step.compile(), lowered)
        steps = dict(zip(by_length, compiled, strict=True))
    return lambda state, batch: steps.get(batch["input_ids"].shape[1], train_step)(
        state, devices.put(batch, devices.AXIS)
    )


class Diverged(UserError):
    """Reports that training led to non-finite values."""

    def __init__(self, what: str):
        super().__init__(
            f"{what}: training has diverged. Lower the learning rate, or raise damp "
            "for MFAC."
        )


def check_finite(state: TrainState) -> None:
    """Waits for the state; raises Diverged if a parameter is not finite."""
    if not _all_finite(state.params):
        raise Diverged(f"parameters are not finite after step {int(state.step)}")


@jax.jit
def _all_finite(params: bert.Params) -> jax.Array:
    finite = jax.tree.map(lambda x: jnp.all(jnp.isfinite(x)), params)
    return jnp.all(jnp.array(jax.tree.leaves(finite)))


class MetricsQueue:
    """Passes the metrics of each step to ``on_metrics`` once the device has them.

    The host runs a few steps ahead of the device and never waits for the current one.
    A non-finite loss raises Diverged.
    """

    def __init__(self, on_metrics: Callable[[int, dict[str, float]], None]):
        self._on_metrics = on_metrics
        self._in_flight: collections.deque[tuple[int, Any]] = collections.deque()

    def put(self, step: int, metrics: dict[str, jax.Array]) -> None:
        """Adds the metrics of a step, and reads those that are ready."""
        self._in_flight.append((step, metrics))
        while self._in_flight and (
            len(self._in_flight) >= _MAX_STEPS_IN_FLIGHT
            or self._in_flight[0][1]["loss"].is_ready()
        ):
            self._read()

    def flush(self) -> None:
        """Waits for all steps and reads what is left."""
        while self._in_flight:
            self._read()

    def _read(self) -> None:
        step, on_device = self._in_flight.popleft()
        metrics = {k: v.item() for k, v in jax.device_get(on_device).items()}
        if not math.isfinite(metrics["loss"]):
            raise Diverged(f"the loss is {metrics['loss']} at step {step}")
        self._on_metrics(step, metrics)
