"""The losses to minimise."""

from collections.abc import Callable

import jax
import jax.numpy as jnp
import optax

from bert_finetune.model import bert

# The mean loss of a batch and further scalars to record.
LossFn = Callable[
    [bert.Params, bert.Batch, jax.Array | None],
    tuple[jax.Array, dict[str, jax.Array]],
]


def classification_loss(apply: bert.Apply) -> LossFn:
    """Cross-entropy averaged over the rows of a batch whose weight is 1."""

    def loss_fn(params, batch, dropout_key):
        logits = full_precision(apply(params, batch, dropout_key))
        losses = optax.softmax_cross_entropy_with_integer_labels(
            logits, batch["labels"]
        )
        correct = jnp.argmax(logits, axis=-1) == batch["labels"]
        weights = batch["weights"].astype(losses.dtype)
        return weighted_mean(losses, weights), {
            "accuracy": weighted_mean(correct.astype(losses.dtype), weights)
        }

    return loss_fn


def regression_loss(apply: bert.Apply) -> LossFn:
    """Squared error averaged over the rows of a batch whose weight is 1."""

    def loss_fn(params, batch, dropout_key):
        predictions = full_precision(apply(params, batch, dropout_key))[:, 0]
        losses = jnp.square(predictions - batch["labels"])
        return weighted_mean(losses, batch["weights"].astype(losses.dtype)), {}

    return loss_fn


def span_loss(apply: bert.Apply) -> LossFn:
    """Cross-entropy of an answer's first and last token, averaged over both.

    It is averaged over the rows of a batch whose weight is 1. Padding is no candidate,
    so that its amount changes nothing.
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
        losses = (start_losses + end_losses) / 2
        return weighted_mean(losses, batch["weights"].astype(losses.dtype)), {}

    return loss_fn


def full_precision(logits: jax.Array) -> jax.Array:
    """Returns logits of float32 at least."""
    return logits.astype(jnp.promote_types(logits.dtype, jnp.float32))


def weighted_mean(values: jax.Array, weights: jax.Array) -> jax.Array:
    """Mean over the entries of weight 1; 0 where there are none."""
    return jnp.sum(values * weights) / jnp.maximum(jnp.sum(weights), 1)
