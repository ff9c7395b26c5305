"""The train step and the loop around it, for any model, loss and Optax optimizer."""

import collections
import functools
import math
import sys
import time
from collections.abc import Callable, Iterable, Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from tqdm import tqdm

from bert_finetune import modeling
from bert_finetune.errors import UserError

# The mean loss of a batch and further scalars to record.
LossFn = Callable[
    [modeling.Params, modeling.Batch, jax.Array | None],
    tuple[jax.Array, dict[str, jax.Array]],
]
# Scalars of an optimizer's state that are worth a curve.
_OPTIMIZER_SCALARS = ("damp", "num_raised", "num_refused", "num_dropped")
# Steps that may be dispatched before the first of them has to be finished.
_MAX_STEPS_IN_FLIGHT = 16


class TrainState(NamedTuple):
    """All that a training step changes.

    Attributes:
      step: int32 scalar, steps taken.
      params: the model's parameters.
      opt_state: the optimizer's state.
    """

    step: jax.Array
    params: modeling.Params
    opt_state: optax.OptState


def init_state(
    params: modeling.Params, optimizer: optax.GradientTransformation
) -> TrainState:
    """Returns the state before the first step."""
    return TrainState(jnp.zeros((), jnp.int32), params, jax.jit(optimizer.init)(params))


def classification_loss(
    apply: Callable[[modeling.Params, modeling.Batch, jax.Array | None], jax.Array],
) -> LossFn:
    """Cross-entropy averaged over the rows of a batch whose weight is 1."""

    def loss_fn(params, batch, dropout_key):
        logits = apply(params, batch, dropout_key)
        logits = logits.astype(jnp.promote_types(logits.dtype, jnp.float32))
        losses = optax.softmax_cross_entropy_with_integer_labels(
            logits, batch["labels"]
        )
        correct = jnp.argmax(logits, axis=-1) == batch["labels"]
        weights = batch["weights"].astype(losses.dtype)
        return weighted_mean(losses, weights), {
            "accuracy": weighted_mean(correct.astype(losses.dtype), weights)
        }

    return loss_fn


def weighted_mean(values: jax.Array, weights: jax.Array) -> jax.Array:
    """Mean over the entries of weight 1."""
    return jnp.sum(values * weights) / jnp.sum(weights)


def make_train_step(
    loss_fn: LossFn, optimizer: optax.GradientTransformation, seed: int
) -> Callable[[TrainState, modeling.Batch], tuple[TrainState, dict[str, jax.Array]]]:
    """Returns the jitted step ``(state, batch) -> (state, metrics)``; state is donated.

    ``metrics`` are scalars on the device: loss, what the loss function adds, and the
    scalars of an M-FAC state.
    """

    @functools.partial(jax.jit, donate_argnums=0)
    def train_step(state, batch):
        dropout_key = jax.random.fold_in(jax.random.key(seed), state.step)
        (loss, metrics), grads = jax.value_and_grad(loss_fn, has_aux=True)(
            state.params, batch, dropout_key
        )
        updates, opt_state = optimizer.update(grads, state.opt_state, state.params)
        params: Any = optax.apply_updates(state.params, updates)
        for name in _OPTIMIZER_SCALARS:
            value = optax.tree.get(opt_state, name)
            if value is not None:
                metrics[name] = value
        metrics["loss"] = loss
        return TrainState(state.step + 1, params, opt_state), metrics

    return train_step


def train(
    state: TrainState,
    train_step: Callable[..., tuple[TrainState, dict[str, jax.Array]]],
    batches: Iterable[Mapping[str, np.ndarray]],
    num_steps: int,
    schedule: optax.Schedule,
    on_metrics: Callable[[int, dict[str, float]], None],
) -> TrainState:
    """Takes a step per batch and reports metrics as they become ready.

    The host dispatches steps ahead of the device and never waits for the one at hand:
    metrics are read once the device has them, a few steps late.

    Args:
      state: donated.
      train_step: from :func:`make_train_step`.
      batches: one mapping of arrays per step.
      num_steps: for the progress bar.
      schedule: learning rate by step, for the progress bar and the metrics.
      on_metrics: called in order with the number of a finished step, from 1, and its
        metrics.

    Raises:
      UserError: if a loss is not finite.
    """
    in_flight = collections.deque()
    interactive = sys.stderr.isatty()
    # A file gets a line now and then, a terminal a live bar.
    interval = 0.2 if interactive else 30.0
    with tqdm(total=num_steps, unit="step", mininterval=interval) as bar:
        started, examples = time.perf_counter(), 0

        def report(wait: bool):
            nonlocal examples
            while in_flight and (wait or in_flight[0][2]["loss"].is_ready()):
                step, size, metrics = in_flight.popleft()
                metrics = {k: v.item() for k, v in jax.device_get(metrics).items()}
                if not math.isfinite(metrics["loss"]):
                    raise UserError(
                        f"the loss is {metrics['loss']} at step {step}: training has "
                        "diverged. Lower the learning rate, or raise damp for MFAC."
                    )
                metrics["learning_rate"] = float(np.asarray(schedule(step - 1)))
                examples += size
                bar.set_postfix(
                    loss=f"{metrics['loss']:.4f}",
                    lr=f"{metrics['learning_rate']:.2e}",
                    ex_per_s=f"{examples / (time.perf_counter() - started):.0f}",
                    refresh=False,
                )
                bar.update()
                on_metrics(step, metrics)

        for step, batch in enumerate(batches, start=1):
            size = int(batch["weights"].sum())
            state, metrics = train_step(state, batch)
            in_flight.append((step, size, metrics))
            report(wait=len(in_flight) >= _MAX_STEPS_IN_FLIGHT)
        report(wait=True)
    return state


def make_eval_step(
    apply: Callable[[modeling.Params, modeling.Batch, jax.Array | None], jax.Array],
) -> Callable[[modeling.Params, modeling.Batch], tuple[jax.Array, jax.Array]]:
    """Returns the jitted ``(params, batch) -> (losses, predictions)``, one per row."""

    @jax.jit
    def eval_step(params, batch):
        logits = apply(params, batch, None)
        logits = logits.astype(jnp.promote_types(logits.dtype, jnp.float32))
        losses = optax.softmax_cross_entropy_with_integer_labels(
            logits, batch["labels"]
        )
        return losses, jnp.argmax(logits, axis=-1)

    return eval_step


def predict(
    params: modeling.Params,
    eval_step: Callable[..., tuple[jax.Array, jax.Array]],
    batches: Iterable[Mapping[str, np.ndarray]],
    num_examples: int,
) -> tuple[np.ndarray, np.ndarray]:
    """Returns losses and predictions of all examples, in order, each exactly once."""
    results = [eval_step(params, batch) for batch in batches]
    losses, predictions = (
        np.concatenate([np.asarray(part) for part in column])[:num_examples]
        for column in zip(*results, strict=True)
    )
    return losses, predictions
