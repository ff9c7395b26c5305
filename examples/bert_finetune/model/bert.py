"""BERT in Flax NNX, driven by the config of a Hugging Face checkpoint.

Attributes carry the names of Hugging Face's modules, so the path of a parameter here is
its name there (`pretrained.py` has the three differences). The models are built once
for their structure; training works on a nested dict of arrays and the pure function
that :func:`make_apply` returns.
"""

import functools
import math
from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from transformers import BertConfig

from bert_finetune.errors import UserError

Params = dict[str, Any]
Batch = Mapping[str, jax.Array]
# (params, batch, dropout_key) -> the model's output; no key, no dropout.
Apply = Callable[[Params, Batch, jax.Array | None], Any]

WORD_TABLE = "word_embeddings"


def _gelu(x: jax.Array) -> jax.Array:
    """Returns the exact GELU, by erf: `jax.nn.gelu` takes erfc, slower on a CPU."""
    return 0.5 * x * (1 + jax.lax.erf(x * math.sqrt(0.5)))


ACTIVATIONS: dict[str, Callable[[jax.Array], jax.Array]] = {
    # Keeps only its input for the backward pass: 32 MB less at batch 32, length 128.
    "gelu": jax.checkpoint(_gelu),
    "gelu_new": functools.partial(nnx.gelu, approximate=True),
    "gelu_pytorch_tanh": functools.partial(nnx.gelu, approximate=True),
    "relu": nnx.relu,
    "silu": nnx.silu,
    "swish": nnx.silu,
    "tanh": nnx.tanh,
}


class _Layers:
    """The layers of one config: initialised and normalised as Hugging Face does."""

    def __init__(
        self, config: BertConfig, rngs: nnx.Rngs, param_dtype: Any, dtype: Any
    ):
        self.config, self.rngs = config, rngs
        self.dtypes = {"param_dtype": param_dtype, "dtype": dtype}
        self.initializer = nnx.initializers.normal(config.initializer_range)

    def embed(self, num_embeddings: int) -> nnx.Embed:
        return nnx.Embed(
            num_embeddings,
            self.config.hidden_size,
            embedding_init=self.initializer,
            **self.dtypes,
            rngs=self.rngs,
        )

    def linear(self, in_features: int, out_features: int) -> nnx.Linear:
        return nnx.Linear(
            in_features,
            out_features,
            kernel_init=self.initializer,
            **self.dtypes,
            rngs=self.rngs,
        )

    def norm(self) -> nnx.LayerNorm:
        return nnx.LayerNorm(
            self.config.hidden_size,
            epsilon=self.config.layer_norm_eps,
            # E[x²] − E[x]² loses the digits of a small variance.
            use_fast_variance=False,
            **self.dtypes,
            rngs=self.rngs,
        )


class BertEmbeddings(nnx.Module):
    """Sum of word, position and token-type embeddings, normalised."""

    def __init__(self, layers: _Layers):
        config = layers.config
        self.word_embeddings = layers.embed(config.vocab_size)
        self.position_embeddings = layers.embed(config.max_position_embeddings)
        self.token_type_embeddings = layers.embed(config.type_vocab_size)
        self.LayerNorm = layers.norm()
        self.dropout = nnx.Dropout(config.hidden_dropout_prob)

    def __call__(self, input_ids, token_type_ids, *, deterministic, rngs):
        positions = jnp.arange(input_ids.shape[1])[None]
        hidden = (
            self.word_embeddings(input_ids)
            + self.position_embeddings(positions)
            + self.token_type_embeddings(token_type_ids)
        )
        return self.dropout(
            self.LayerNorm(hidden), deterministic=deterministic, rngs=rngs
        )


class BertSelfAttention(nnx.Module):
    """Multi-head attention among the tokens that the mask lets through."""

    def __init__(self, layers: _Layers):
        config = layers.config
        self.num_heads = config.num_attention_heads
        self.query = layers.linear(config.hidden_size, config.hidden_size)
        self.key = layers.linear(config.hidden_size, config.hidden_size)
        self.value = layers.linear(config.hidden_size, config.hidden_size)
        self.dropout = nnx.Dropout(config.attention_probs_dropout_prob)

    def __call__(self, hidden, mask, *, deterministic, rngs):
        batch_size, length = mask.shape[0], mask.shape[-1]

        def heads(x):
            return x.reshape(batch_size, length, self.num_heads, -1)

        query, key, value = (
            heads(project(hidden)) for project in (self.query, self.key, self.value)
        )
        # Not jax.nn.dot_product_attention: its softmax is float32 also for float64,
        # and it has no dropout.
        scores = jnp.einsum("bqhd,bkhd->bhqk", query, key) / math.sqrt(query.shape[-1])
        scores = scores.astype(jnp.promote_types(scores.dtype, jnp.float32))
        scores = jnp.where(mask, scores, jnp.finfo(scores.dtype).min)
        attention = self.dropout(
            nnx.softmax(scores).astype(value.dtype),
            deterministic=deterministic,
            rngs=rngs,
        )
        context = jnp.einsum("bhqk,bkhd->bqhd", attention, value)
        return context.reshape(hidden.shape)


class BertResidual(nnx.Module):
    """Projection, dropout, residual sum and LayerNorm: the end of either half."""

    def __init__(self, layers: _Layers, in_features: int):
        self.dense = layers.linear(in_features, layers.config.hidden_size)
        self.LayerNorm = layers.norm()
        self.dropout = nnx.Dropout(layers.config.hidden_dropout_prob)

    def __call__(self, hidden, residual, *, deterministic, rngs):
        hidden = self.dropout(
            self.dense(hidden), deterministic=deterministic, rngs=rngs
        )
        return self.LayerNorm(hidden + residual)


class BertAttention(nnx.Module):
    """Self-attention and its residual."""

    def __init__(self, layers: _Layers):
        self.self = BertSelfAttention(layers)  # Hugging Face's name for it.
        self.output = BertResidual(layers, layers.config.hidden_size)

    def __call__(self, hidden, mask, **mode):
        attention = self.self(hidden, mask, **mode)
        return self.output(attention, hidden, **mode)


class BertIntermediate(nnx.Module):
    """The widening half of the feed-forward network."""

    def __init__(self, layers: _Layers):
        config = layers.config
        self.dense = layers.linear(config.hidden_size, config.intermediate_size)
        self.hidden_act = config.hidden_act

    def __call__(self, hidden):
        return ACTIVATIONS[self.hidden_act](self.dense(hidden))


class BertLayer(nnx.Module):
    """One transformer block, normalised after each residual."""

    def __init__(self, layers: _Layers):
        self.attention = BertAttention(layers)
        self.intermediate = BertIntermediate(layers)
        self.output = BertResidual(layers, layers.config.intermediate_size)

    def __call__(self, hidden, mask, **mode):
        attention = self.attention(hidden, mask, **mode)
        return self.output(self.intermediate(attention), attention, **mode)


class BertEncoder(nnx.Module):
    """The stack of blocks."""

    def __init__(self, layers: _Layers):
        self.layer = nnx.List(
            [BertLayer(layers) for _ in range(layers.config.num_hidden_layers)]
        )

    def __call__(self, hidden, mask, **mode):
        for layer in self.layer:
            hidden = layer(hidden, mask, **mode)
        return hidden


class BertPooler(nnx.Module):
    """The first token, projected."""

    def __init__(self, layers: _Layers):
        self.dense = layers.linear(layers.config.hidden_size, layers.config.hidden_size)

    def __call__(self, hidden):
        return nnx.tanh(self.dense(hidden[:, 0]))


class BertModel(nnx.Module):
    """Embeddings and encoder, with or without the pooler."""

    def __init__(self, layers: _Layers, *, add_pooling_layer: bool):
        self.embeddings = BertEmbeddings(layers)
        self.encoder = BertEncoder(layers)
        if add_pooling_layer:
            self.pooler = BertPooler(layers)

    def __call__(self, input_ids, attention_mask, token_type_ids, **mode):
        hidden = self.embeddings(input_ids, token_type_ids, **mode)
        # Flat, so that weight gradients are plain matmuls: steps on a CPU are 10 %
        # faster than with a contraction of two axes.
        tokens = hidden.reshape(-1, hidden.shape[-1])
        tokens = self.encoder(tokens, attention_mask[:, None, None, :] > 0, **mode)
        return tokens.reshape(hidden.shape)


class BertForSequenceClassification(nnx.Module):
    """BERT with a linear layer on the pooled first token."""

    def __init__(
        self,
        config: BertConfig,
        *,
        rngs: nnx.Rngs,
        param_dtype: Any = jnp.float32,
        dtype: Any = None,
    ):
        check_config(config)
        layers = _Layers(config, rngs, param_dtype, dtype)
        self.bert = BertModel(layers, add_pooling_layer=True)
        rate = config.classifier_dropout
        self.dropout = nnx.Dropout(config.hidden_dropout_prob if rate is None else rate)
        num_labels: Any = config.num_labels  # None in the annotation, never in fact.
        self.classifier = layers.linear(config.hidden_size, num_labels)

    def __call__(
        self,
        input_ids: jax.Array,
        attention_mask: jax.Array,
        token_type_ids: jax.Array,
        *,
        deterministic: bool = True,
        rngs: nnx.Rngs | None = None,
    ) -> jax.Array:
        """Returns the logits, shape ``(batch, num_labels)``."""
        mode = {"deterministic": deterministic, "rngs": rngs}
        hidden = self.bert(input_ids, attention_mask, token_type_ids, **mode)
        return self.classifier(self.dropout(self.bert.pooler(hidden), **mode))


class BertForQuestionAnswering(nnx.Module):
    """BERT with a start and an end logit for every token."""

    def __init__(
        self,
        config: BertConfig,
        *,
        rngs: nnx.Rngs,
        param_dtype: Any = jnp.float32,
        dtype: Any = None,
    ):
        check_config(config)
        layers = _Layers(config, rngs, param_dtype, dtype)
        self.bert = BertModel(layers, add_pooling_layer=False)
        self.qa_outputs = layers.linear(config.hidden_size, 2)

    def __call__(
        self,
        input_ids: jax.Array,
        attention_mask: jax.Array,
        token_type_ids: jax.Array,
        *,
        deterministic: bool = True,
        rngs: nnx.Rngs | None = None,
    ) -> tuple[jax.Array, jax.Array]:
        """Returns start and end logits, each of shape ``(batch, length)``."""
        mode = {"deterministic": deterministic, "rngs": rngs}
        hidden = self.bert(input_ids, attention_mask, token_type_ids, **mode)
        logits = self.qa_outputs(hidden)
        return logits[..., 0], logits[..., 1]


ModelClass = type[BertForSequenceClassification] | type[BertForQuestionAnswering]


def check_config(config: BertConfig) -> None:
    """Refuses what this BERT does not do.

    Raises:
      UserError: naming the entry of the config and its value.
    """
    if config.hidden_act not in ACTIVATIONS:
        raise UserError(
            f"hidden_act {config.hidden_act!r} in config.json is not supported; "
            f"supported are {', '.join(ACTIVATIONS)}."
        )
    position_type = getattr(config, "position_embedding_type", None)
    if position_type not in (None, "absolute"):
        raise UserError(
            f"position_embedding_type {position_type!r} in config.json is not "
            "supported; only absolute position embeddings are."
        )
    if config.is_decoder or config.add_cross_attention:
        raise UserError(
            "config.json describes a decoder (is_decoder or add_cross_attention is "
            "true); only BERT encoders are supported."
        )
    if config.hidden_size % config.num_attention_heads:
        raise UserError(
            f"hidden_size {config.hidden_size} in config.json is not a multiple of "
            f"num_attention_heads {config.num_attention_heads}."
        )


def init_params(
    config: BertConfig, model_class: ModelClass, seed: int, dtype: Any = jnp.float32
) -> Params:
    """Returns new parameters, a nested dict of arrays with string keys."""
    model = model_class(config, rngs=nnx.Rngs(seed), param_dtype=dtype)
    return _string_keys(nnx.to_pure_dict(nnx.state(model, nnx.Param)))


def make_apply(
    config: BertConfig,
    model_class: ModelClass,
    param_dtype: Any = jnp.float32,
    dtype: Any = None,
) -> Apply:
    """Returns the model as a pure function ``(params, batch, dropout_key) -> output``.

    ``batch`` holds ``input_ids``, ``attention_mask`` and ``token_type_ids``, each of
    shape ``(batch, length)``; ``dropout_key`` ``None`` turns dropout off. ``dtype`` is
    that of the computation, ``None`` for the parameters' own; softmax, the statistics
    of LayerNorm and the loss are float32 at least.
    """
    graph, abstract = nnx.split(
        nnx.eval_shape(
            lambda: model_class(
                config, rngs=nnx.Rngs(0), param_dtype=param_dtype, dtype=dtype
            )
        )
    )

    def apply(params: Params, batch: Batch, dropout_key: jax.Array | None) -> Any:
        state = jax.tree.map(lambda x: x, abstract)
        nnx.replace_by_pure_dict(state, params)
        model = nnx.merge(graph, state)
        return model(
            batch["input_ids"],
            batch["attention_mask"],
            batch["token_type_ids"],
            deterministic=dropout_key is None,
            rngs=None if dropout_key is None else nnx.Rngs(dropout=dropout_key),
        )

    return apply


def decay_mask(params: Params) -> Any:
    """Marks what decays: all but biases and LayerNorm weights, as in Hugging Face."""

    def decays(path, _):
        return path[-1].key != "bias" and not any(p.key == "LayerNorm" for p in path)

    return jax.tree_util.tree_map_with_path(decays, params)


def is_word_table(params: Params) -> Any:
    """Marks the word-embedding table."""
    return jax.tree_util.tree_map_with_path(
        lambda path, _: any(p.key == WORD_TABLE for p in path), params
    )


def touched_rows(max_tokens: int, max_length: int) -> dict[str, int]:
    """Returns by embedding table the rows for which a batch has a gradient.

    Args:
      max_tokens: distinct tokens of a batch at most.
      max_length: tokens of an example at most.
    """
    return {WORD_TABLE: max_tokens, "position_embeddings": max_length}


def _string_keys(tree: Any) -> Any:
    if isinstance(tree, Mapping):
        return {str(key): _string_keys(value) for key, value in tree.items()}
    return tree
