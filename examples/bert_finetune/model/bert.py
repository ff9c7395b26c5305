"""BERT in Flax NNX, driven by the config of a Hugging Face checkpoint.

Attributes have the names of Hugging Face's modules, so a parameter's path is its name
in a checkpoint, except for the differences listed in `pretrained.py`. Modules are built
once for their structure; training uses a nested dict of arrays and the pure function
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
# (params, batch, dropout_key) -> output; a key of None turns dropout off.
Apply = Callable[[Params, Batch, jax.Array | None], Any]

WORD_EMBEDDINGS = "word_embeddings"


def _gelu(x: jax.Array) -> jax.Array:
    """Returns the exact GELU by erf; `jax.nn.gelu` uses erfc, slower on a CPU."""
    return 0.5 * x * (1 + jax.lax.erf(x * math.sqrt(0.5)))


ACTIVATIONS: dict[str, Callable[[jax.Array], jax.Array]] = {
    # Saves only its input for the backward pass: 32 MB less at batch 32, length 128.
    "gelu": jax.checkpoint(_gelu),
    "gelu_new": functools.partial(nnx.gelu, approximate=True),
    "gelu_pytorch_tanh": functools.partial(nnx.gelu, approximate=True),
    "relu": nnx.relu,
    "silu": nnx.silu,
    "swish": nnx.silu,
    "tanh": nnx.tanh,
}


class _Layers:
    """Layer constructors with the initializers and LayerNorm of Hugging Face."""

    def __init__(self, config: BertConfig, rngs: nnx.Rngs, **dtypes: Any):
        size, common = config.hidden_size, {**dtypes, "rngs": rngs}
        initializer = nnx.initializers.normal(config.initializer_range)
        self.config = config
        self.linear = functools.partial(nnx.Linear, kernel_init=initializer, **common)
        self.embed = functools.partial(
            nnx.Embed, features=size, embedding_init=initializer, **common
        )
        # E[x²] − E[x]² loses precision if the variance is small.
        self.norm = functools.partial(
            nnx.LayerNorm,
            size,
            epsilon=config.layer_norm_eps,
            use_fast_variance=False,
            **common,
        )


class BertEmbeddings(nnx.Module):
    """Sum of word, position and token-type embeddings, normalized."""

    def __init__(self, layers: _Layers):
        config = layers.config
        self.word_embeddings = layers.embed(config.vocab_size)
        self.position_embeddings = layers.embed(config.max_position_embeddings)
        self.token_type_embeddings = layers.embed(config.type_vocab_size)
        self.LayerNorm = layers.norm()
        self.dropout = nnx.Dropout(config.hidden_dropout_prob)

    def __call__(self, batch, **mode):
        positions = jnp.arange(batch["input_ids"].shape[1])[None]
        hidden = (
            self.word_embeddings(batch["input_ids"])
            + self.position_embeddings(positions)
            + self.token_type_embeddings(batch["token_type_ids"])
        )
        return self.dropout(self.LayerNorm(hidden), **mode)


class BertSelfAttention(nnx.Module):
    """Multi-head self-attention over the unmasked tokens."""

    def __init__(self, layers: _Layers):
        size = layers.config.hidden_size
        self.num_heads = layers.config.num_attention_heads
        self.query = layers.linear(size, size)
        self.key = layers.linear(size, size)
        self.value = layers.linear(size, size)
        self.dropout = nnx.Dropout(layers.config.attention_probs_dropout_prob)

    def __call__(self, hidden, mask, **mode):
        batch_size, length = mask.shape[0], mask.shape[-1]

        def heads(x):
            return x.reshape(batch_size, length, self.num_heads, -1)

        query, key, value = (
            heads(project(hidden)) for project in (self.query, self.key, self.value)
        )
        # jax.nn.dot_product_attention has no dropout, and its softmax is float32 even
        # for float64.
        scores = jnp.einsum("bqhd,bkhd->bhqk", query, key) / math.sqrt(query.shape[-1])
        scores = scores.astype(jnp.promote_types(scores.dtype, jnp.float32))
        scores = jnp.where(mask, scores, jnp.finfo(scores.dtype).min)
        attention = self.dropout(nnx.softmax(scores).astype(value.dtype), **mode)
        context = jnp.einsum("bhqk,bkhd->bqhd", attention, value)
        return context.reshape(hidden.shape)


class BertResidual(nnx.Module):
    """Projection, dropout, residual connection and LayerNorm; ends each sub-block."""

    def __init__(self, layers: _Layers, in_features: int):
        self.dense = layers.linear(in_features, layers.config.hidden_size)
        self.LayerNorm = layers.norm()
        self.dropout = nnx.Dropout(layers.config.hidden_dropout_prob)

    def __call__(self, hidden, residual, **mode):
        return self.LayerNorm(self.dropout(self.dense(hidden), **mode) + residual)


class BertAttention(nnx.Module):
    """Self-attention and its residual connection."""

    def __init__(self, layers: _Layers):
        self.self = BertSelfAttention(layers)  # Hugging Face's name for it.
        self.output = BertResidual(layers, layers.config.hidden_size)

    def __call__(self, hidden, mask, **mode):
        attention = self.self(hidden, mask, **mode)
        return self.output(attention, hidden, **mode)


class BertIntermediate(nnx.Module):
    """First layer and activation of the feed-forward network."""

    def __init__(self, layers: _Layers):
        config = layers.config
        self.dense = layers.linear(config.hidden_size, config.intermediate_size)
        self.hidden_act = config.hidden_act

    def __call__(self, hidden):
        return ACTIVATIONS[self.hidden_act](self.dense(hidden))


class BertLayer(nnx.Module):
    """One post-LayerNorm transformer block."""

    def __init__(self, layers: _Layers):
        self.attention = BertAttention(layers)
        self.intermediate = BertIntermediate(layers)
        self.output = BertResidual(layers, layers.config.intermediate_size)

    def __call__(self, hidden, mask, **mode):
        attention = self.attention(hidden, mask, **mode)
        return self.output(self.intermediate(attention), attention, **mode)


class BertEncoder(nnx.Module):
    """The stack of transformer blocks."""

    def __init__(self, layers: _Layers):
        self.layer = nnx.List(
            [BertLayer(layers) for _ in range(layers.config.num_hidden_layers)]
        )

    def __call__(self, hidden, mask, **mode):
        for layer in self.layer:
            hidden = layer(hidden, mask, **mode)
        return hidden


class BertPooler(nnx.Module):
    """Linear layer and tanh on the first token."""

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

    def __call__(self, batch, **mode):
        hidden, mask = self.embeddings(batch, **mode), batch["attention_mask"] > 0
        # Flattened, so that weight gradients are plain matmuls: CPU steps are 10 %
        # faster than with a contraction over two axes.
        tokens = hidden.reshape(-1, hidden.shape[-1])
        tokens = self.encoder(tokens, mask[:, None, None, :], **mode)
        return tokens.reshape(hidden.shape)


class BertForSequenceClassification(nnx.Module):
    """BERT with a linear layer on the pooled first token."""

    def __init__(self, config: BertConfig, rngs: nnx.Rngs, **dtypes: Any):
        layers = _Layers(config, rngs, **dtypes)
        self.bert = BertModel(layers, add_pooling_layer=True)
        rate = config.classifier_dropout
        self.dropout = nnx.Dropout(config.hidden_dropout_prob if rate is None else rate)
        self.classifier = layers.linear(config.hidden_size, config.num_labels)

    def __call__(self, batch: Batch, **mode: Any) -> jax.Array:
        """Returns the logits, shape ``(batch, num_labels)``."""
        pooled = self.bert.pooler(self.bert(batch, **mode))
        return self.classifier(self.dropout(pooled, **mode))


class BertForQuestionAnswering(nnx.Module):
    """BERT with a start and an end logit for every token."""

    def __init__(self, config: BertConfig, rngs: nnx.Rngs, **dtypes: Any):
        layers = _Layers(config, rngs, **dtypes)
        self.bert = BertModel(layers, add_pooling_layer=False)
        self.qa_outputs = layers.linear(config.hidden_size, 2)

    def __call__(self, batch: Batch, **mode: Any) -> tuple[jax.Array, jax.Array]:
        """Returns start and end logits, each of shape ``(batch, length)``."""
        logits = self.qa_outputs(self.bert(batch, **mode))
        return logits[..., 0], logits[..., 1]


ModelClass = type[BertForSequenceClassification] | type[BertForQuestionAnswering]


def check_config(config: BertConfig, source: Any = "config.json") -> None:
    """Raises a UserError for a config that this BERT does not support."""
    problem, size, heads = None, config.hidden_size, config.num_attention_heads
    positions = getattr(config, "position_embedding_type", None)
    if config.hidden_act not in ACTIVATIONS:
        problem = (
            f"hidden_act {config.hidden_act!r}, not one of {', '.join(ACTIVATIONS)}"
        )
    if positions not in (None, "absolute"):
        problem = f"position_embedding_type {positions!r}, not 'absolute'"
    if config.is_decoder or config.add_cross_attention:
        problem = "is_decoder or add_cross_attention set"
    if size % heads:
        problem = f"hidden_size {size}, not a multiple of num_attention_heads {heads}"
    if problem is not None:
        raise UserError(f"{source} is not supported: it has {problem}.")


def init_params(
    config: BertConfig, model_class: ModelClass, seed: int, dtype: Any = jnp.float32
) -> Params:
    """Initializes parameters, a nested dict of arrays with string keys."""
    model = model_class(config, nnx.Rngs(seed), param_dtype=dtype)
    return _string_keys(nnx.to_pure_dict(nnx.state(model, nnx.Param)))


def make_apply(
    config: BertConfig,
    model_class: ModelClass,
    param_dtype: Any = jnp.float32,
    dtype: Any = None,
) -> Apply:
    """Returns the model as a pure function ``(params, batch, dropout_key) -> output``.

    ``batch`` holds ``input_ids``, ``attention_mask`` and ``token_type_ids``, each of
    shape ``(batch, length)``. A ``dropout_key`` of ``None`` turns dropout off.
    ``dtype`` is the dtype of the computation, by default the dtype of the parameters;
    softmax, the statistics of LayerNorm and the loss are at least float32.
    """
    dtypes = {"param_dtype": param_dtype, "dtype": dtype}
    graph, abstract = nnx.split(
        nnx.eval_shape(lambda: model_class(config, nnx.Rngs(0), **dtypes))
    )

    def apply(params: Params, batch: Batch, dropout_key: jax.Array | None) -> Any:
        state = jax.tree.map(lambda x: x, abstract)
        nnx.replace_by_pure_dict(state, params)
        model: Any = nnx.merge(graph, state)
        rngs = None if dropout_key is None else nnx.Rngs(dropout=dropout_key)
        return model(batch, deterministic=dropout_key is None, rngs=rngs)

    return apply


def decay_mask(params: Params) -> Any:
    """Marks leaves to decay: all except biases and LayerNorm, as in Hugging Face."""

    def decays(path, _):
        return path[-1].key != "bias" and not any(p.key == "LayerNorm" for p in path)

    return jax.tree_util.tree_map_with_path(decays, params)


def is_word_embedding(params: Params) -> Any:
    """Marks the word-embedding table."""
    return jax.tree_util.tree_map_with_path(
        lambda path, _: any(p.key == WORD_EMBEDDINGS for p in path), params
    )


def touched_rows(max_tokens: int, max_length: int) -> dict[str, int]:
    """Returns the maximum number of nonzero gradient rows, by embedding table.

    Args:
      max_tokens: maximum number of distinct tokens in a batch.
      max_length: maximum number of tokens in an example.
    """
    return {WORD_EMBEDDINGS: max_tokens, "position_embeddings": max_length}


def _string_keys(tree: Any) -> Any:
    if isinstance(tree, Mapping):
        return {str(key): _string_keys(value) for key, value in tree.items()}
    return tree
