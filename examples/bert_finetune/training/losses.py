"""Training losses: the mean over the rows of a batch whose weight is 1."""

from collections.abc import Callable

import jax
import jax.numpy as jnp
import optax

from bert_finetune.model import bert

# The mean loss of a batch and further scalars to record.
LossFn = Callable[
    [bert.Params, bert.Batch, jax.Array | None], tuple[jax.Array, dict[str, jax.Array]]
]


def classification_loss(apply: bert.Apply) -> LossFn:
    """Returns the cross-entropy, and the accuracy next to it."""

    def loss_fn(params, batch, dropout_key):
        logits = full_precision(apply(params, batch, dropout_key))
        losses = optax.softmax_cross_entropy_with_integer_labels(
            logits, batch["labels"]
        )
        correct = jnp.argmax(logits, axis=-1) == batch["labels"]
        return weighted_mean(losses, batch), {"accuracy": weighted_mean(correct, batch)}

    return loss_fn


def regression_loss(apply: bert.Apply) -> LossFn:
    """Returns the squared error."""

    def loss_fn(params, batch, dropout_key):
        predictions = full_precision(apply(params, batch, dropout_key))[:, 0]
        return weighted_mean(jnp.square(predictions - batch["labels"]), batch), {}

    return loss_fn


def span_loss(apply: bert.Apply) -> LossFn:
    """Returns the mean cross-entropy of an answer's first and last token.

    Padding is no candidate, so that its amount changes nothing.
    """

    def loss_fn(params, batch, dropout_key):
        def loss_of(logits, positions):
            logits = full_precision(logits)
            lowest = jnp.finfo(logits.dtype).min
            return optax.softmax_cross_entropy_with_integer_labels(
                jnp.where(batch["attention_mask"] == 1, logits, lowest), positions
            )

        start_logits, end_logits = apply(params, batch, dropout_key)
        start_losses = loss_of(start_logits, batch["start_positions"])
        end_losses = loss_of(end_logits, batch["end_positions"])
        return weighted_mean((start_losses + end_losses) / 2, batch), {}

    return loss_fn


def full_precision(logits: jax.Array) -> jax.Array:
    """Returns logits of at least float32."""
    return logits.astype(jnp.promote_types(logits.dtype, jnp.float32))


def weighted_mean(values: jax.Array, batch: bert.Batch) -> jax.Array:
    """Returns the mean over the rows of weight 1; 0 where there are none."""
    values = full_precision(values)
    weights = batch["weights"].astype(values.dtype)
    return jnp.sum(values * weights) / jnp.maximum(jnp.sum(weights), 1)
