"""Training losses: the mean over the rows of a batch whose weight is 1."""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import optax

from bert_finetune.model import bert

# The mean loss of a batch and further scalars to record.
LossFn = Callable[
    [bert.Params, bert.Batch, jax.Array | None], tuple[jax.Array, dict[str, jax.Array]]
]


def label_scores(apply: bert.Apply, *, is_regression: bool = False) -> Any:
    """Returns ``(params, batch, dropout_key) -> (losses, predictions)``, by row.

    Losses are cross-entropies, or squared errors for a regression.
    """

    def scores(params, batch, dropout_key=None):
        logits, labels = apply(params, batch, dropout_key), batch["labels"]
        logits = full_precision(logits)
        if is_regression:
            return jnp.square(logits[:, 0] - labels), logits[:, 0]
        losses = optax.softmax_cross_entropy_with_integer_labels(logits, labels)
        return losses, jnp.argmax(logits, axis=-1)

    return scores


def label_loss(apply: bert.Apply, *, is_regression: bool = False) -> LossFn:
    """Returns the mean loss of :func:`label_scores`, and a classifier's accuracy."""
    scores = label_scores(apply, is_regression=is_regression)

    def loss_fn(params, batch, dropout_key):
        losses, predictions = scores(params, batch, dropout_key)
        loss = weighted_mean(losses, batch)
        if is_regression:
            return loss, {}
        correct = predictions == batch["labels"]
        return loss, {"accuracy": weighted_mean(correct, batch)}

    return loss_fn


def span_logits(apply: bert.Apply) -> Any:
    """Returns ``(params, batch, dropout_key) -> (start_logits, end_logits)``."""

    def logits(params, batch, dropout_key=None):
        return jax.tree.map(full_precision, apply(params, batch, dropout_key))

    return logits


def span_loss(apply: bert.Apply) -> LossFn:
    """Returns the mean cross-entropy of an answer's first and last token.

    Padding is masked out, so that the loss does not depend on the padded length.
    """

    def loss_fn(params, batch, dropout_key):
        def loss_of(logits, positions):
            lowest = jnp.finfo(logits.dtype).min
            return optax.softmax_cross_entropy_with_integer_labels(
                jnp.where(batch["attention_mask"] == 1, logits, lowest), positions
            )

        start_logits, end_logits = span_logits(apply)(params, batch, dropout_key)
        start_losses = loss_of(start_logits, batch["start_positions"])
        end_losses = loss_of(end_logits, batch["end_positions"])
        return weighted_mean((start_losses + end_losses) / 2, batch), {}

    return loss_fn


def full_precision(logits: jax.Array) -> jax.Array:
    """Casts logits to at least float32."""
    return logits.astype(jnp.promote_types(logits.dtype, jnp.float32))


def weighted_mean(values: jax.Array, batch: bert.Batch) -> jax.Array:
    """Returns the mean over the rows of weight 1; 0 if there are none."""
    values = full_precision(values)
    weights = batch["weights"].astype(values.dtype)
    return jnp.sum(values * weights) / jnp.maximum(jnp.sum(weights), 1)
