"""Defines ten small tasks for comparing optimizers.

Data are generated or come from scikit-learn. A task draws its mini-batches inside the
jitted training loop, and a run takes seconds.
"""

import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax import lax
from sklearn.datasets import load_digits, make_friedman1

Params = Any
Batch = Any


class Task(NamedTuple):
    """A model, its data and its evaluation.

    Attributes:
      num_steps: Number of steps of a run.
      init: Returns the parameters for a random key.
      batch: Draws a mini-batch for a random key; returns all data in full-batch tasks.
      loss: Returns the loss of a mini-batch.
      evaluate: Returns the loss that optimizers are compared by: held-out loss, or the
        training loss of tasks without held-out data.
    """

    num_steps: int
    init: Callable[[jax.Array], Params]
    batch: Callable[[jax.Array], Batch]
    loss: Callable[[Params, Batch], jax.Array]
    evaluate: Callable[[Params], jax.Array]


def digits_mlp() -> Task:
    """Classifies digits with a three-layer perceptron."""
    (x, y), held_out = _digits()
    return Task(
        num_steps=400,
        init=lambda key: _init_mlp(key, (64, 32, 32, 10)),
        batch=_mini_batches((x, y), 64),
        loss=lambda params, batch: _cross_entropy(_mlp(params, batch[0]), batch[1]),
        evaluate=lambda params: _cross_entropy(_mlp(params, held_out[0]), held_out[1]),
    )


def regression() -> Task:
    """Fits Friedman's first function without noise, full batch."""
    x, y = make_friedman1(1024, random_state=0)
    x, y = jnp.asarray(2 * x - 1, jnp.float32), jnp.asarray(y, jnp.float32)
    data = x, (y - y.mean()) / y.std()

    def loss(params, batch):
        inputs, targets = batch
        return jnp.mean(jnp.square(_mlp(params, inputs)[:, 0] - targets))

    return Task(
        num_steps=1000,
        init=lambda key: _init_mlp(key, (10, 16, 16, 1)),
        batch=lambda key: data,
        loss=loss,
        evaluate=lambda params: loss(params, data),
    )


def pinn() -> Task:
    """Solves a Poisson equation, -u'' = f, with a physics-informed network."""
    points = jnp.linspace(-1, 1, 64)

    def source(x):
        # The solution is u(x) = sin(π x) + sin(3 π x) / 3, 0 at both ends.
        return jnp.pi**2 * (jnp.sin(jnp.pi * x) + 3 * jnp.sin(3 * jnp.pi * x))

    def loss(params, points):
        def solution(x):
            return _mlp(params, x[None, None])[0, 0]

        curvature = jax.vmap(jax.grad(jax.grad(solution)))(points)
        ends = jax.vmap(solution)(points[jnp.array([0, -1])])
        residual = jnp.square((curvature + source(points)) / jnp.pi**2)
        return jnp.mean(residual) + 10 * jnp.mean(jnp.square(ends))

    return Task(
        num_steps=1000,
        init=lambda key: _init_mlp(key, (1, 24, 24, 1)),
        batch=lambda key: points,
        loss=loss,
        evaluate=lambda params: loss(params, points),
    )


def lora() -> Task:
    """Adapts a language model to another language with low-rank updates (LoRA)."""
    base, language = _pretrained_language_model(), _markov_chain(seed=1)
    rank, scale = 4, 2.0

    def is_adapted(path, leaf):
        return leaf.ndim == 2 and "dense" in jax.tree_util.keystr(path)

    def init(key):
        keys = iter(jax.random.split(key, len(jax.tree.leaves(base))))

        def adapter(path, leaf):
            down = jax.random.normal(next(keys), (leaf.shape[0], rank))
            if not is_adapted(path, leaf):
                return None
            return {
                "down": down / np.sqrt(leaf.shape[0]),
                "up": jnp.zeros((rank, leaf.shape[1])),
            }

        return jax.tree_util.tree_map_with_path(adapter, base)

    def merge(adapters):
        def add(leaf, adapter):
            if adapter is None:
                return leaf
            return leaf + scale * jnp.matmul(adapter["down"], adapter["up"])

        return jax.tree.map(add, base, adapters)

    return _language_task(language, 300, init, merge)


def text_classification() -> Task:
    """Fine-tunes a language model, all parameters, to classify four languages."""
    base, languages = _pretrained_language_model(), 4
    chains = jnp.stack([_markov_chain(0, seed, 0.7) for seed in range(1, 5)])

    def sample(key, size):
        key, subkey = jax.random.split(key)
        labels = jax.random.randint(subkey, (size,), 0, languages)
        keys = jax.random.split(key, size)
        return jax.vmap(lambda k, c: _sample(k, chains[c], 1)[0])(keys, labels), labels

    def init(key):
        return {"encoder": base, "head": _init_dense(key, _WIDTH, languages)}

    def loss(params, batch):
        tokens, labels = batch
        hidden = jnp.mean(_encode(params["encoder"], tokens), axis=1)
        return _cross_entropy(_dense(params["head"], hidden), labels)

    train, held_out = sample(jax.random.key(1), 4096), sample(jax.random.key(2), 1024)
    return Task(
        num_steps=300,
        init=init,
        batch=_mini_batches(train, 16),
        loss=loss,
        evaluate=lambda params: loss(params, held_out),
    )


def digits_cnn() -> Task:
    """Classifies digits with a convolutional network."""
    (x, y), held_out = _digits()

    def init(key):
        keys = jax.random.split(key, 3)
        shapes = (9, 8), (9 * 8, 16), (2 * 2 * 16, 10)
        return [_init_dense(k, *shape) for k, shape in zip(keys, shapes, strict=True)]

    def loss(params, batch):
        images, labels = batch
        hidden = images.reshape(-1, 8, 8, 1)
        for layer in params[:2]:
            hidden = _mean_pool(jax.nn.relu(_dense(layer, _patches(hidden))))
        logits = _dense(params[2], hidden.reshape(len(images), -1))
        return _cross_entropy(logits, labels)

    return Task(
        num_steps=400,
        init=init,
        batch=_mini_batches((x, y), 64),
        loss=loss,
        evaluate=lambda params: loss(params, held_out),
    )


def autoencoder() -> Task:
    """Reconstructs digits through a bottleneck of eight units."""
    (x, _), (held_out, _) = _digits()

    def loss(params, images):
        logits = _mlp(params, images)
        return jnp.mean(jnp.square(jax.nn.sigmoid(logits) - images))

    return Task(
        num_steps=600,
        init=lambda key: _init_mlp(key, (64, 48, 24, 8, 24, 48, 64)),
        batch=_mini_batches(x, 64),
        loss=loss,
        evaluate=lambda params: loss(params, held_out),
    )


def language_model() -> Task:
    """Trains a transformer from scratch to predict the next token."""
    return _language_task(
        _markov_chain(seed=7),
        500,
        _init_language_model,
        lambda params: params,
    )


def image_fine_tuning() -> Task:
    """Fine-tunes a classifier of digits on 256 digits rotated by 90 degrees."""
    (x, y), (held_x, held_y) = _digits()

    def turned(images):
        return jnp.rot90(images.reshape(-1, 8, 8), axes=(1, 2)).reshape(-1, 64)

    def loss(params, batch):
        return _cross_entropy(_mlp(params, batch[0]), batch[1])

    base = _pretrain(
        _init_mlp(jax.random.key(0), (64, 64, 32, 10)),
        loss,
        _mini_batches((x[256:], y[256:]), 64),
        num_steps=1000,
        learning_rate=3e-3,
    )
    few, held_out = (turned(x[:256]), y[:256]), (turned(held_x), held_y)

    def init(key):
        # A new head, so that seeds differ.
        return [*base[:-1], _init_dense(key, 32, 10)]

    return Task(
        num_steps=150,
        init=init,
        batch=_mini_batches(few, 32),
        loss=loss,
        evaluate=lambda params: loss(params, held_out),
    )


def recommender() -> Task:
    """Factorizes a matrix of ratings in which most users and items are rare."""
    users, items, rank, size = 500, 200, 8, 40_000
    rng = np.random.default_rng(0)
    truth = rng.normal(size=(users, 3)) @ rng.normal(size=(3, items)) / np.sqrt(3)

    def zipf(number):
        weights = 1 / np.arange(1, number + 1)
        return rng.choice(number, size, p=weights / weights.sum())

    user, item = zipf(users), zipf(items)
    rating = jnp.asarray(truth[user, item] + 0.3 * rng.normal(size=size), jnp.float32)
    data = jnp.asarray(user), jnp.asarray(item), rating
    half = size // 2
    train, held_out = (
        jax.tree.map(lambda x: x[:half], data),
        jax.tree.map(lambda x: x[half:], data),
    )

    def init(key):
        keys = jax.random.split(key)
        return {
            "user_embedding": 0.3 * jax.random.normal(keys[0], (users, rank)),
            "item_embedding": 0.3 * jax.random.normal(keys[1], (items, rank)),
            "user_bias": jnp.zeros(users),
            "item_bias": jnp.zeros(items),
        }

    def loss(params, batch):
        user, item, rating = batch
        factors = params["user_embedding"][user] * params["item_embedding"][item]
        biases = params["user_bias"][user] + params["item_bias"][item]
        return jnp.mean(jnp.square(jnp.sum(factors, axis=1) + biases - rating))

    return Task(
        num_steps=1000,
        init=init,
        batch=_mini_batches(train, 128),
        loss=loss,
        evaluate=lambda params: loss(params, held_out),
    )


# The defaults of `adam_mfac` were chosen on five tasks and confirmed on the others.
CHOOSING = {
    factory.__name__: factory
    for factory in (digits_mlp, regression, pinn, lora, text_classification)
}
CONFIRMING = {
    factory.__name__: factory
    for factory in (
        digits_cnn,
        autoencoder,
        language_model,
        image_fine_tuning,
        recommender,
    )
}


def _digits() -> tuple[Any, Any]:
    """Returns 1,200 digits to train on and 597 held out, pixels in [0, 1]."""
    images, labels = load_digits(return_X_y=True)
    order = np.random.default_rng(0).permutation(len(labels))
    data = jnp.asarray(images[order] / 16, jnp.float32), jnp.asarray(labels[order])
    return tuple(x[:1200] for x in data), tuple(x[1200:] for x in data)


def _mini_batches(data: Batch, size: int) -> Callable[[jax.Array], Batch]:
    number = len(jax.tree.leaves(data)[0])

    def batch(key):
        rows = jax.random.randint(key, (size,), 0, number)
        return jax.tree.map(lambda x: x[rows], data)

    return batch


def _pretrain(
    params: Params,
    loss: Callable[[Params, Batch], jax.Array],
    batch: Callable[[jax.Array], Batch],
    num_steps: int,
    learning_rate: float,
) -> Params:
    """Pretrains with Adam; all compared optimizers start from the result."""
    opt = optax.adam(optax.linear_schedule(learning_rate, 0.0, num_steps))

    def step(i, carry):
        params, state = carry
        key = jax.random.fold_in(jax.random.key(1), i)
        updates, state = opt.update(jax.grad(loss)(params, batch(key)), state)
        return optax.apply_updates(params, updates), state

    @jax.jit
    def run(params):
        return lax.fori_loop(0, num_steps, step, (params, opt.init(params)))[0]

    return run(params)


def _cross_entropy(logits: jax.Array, labels: jax.Array) -> jax.Array:
    losses = optax.softmax_cross_entropy_with_integer_labels(logits, labels)
    return jnp.mean(losses)


def _init_dense(key: jax.Array, inputs: int, outputs: int) -> Params:
    kernel = jax.random.normal(key, (inputs, outputs)) / np.sqrt(inputs)
    return {"kernel": kernel, "bias": jnp.zeros(outputs)}


def _dense(layer: Params, x: jax.Array) -> jax.Array:
    y = jnp.matmul(x, layer["kernel"])
    return y + jnp.expand_dims(layer["bias"], range(y.ndim - 1))


def _init_mlp(key: jax.Array, sizes: tuple[int, ...]) -> Params:
    keys = jax.random.split(key, len(sizes) - 1)
    return [_init_dense(*ks) for ks in zip(keys, sizes[:-1], sizes[1:], strict=True)]


def _mlp(layers: Params, x: jax.Array) -> jax.Array:
    for layer in layers[:-1]:
        x = jnp.tanh(_dense(layer, x))
    return _dense(layers[-1], x)


def _patches(images: jax.Array) -> jax.Array:
    """Returns 3 × 3 patches of pixels, which turn a convolution into a product."""
    padded = jnp.pad(images, ((0, 0), (1, 1), (1, 1), (0, 0)))
    height, width = images.shape[1:3]
    shifted = [
        padded[:, i : i + height, j : j + width] for i in range(3) for j in range(3)
    ]
    return jnp.concatenate(shifted, axis=-1)


def _mean_pool(images: jax.Array) -> jax.Array:
    number, height, width, channels = images.shape
    blocks = images.reshape(number, height // 2, 2, width // 2, 2, channels)
    return jnp.mean(blocks, axis=(2, 4))


# A language: the next token depends on the two before it.
_VOCABULARY, _LENGTH, _WIDTH, _HEADS, _LAYERS = 12, 24, 32, 2, 2


def _markov_chain(seed: int, other: int | None = None, share: float = 0.0) -> jax.Array:
    """Returns next-token probabilities, mixed with a share of another chain's."""
    shape = _VOCABULARY, _VOCABULARY

    def chain(seed):
        alpha = np.full(_VOCABULARY, 0.15)
        return np.random.default_rng(seed).dirichlet(alpha, shape)

    mixed = chain(seed)
    if other is not None:
        mixed = (1 - share) * mixed + share * chain(other)
    return jnp.asarray(mixed, jnp.float32)


@functools.partial(jax.jit, static_argnames="size")
def _sample(key: jax.Array, chain: jax.Array, size: int) -> jax.Array:
    """Samples sequences of tokens, shape ``(size, length + 1)``."""
    first, rest = jax.random.split(key)
    start = jax.random.randint(first, (2, size), 0, _VOCABULARY)

    def step(last_two, key):
        token = jax.random.categorical(key, jnp.log(chain[last_two[0], last_two[1]]))
        return jnp.stack([last_two[1], token]), token

    _, tokens = lax.scan(step, start, jax.random.split(rest, _LENGTH - 1))
    return jnp.concatenate([start, tokens]).T


def _init_language_model(key: jax.Array) -> Params:
    token, position, *keys = jax.random.split(key, 2 + 4 * _LAYERS)
    return {
        "token_embedding": jax.random.normal(token, (_VOCABULARY, _WIDTH)) / 4,
        "position_embedding": jax.random.normal(position, (_LENGTH, _WIDTH)) / 4,
        "layers": [
            {
                "dense_qkv": _init_dense(keys[4 * i], _WIDTH, 3 * _WIDTH),
                "dense_out": _init_dense(keys[4 * i + 1], _WIDTH, _WIDTH),
                "dense_up": _init_dense(keys[4 * i + 2], _WIDTH, 2 * _WIDTH),
                "dense_down": _init_dense(keys[4 * i + 3], 2 * _WIDTH, _WIDTH),
                "norms": jnp.ones((2, _WIDTH)),
            }
            for i in range(_LAYERS)
        ],
        "norm": jnp.ones(_WIDTH),
    }


def _encode(params: Params, tokens: jax.Array) -> jax.Array:
    """Returns a causal transformer's hidden states of all tokens but the last."""
    tokens = tokens[:, :-1]
    x = params["token_embedding"][tokens] + params["position_embedding"][None]
    for layer in params["layers"]:
        x = x + _attention(layer, _normalize(x, layer["norms"][0]))
        hidden = jax.nn.gelu(
            _dense(layer["dense_up"], _normalize(x, layer["norms"][1]))
        )
        x = x + _dense(layer["dense_down"], hidden)
    return _normalize(x, params["norm"])


def _attention(layer: Params, x: jax.Array) -> jax.Array:
    batch, length, width = x.shape
    qkv = _dense(layer["dense_qkv"], x).reshape(batch, length, 3, _HEADS, -1)
    query, key, value = jnp.moveaxis(qkv, 2, 0)
    scores = jnp.einsum("bqhd,bkhd->bhqk", query, key) / np.sqrt(width // _HEADS)
    is_past = np.tri(length, dtype=bool)[None, None]
    weights = jax.nn.softmax(jnp.where(is_past, scores, -1e9))
    mixed = jnp.einsum("bhqk,bkhd->bqhd", weights, value)
    return _dense(layer["dense_out"], mixed.reshape(x.shape))


def _normalize(x: jax.Array, scale: jax.Array) -> jax.Array:
    mean_square = jnp.mean(jnp.square(x), axis=-1, keepdims=True)
    return x * lax.rsqrt(mean_square + 1e-6) * scale[None, None]


def _next_token_loss(params: Params, tokens: jax.Array) -> jax.Array:
    hidden = _encode(params, tokens)
    logits = jnp.einsum("blw,vw->blv", hidden, params["token_embedding"])
    return _cross_entropy(logits, tokens[:, 1:])


def _language_task(
    chain: jax.Array,
    num_steps: int,
    init: Callable[[jax.Array], Params],
    model: Callable[[Params], Params],
) -> Task:
    """Predicts the tokens of a chain; evaluates the loss above its entropy."""
    train = _sample(jax.random.key(1), chain, 8192)
    held_out = _sample(jax.random.key(2), chain, 512)
    likelihoods = chain[held_out[:, :-2], held_out[:, 1:-1], held_out[:, 2:]]
    least = (jnp.log(_VOCABULARY) - jnp.sum(jnp.mean(jnp.log(likelihoods), axis=0))) / (
        _LENGTH
    )

    def loss(params, tokens):
        return _next_token_loss(model(params), tokens)

    return Task(
        num_steps=num_steps,
        init=init,
        batch=_mini_batches(train, 16),
        loss=loss,
        evaluate=lambda params: loss(params, held_out) - least,
    )


@functools.cache
def _pretrained_language_model() -> Params:
    chain = _markov_chain(seed=0)
    return _pretrain(
        _init_language_model(jax.random.key(0)),
        _next_token_loss,
        _mini_batches(_sample(jax.random.key(1), chain, 8192), 32),
        num_steps=2000,
        learning_rate=3e-3,
    )
