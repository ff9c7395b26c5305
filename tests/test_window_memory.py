"""Tests the memory of windows and updates at the size of BERT-tiny."""

import jax
import jax.numpy as jnp
import pytest
from compiled import AS_FOR_USERS

import mfac_jax

# Memory is unaffected: XLA assigns buffers before the optimizations that this skips.
pytestmark = pytest.mark.usefixtures("quick_compilation")

BERT_TINY = {  # BERT-tiny with a head for two labels, 4.39 million parameters.
    "word_embeddings": {"embedding": (30522, 128)},
    "position_embeddings": {"embedding": (512, 128)},
    "token_type_embeddings": {"embedding": (2, 128)},
    "attention": {f"{i}": (128, 128) for i in range(9)},
    "intermediate": {f"{i}": (128, 512) for i in range(2)},
    "output": {f"{i}": (512, 128) for i in range(2)},
    "vectors": {f"{i}": (128,) for i in range(21)},
    "wide_vectors": {f"{i}": (512,) for i in range(2)},
    "classifier": {"kernel": (128, 2), "bias": (2,)},
}


def bert_tiny_params():
    return jax.tree.map(
        lambda shape: jax.ShapeDtypeStruct(shape, jnp.float32),
        BERT_TINY,
        is_leaf=lambda x: isinstance(x, tuple),
    )


TIGHT = {"word_embeddings": 450, "position_embeddings": 128}


@pytest.mark.parametrize(
    ("window", "limit"),
    [
        (mfac_jax.DenseWindow(jnp.bfloat16), 9.0),
        (mfac_jax.compact_windows(TIGHT), 2.4),
        (mfac_jax.compact_windows(TIGHT, jnp.bfloat16), 1.2),
        (mfac_jax.Int8Window(), 4.7),
        (mfac_jax.TopKWindow(0.01), 0.3),
    ],
)
def test_memory_at_the_size_of_bert_tiny(window, limit):
    """Bounds the bytes of the window and the temporaries of a compiled update."""
    params = bert_tiny_params()
    gradient_nbytes = sum(4 * leaf.size for leaf in jax.tree.leaves(params))
    assert gradient_nbytes == 4 * 4_386_178
    opt = mfac_jax.scale_by_mfac(1024, window=window)
    state = jax.eval_shape(opt.init, params)
    nbytes = mfac_jax.window_nbytes(state)
    solve_nbytes = 2 * 4 * 1024**2  # the Gram matrix and its inverse
    assert nbytes + solve_nbytes <= limit * 1e9
    update = jax.jit(opt.update, donate_argnums=1)
    memory = update.lower(params, state).compile(AS_FOR_USERS).memory_analysis()
    assert memory.alias_size_in_bytes >= nbytes
    assert memory.temp_size_in_bytes <= max(0.05 * nbytes, 3 * gradient_nbytes)


@pytest.mark.parametrize(("dtype", "limit"), [(None, 4.2e9), (jnp.bfloat16, 2.1e9)])
def test_bytes_at_the_size_of_bert_tiny_with_the_safe_bound(dtype, limit):
    opt = mfac_jax.scale_by_mfac(1024, window=mfac_jax.compact_windows(4096, dtype))
    state = jax.eval_shape(opt.init, bert_tiny_params())
    assert mfac_jax.window_nbytes(state) + 2 * 4 * 1024**2 <= limit
