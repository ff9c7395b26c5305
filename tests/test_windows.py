"""Tests the compact windows against NumPy and in all uses of the dense window."""

import functools
import math

import chex
import jax
import jax.export
import jax.numpy as jnp
import numpy as np
import optax
import oracles
import orbax.checkpoint as ocp
import pytest
from jax.sharding import AxisType, NamedSharding, PartitionSpec

import mfac_jax

pytestmark = pytest.mark.usefixtures("quick_compilation")

BF16 = jnp.bfloat16
KINDS = {
    "bf16": mfac_jax.DenseWindow(BF16),
    "f16": mfac_jax.DenseWindow(jnp.float16),
    "int8": mfac_jax.Int8Window(),
    "row_sparse": mfac_jax.RowSparseWindow(3),
    "row_sparse_bf16": mfac_jax.RowSparseWindow(3, BF16),
    "topk": mfac_jax.TopKWindow(0.3, block_size=16),
    "topk_bf16": mfac_jax.TopKWindow(0.3, block_size=16, dtype=BF16),
}
# One of each kind, for tests that do not depend on the dtype.
COMPACT = ["bf16", "int8", "row_sparse", "topk"]
PARAMS = {
    "table": jnp.ones((9, 5)),
    "kernel": jnp.ones((4, 3, 2)),
    "bias": jnp.ones(7),
    "scale": jnp.ones(()),
    "wide": jnp.ones((6, 50)),
}

FEW = {name: PARAMS[name] for name in ("table", "wide")}


def gradients_like(params, num_steps, seed=0):
    """Returns ``num_steps`` random trees with the structure of ``params``."""
    rng = np.random.default_rng(seed)
    return [
        jax.tree.map(lambda p: jnp.asarray(rng.normal(size=p.shape), p.dtype), params)
        for _ in range(num_steps)
    ]


def run(opt, gradients):
    """Returns the updates of all steps and the last state."""
    state, update, updates = opt.init(gradients[0]), jax.jit(opt.update), []
    for gradient in gradients:
        step, state = update(gradient, state, gradients[0])
        updates.append(step)
    return updates, state


def flat(tree):
    leaves = [np.asarray(leaf, np.float64).ravel() for leaf in jax.tree.leaves(tree)]
    return np.concatenate(leaves)


# In NumPy, what each kind stores for a sequence of gradients of one leaf.


def rounded(x, dtype):
    return np.asarray(jnp.asarray(x, dtype).astype(jnp.float32))


def stored_int8(gradients, block_size):
    stored = []
    for gradient in gradients:
        x = gradient.astype(np.float32).ravel()
        out = np.empty_like(x)
        for start in range(0, x.size, block_size):
            block = x[start : start + block_size]
            scale = np.abs(block).max() / np.float32(127)
            quotient = block / scale if scale > 0 else np.zeros_like(block)
            out[start : start + block_size] = np.round(quotient) * scale
        stored.append(out.reshape(gradient.shape))
    return stored


def stored_row_sparse(gradients, max_rows, dtype=np.float32):
    stored = []
    for gradient in gradients:
        if gradient.ndim > 1 and len(gradient) > max_rows:
            norms = np.linalg.norm(gradient.reshape(len(gradient), -1), axis=1)
            gradient = gradient.copy()
            gradient[np.argsort(-norms)[max_rows:]] = 0
        stored.append(rounded(gradient, dtype))
    return stored


def stored_top_k(gradients, density, block_size, dtype=np.float32):
    error, stored = np.zeros(gradients[0].size, np.float32), []
    for gradient in gradients:
        total, out = error + gradient.ravel(), np.zeros(error.size, np.float32)
        for start in range(0, total.size, block_size):
            block = total[start : start + block_size]
            size = block_size if total.size > block_size else total.size
            largest = np.argsort(-np.abs(block))[: math.ceil(density * size)]
            out[start + largest] = rounded(block[largest], dtype)
        error = total - out
        stored.append(out.reshape(gradient.shape))
    return stored


STORED = {
    "bf16": lambda gs: [rounded(g, BF16) for g in gs],
    "f16": lambda gs: [rounded(g, jnp.float16) for g in gs],
    "int8": lambda gs: stored_int8(gs, 128),
    "row_sparse": lambda gs: stored_row_sparse(gs, 3),
    "row_sparse_bf16": lambda gs: stored_row_sparse(gs, 3, BF16),
    "topk": lambda gs: stored_top_k(gs, 0.3, 16),
    "topk_bf16": lambda gs: stored_top_k(gs, 0.3, 16, BF16),
}


@pytest.mark.parametrize("kind", KINDS)
def test_every_step_matches_the_stored_gradients(kind):
    num_grads, damp = 6, 1e-3  # Three batches of two on the CPU.
    gradients = gradients_like(PARAMS, 2 * num_grads + 3)
    updates, state = run(
        mfac_jax.scale_by_mfac(num_grads, damp, window=KINDS[kind]), gradients
    )
    stored = {
        name: STORED[kind]([np.asarray(g[name]) for g in gradients]) for name in PARAMS
    }
    rows = np.stack(
        [flat({k: stored[k][t] for k in PARAMS}) for t in range(len(gradients))]
    )
    for update, (window, row) in zip(
        updates, oracles.ring_windows(rows, num_grads), strict=True
    ):
        expected = oracles.dense_inverse_product(window, window[row], damp)
        error = np.linalg.norm(flat(update) - expected)
        assert error <= 1e-5 * np.linalg.norm(expected)
    np.testing.assert_allclose(state.gram, window @ window.T, rtol=2e-6, atol=2e-5)
    assert state.num_raised == 0
    # Arbitrary vectors go through the same two passes.
    product = jax.jit(mfac_jax.inverse_fisher_vector_product)(state, PARAMS, 1.0)
    expected = oracles.dense_inverse_product(window, flat(PARAMS), 1.0)
    np.testing.assert_allclose(flat(product), expected, rtol=1e-4, atol=1e-5)


def test_kinds_share_one_gram_matrix(tmp_path):
    kinds = ["row_sparse", "int8", "topk", "bf16", "int8"]
    kinds = dict(zip(PARAMS, kinds, strict=True))
    gradients = gradients_like(PARAMS, 9)
    opt = mfac_jax.scale_by_mfac(6, 1e-3, window=lambda path, _: KINDS[kinds[path]])
    updates, state = run(opt, gradients)
    stored = {
        name: STORED[kind]([np.asarray(g[name]) for g in gradients])
        for name, kind in kinds.items()
    }
    rows = np.stack([flat({k: stored[k][t] for k in PARAMS}) for t in range(9)])
    for update, (window, row) in zip(
        updates, oracles.ring_windows(rows, 6), strict=True
    ):
        expected = oracles.dense_inverse_product(window, window[row], 1e-3)
        np.testing.assert_allclose(flat(update), expected, rtol=1e-4, atol=1e-5)
    # An Orbax checkpoint restores the same state.
    with ocp.StandardCheckpointer() as checkpointer:
        checkpointer.save(tmp_path / "state", state)
    with ocp.StandardCheckpointer() as checkpointer:
        restored = checkpointer.restore(tmp_path / "state", opt.init(PARAMS))
    chex.assert_trees_all_equal(restored, state)
    chex.assert_trees_all_equal_structs(restored, state)


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
@pytest.mark.parametrize("shape", [(), (3,), (70_001,), (512, 300), (3000, 40)])
def test_passes_over_narrow_windows_keep_float32_precision(dtype, shape):
    # A sequential sum is least accurate for entries of one sign.
    values = np.random.default_rng(0).uniform(0.5, 1, (6, *shape)).astype(np.float32)
    opt = mfac_jax.scale_by_mfac(6, window=mfac_jax.DenseWindow(dtype))
    _, state = run(opt, list(values))
    flat_rows = np.stack([rounded(v, dtype).ravel() for v in values]).astype(float)
    np.testing.assert_allclose(state.gram, flat_rows @ flat_rows.T, rtol=1e-6)


def sparse_gradients(num_steps, num_rows=50, max_rows=6):
    """Returns gradients of a table and a kernel; some batches have no tokens."""
    rng = np.random.default_rng(0)
    gradients = []
    for step in range(num_steps):
        table = np.zeros((num_rows, 8))
        tokens = rng.zipf(1.3, 12) % num_rows  # As in text, some are in every batch.
        tokens = np.unique(tokens)[:max_rows] if step % 7 else []
        table[tokens] = rng.normal(size=(len(tokens), 8))
        kernel = rng.normal(size=(8, 3)) if step % 14 else np.zeros((8, 3))
        gradients.append({"table": table, "kernel": kernel})
    return gradients


@functools.cache
def network_gradients(num_steps=60):
    """Returns the gradients of a word-sequence classifier as it trains, in float64."""
    rng = np.random.default_rng(0)
    # As in text, some tokens are in every batch.
    tokens, labels = rng.zipf(1.3, (num_steps, 4, 12)) % 60, rng.integers(2, size=4)
    shapes = {"word_embeddings": (60, 8), "positions": (16, 8), "kernel": (8, 2)}
    params = {name: jnp.asarray(rng.normal(size=s)) for name, s in shapes.items()}

    def loss(params, tokens):
        hidden = params["word_embeddings"][tokens] + params["positions"][:12][None]
        logits = jnp.tanh(hidden).mean(axis=1) @ params["kernel"]
        losses = optax.softmax_cross_entropy_with_integer_labels(logits, labels)
        return losses.mean()

    def step(params, tokens):
        gradient = jax.grad(loss)(params, tokens)
        return jax.tree.map(lambda p, g: p - 0.3 * g, params, gradient), gradient

    gradients = jax.device_get(jax.jit(lambda p: jax.lax.scan(step, p, tokens))(params))
    return [jax.tree.map(lambda x, t=t: x[t], gradients[1]) for t in range(num_steps)]


def compare_with_dense(gradients, window, num_grads, dtype):
    """Returns the largest relative differences: between the kinds, to the oracle."""
    opts = {
        "sparse": mfac_jax.scale_by_mfac(num_grads, 1e-6, window=window),
        "dense": mfac_jax.scale_by_mfac(num_grads, 1e-6),
    }
    gradients = [jax.tree.map(lambda x: jnp.asarray(x, dtype), g) for g in gradients]
    rows = np.stack([flat(g) for g in gradients])
    states = {name: opt.init(gradients[0]) for name, opt in opts.items()}
    update = {name: jax.jit(opt.update) for name, opt in opts.items()}
    worst = {"gram": 0, "direction": 0, "sparse": 0, "dense": 0}

    def note(name, x, y, size):
        if size > 0:
            worst[name] = max(worst[name], np.linalg.norm(x - y) / size)

    expectations = oracles.newest_directions(rows, num_grads, 1e-6)
    for t, (gradient, expected) in enumerate(zip(gradients, expectations, strict=True)):
        directions = {}
        for name in opts:
            direction, states[name] = update[name](gradient, states[name])
            directions[name] = flat(direction)
        for name in opts:
            note(name, directions[name], expected, np.linalg.norm(expected))
        note("direction", *directions.values(), np.linalg.norm(expected))
        grams = [np.asarray(states[name].gram)[t % num_grads] for name in opts]
        note("gram", *grams, np.linalg.norm(grams[1]))
    assert mfac_jax.diagnostics(states["sparse"])["num_dropped"] == 0
    return worst


@pytest.mark.parametrize(
    ("dtype", "bounds"),
    [
        ("float32", {"gram": 1e-6, "direction": 2e-4, "sparse": 1e-4, "dense": 1e-4}),
        ("float64", {"gram": 1e-10, "direction": 1e-10, "sparse": 1e-9, "dense": 1e-9}),
    ],
)
def test_row_sparse_equals_dense(dtype, bounds):
    """Covers wrap-around, repeated tokens and empty gradients."""
    gradients = sparse_gradients(60)
    window = mfac_jax.compact_windows({"table": 6})
    with jax.enable_x64(dtype == "float64"):
        worst = compare_with_dense(gradients, window, 16, dtype)
    assert all(worst[name] < bound for name, bound in bounds.items()), worst


@pytest.mark.parametrize(
    ("dtype", "bounds"),
    [
        ("float32", {"gram": 1e-6, "direction": 2e-4, "sparse": 2e-4, "dense": 2e-4}),
        ("float64", {"gram": 1e-10, "direction": 1e-10, "sparse": 1e-9, "dense": 1e-9}),
    ],
)
def test_row_sparse_equals_dense_on_the_gradients_of_a_network(dtype, bounds):
    with jax.enable_x64(True):
        gradients = network_gradients()
    rows = {"word_embeddings": 48, "positions": 12}
    window = mfac_jax.compact_windows(rows)
    with jax.enable_x64(dtype == "float64"):
        worst = compare_with_dense(gradients, window, 32, dtype)
    assert all(worst[name] < bound for name, bound in bounds.items()), worst


def test_rows_beyond_the_limit_are_dropped_by_norm_and_counted():
    table = np.zeros((8, 2), np.float32)
    table[[1, 2, 4, 5, 7]] = [[1, 1], [3, 0], [0, 1e-30], [2, 2], [0, -4]]
    opt = mfac_jax.scale_by_mfac(2, 1e-6, window=mfac_jax.RowSparseWindow(3))
    (update,), state = run(opt, [jnp.asarray(table)])
    np.testing.assert_array_equal(state.window[""].indices[0], [2, 5, 7])
    np.testing.assert_array_equal(state.window[""].values[0], table[[2, 5, 7]])
    assert state.window[""].num_dropped == 2
    kept = np.where(np.isin(np.arange(8), [2, 5, 7])[:, None], table, 0)
    np.testing.assert_allclose(update, 2 * kept / np.sum(kept**2), rtol=1e-5)
    # A rejected gradient drops nothing; the counter adds up and saturates.
    update = jax.jit(opt.update)
    _, state = update(jnp.full((8, 2), jnp.nan), state)
    assert state.window[""].num_dropped == 2
    _, state = update(jnp.asarray(table), state)
    assert state.window[""].num_dropped == 4
    largest = jnp.iinfo(jnp.int32).max
    full = state.window[""]._replace(num_dropped=jnp.asarray(largest - 1))
    _, state = update(jnp.asarray(table), state._replace(window={"": full}))
    assert state.window[""].num_dropped == largest


def test_a_tiny_row_ranks_above_zero_rows():
    # Its square is 0 in float32.
    table = jnp.zeros((6, 2)).at[4].set(1e-25).at[2].set(1.0)
    opt = mfac_jax.scale_by_mfac(2, window=mfac_jax.RowSparseWindow(2))
    _, state = run(opt, [table])
    np.testing.assert_array_equal(state.window[""].indices[0], [2, 4])
    assert state.window[""].num_dropped == 0


@pytest.mark.parametrize("shape", [(), (9,), (3, 4), (2, 4, 5), (0, 4)])
def test_leaves_that_row_sparse_would_not_shrink_are_stored_densely(shape):
    window = mfac_jax.RowSparseWindow(3, BF16).init(jnp.zeros(shape), 5)
    assert window.values.shape == (5, *shape)
    assert window.values.dtype == BF16


@pytest.mark.parametrize(
    ("rows", "dtype"),
    [(256, "uint8"), (257, "uint16"), (65_536, "uint16"), (65_537, "uint32")],
)
def test_indices_have_the_narrowest_dtype(rows, dtype):
    leaf = jnp.zeros((rows, 1))
    assert mfac_jax.RowSparseWindow(2).init(leaf, 1).indices.dtype == dtype
    window = mfac_jax.TopKWindow(0.001, block_size=rows).init(leaf, 1)
    assert window.indices.dtype == dtype


@pytest.mark.parametrize("rows", [256, 65_536])
def test_the_largest_index_of_a_dtype_round_trips(rows):
    leaf = jnp.zeros((rows, 1))
    gradients = [leaf.at[rows - 1].set(1.0).at[t].set(2.0) for t in range(3)]
    expected, _ = run(mfac_jax.scale_by_mfac(2), gradients)
    for spec in [
        mfac_jax.RowSparseWindow(2),
        mfac_jax.TopKWindow(2 / rows, block_size=rows),
    ]:
        updates, _ = run(mfac_jax.scale_by_mfac(2, window=spec), gradients)
        for update, other in zip(updates, expected, strict=True):
            np.testing.assert_allclose(update, other, rtol=1e-4, atol=1e-6)


def test_top_k_of_everything_is_dense():
    gradients = gradients_like(PARAMS, 9)
    window = mfac_jax.TopKWindow(1.0, block_size=16)
    updates, state = run(mfac_jax.scale_by_mfac(4, 1e-3, window=window), gradients)
    expected, _ = run(mfac_jax.scale_by_mfac(4, 1e-3), gradients)
    for update, other in zip(updates, expected, strict=True):
        np.testing.assert_allclose(flat(update), flat(other), rtol=2e-5, atol=1e-6)
    assert not any(np.any(leaf.error) for leaf in state.window.values())


def test_values_that_top_k_leaves_out_are_stored_later():
    gradients = gradients_like({"w": jnp.ones(40)}, 200)
    opt = mfac_jax.scale_by_mfac(200, window=mfac_jax.TopKWindow(0.1))
    _, state = run(opt, gradients)
    window = state.window["w"]
    stored = np.zeros(40)
    np.add.at(
        stored, np.asarray(window.indices).ravel(), np.asarray(window.values).ravel()
    )
    total = sum(flat(g) for g in gradients)
    np.testing.assert_allclose(stored + window.error[0], total, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("kind", COMPACT)
def test_a_rejected_gradient_leaves_no_trace(kind):
    gradients = gradients_like(FEW, 6)
    opt = mfac_jax.scale_by_mfac(4, 1e-3, window=KINDS[kind])
    _, before = run(opt, gradients)
    for leaf in FEW:
        bad = {**gradients[0], leaf: jnp.full_like(FEW[leaf], jnp.nan)}
        update, after = jax.jit(opt.update)(bad, before)
        np.testing.assert_array_equal(flat(update), 0)
        chex.assert_trees_all_equal(
            after, before._replace(count=before.count + 1, num_rejected=1)
        )


@pytest.mark.parametrize("kind", COMPACT)
def test_scan_vmap_and_cond(kind):
    opt = mfac_jax.scale_by_mfac(3, 1e-3, window=KINDS[kind])
    gradients = [gradients_like(FEW, 5, seed) for seed in range(2)]

    def stack(trees):
        return jax.tree.map(lambda *leaves: jnp.stack(leaves), *trees)

    def scan(gradients):
        def step(state, gradient):
            return jax.lax.cond(
                jnp.sum(gradient["wide"]) < 1e3,
                lambda: opt.update(gradient, state)[::-1],
                lambda: (state, gradient),
            )

        return jax.lax.scan(step, opt.init(FEW), gradients)

    _, updates = jax.jit(jax.vmap(scan))(stack([stack(g) for g in gradients]))
    for replica in range(2):
        expected, _ = run(opt, gradients[replica])
        for t in range(5):
            update = jax.tree.map(lambda x, r=replica, t=t: x[r, t], updates)
            np.testing.assert_allclose(
                flat(update), flat(expected[t]), rtol=1e-4, atol=1e-4
            )


@pytest.mark.parametrize("kind", COMPACT)
def test_formulations_of_other_backends(kind, monkeypatch):
    """The GPU formulation gives the same values and lowers for CUDA."""
    gradients = gradients_like(FEW, 9)
    opt = mfac_jax.scale_by_mfac(6, 1e-3, window=KINDS[kind])
    expected, state = run(opt, gradients)
    jax.export.export(jax.jit(opt.update), platforms=["cuda"])(gradients[0], state)
    monkeypatch.setattr(
        jax.lax, "platform_dependent", lambda *args, cpu, default: default(*args)
    )
    opt = mfac_jax.scale_by_mfac(6, 1e-3, window=KINDS[kind])
    updates, other = run(opt, gradients)
    for update, expectation in zip(updates, expected, strict=True):
        np.testing.assert_allclose(
            flat(update), flat(expectation), rtol=1e-4, atol=1e-5
        )
    chex.assert_trees_all_equal(other.window, state.window)


@pytest.mark.parametrize("kind", COMPACT)
def test_wrappers_and_abstract_init(kind):
    gradients = gradients_like(FEW, 5)
    only_table = {name: name == "table" for name in FEW}
    alone, _ = run(
        mfac_jax.mfac(0.1, 3, 1e-3, 0.5, window=KINDS[kind]),
        [{"table": g["table"]} for g in gradients],
    )
    inject = optax.inject_hyperparams(
        mfac_jax.mfac, static_args=("num_grads", "mask", "window")
    )
    for wrapped in [
        optax.masked(mfac_jax.mfac(0.1, 3, 1e-3, 0.5, window=KINDS[kind]), only_table),
        optax.masked(inject(0.1, 3, 1e-3, 0.5, window=KINDS[kind]), only_table),
    ]:
        updates, state = run(wrapped, gradients)
        for update, expected in zip(updates, alone, strict=True):
            np.testing.assert_allclose(
                update["table"], expected["table"], rtol=1e-5, atol=1e-6
            )
        shapes = jax.eval_shape(lambda: FEW)
        chex.assert_trees_all_equal_shapes_and_dtypes(
            jax.eval_shape(wrapped.init, shapes), state
        )
        mapped = optax.tree.map_params(wrapped, lambda x: x, state)
        chex.assert_trees_all_equal(mapped, state)
    opt = mfac_jax.scale_by_mfac(3, window=KINDS[kind])
    chex.assert_trees_all_equal(opt.init(shapes), opt.init(FEW))


@pytest.mark.parametrize("kind", COMPACT)
def test_precision_follows_the_parameters(kind):
    with jax.enable_x64(True):
        params = {"h": jnp.ones((9, 5), BF16), "f": jnp.ones((9, 5))}
        params["f"] = params["f"].astype(jnp.float32)
        opt = mfac_jax.scale_by_mfac(3, 1e-3, window=KINDS[kind])
        updates, state = run(opt, gradients_like(params, 4))
        chex.assert_trees_all_equal_dtypes(updates[-1], params)
        assert state.gram.dtype == jnp.float32
        chex.assert_trees_all_equal_dtypes(state, opt.init(params))
        params["d"] = jnp.ones((9, 5), jnp.float64)
        updates, state = run(opt, gradients_like(params, 4))
        assert state.gram.dtype == (jnp.float32 if kind == "bf16" else jnp.float64)
        chex.assert_trees_all_equal_dtypes(updates[-1], params)
        chex.assert_trees_all_equal_dtypes(state, opt.init(params))


def test_window_nbytes_counts_every_array():
    params = {"t": jnp.zeros((300, 4)), "b": jnp.zeros(5)}
    expected = {
        mfac_jax.DenseWindow(): 6 * 4 * 1205,
        mfac_jax.DenseWindow(BF16): 6 * 2 * 1205,
        mfac_jax.RowSparseWindow(7): 6 * (7 * (4 * 4 + 2) + 4 * 5),
        mfac_jax.RowSparseWindow(7, BF16): 6 * (7 * (2 * 4 + 2) + 2 * 5),
        mfac_jax.Int8Window(128): 6 * (10 * (128 + 4) + 5 + 4),
        # 12 blocks of 100 that keep 10 each, 1 of the 5 biases, the errors.
        mfac_jax.TopKWindow(0.1, 100): 6 * (12 * 10 + 1) * (4 + 1) + 4 * 1205,
    }
    for window, nbytes in expected.items():
        opt = mfac_jax.mfac(0.1, 6, window=window)
        assert mfac_jax.window_nbytes(opt.init(params)) == nbytes
        chain = optax.chain(optax.clip_by_global_norm(1.0), opt)
        assert mfac_jax.window_nbytes(jax.eval_shape(chain.init, params)) == nbytes
    both = optax.partition(
        {"a": mfac_jax.mfac(0.1, 2), "b": mfac_jax.mfac(0.1, 3)}, {"t": "a", "b": "b"}
    )
    assert mfac_jax.window_nbytes(both.init(params)) == 2 * 4 * 1200 + 3 * 4 * 5
    with pytest.raises(ValueError, match=r"no M-FAC state"):
        mfac_jax.window_nbytes(optax.adam(0.1).init(params))


def test_compact_windows_without_a_table_warns():
    params = {"layers": [{"weight": jnp.ones((9, 2))}, {"weight": jnp.ones((2, 2))}]}
    opt = mfac_jax.mfac(0.1, 2, window=mfac_jax.compact_windows(3))
    with pytest.warns(UserWarning, match=r"'embedding.* \(layers/0/weight, layers/1"):
        state = opt.init(params)
    assert "indices" not in mfac_jax.window_table(state)
    window = mfac_jax.compact_windows({"layers/0/weight$": 3})
    state = mfac_jax.mfac(0.1, 2, window=window).init(params)
    assert mfac_jax.window_table(state).splitlines() == [
        "path             stored                                    bytes",
        "layers/0/weight  values float32[2,3,2] indices uint8[2,3]     54",
        "layers/1/weight  values float32[2,2,2]                        32",
    ]


def test_every_pattern_of_compact_windows_has_to_match():
    params = {"embedding": jnp.ones((9, 2)), "table": jnp.ones((9, 2))}
    window = mfac_jax.compact_windows({"embedding$": 3, "tabel$": 3})
    with pytest.warns(UserWarning, match=r"no path matches 'tabel\$'"):
        mfac_jax.mfac(0.1, 2, window=window).init(params)


def test_compact_windows_finds_tables_by_their_path():
    leaf = jax.ShapeDtypeStruct((10, 2), jnp.float32)
    window = mfac_jax.compact_windows(5, BF16)
    sparse, dense = mfac_jax.RowSparseWindow(5, BF16), mfac_jax.DenseWindow(BF16)
    assert window("bert/embeddings/word_embeddings/embedding", leaf) == sparse
    assert window("Embed_0/embedding", leaf) == sparse
    assert window("pos_embedding", leaf) == sparse
    assert window("bert/embeddings/LayerNorm/scale", leaf) == dense
    assert window("encoder/kernel", leaf) == dense
    window = mfac_jax.compact_windows({"word": 5, "embed": 2})
    assert window("word_embed", leaf) == mfac_jax.RowSparseWindow(5)
    assert window("embed", leaf) == mfac_jax.RowSparseWindow(2)
    assert window("kernel", leaf) == mfac_jax.DenseWindow()


@pytest.mark.parametrize(
    ("kind", "arguments", "error", "message"),
    [
        (
            "RowSparseWindow",
            {"max_rows": 0},
            ValueError,
            "max_rows .* at least 1, got 0",
        ),
        (
            "RowSparseWindow",
            {"max_rows": 2.0},
            TypeError,
            "max_rows .* integer, got 2.0",
        ),
        ("RowSparseWindow", {"max_rows": True}, TypeError, "integer, got True"),
        ("RowSparseWindow", {"max_rows": 1, "dtype": "int8"}, ValueError, "got int8"),
        ("Int8Window", {"block_size": 64}, ValueError, "at least 128, got 64"),
        ("Int8Window", {"block_size": "128"}, TypeError, "integer, got '128'"),
        ("TopKWindow", {"density": 0}, ValueError, "density .* above 0 .* got 0"),
        ("TopKWindow", {"density": 1.5}, ValueError, "density .* at most 1, got 1.5"),
        ("TopKWindow", {"density": "1%"}, TypeError, "density .* number, got '1%'"),
        ("TopKWindow", {"block_size": 0}, ValueError, "block_size .* got 0"),
        ("TopKWindow", {"dtype": "int8"}, ValueError, "TopKWindow dtype .* got int8"),
        ("compact_windows", {"max_rows": 0}, ValueError, "max_rows .* got 0"),
        ("compact_windows", {"max_rows": {"a": 1.5}}, TypeError, "max_rows .* got 1.5"),
    ],
)
def test_bad_specifications_are_rejected(kind, arguments, error, message):
    with pytest.raises(error, match=message):
        getattr(mfac_jax, kind)(**arguments)


@pytest.mark.parametrize("kind", ["row_sparse", "int8", "topk"])
@pytest.mark.parametrize("shape", [(), (9,), (9, 6), (2, 5), (300, 5)])
def test_gradients_of_another_shape_are_rejected(kind, shape):
    opt = mfac_jax.scale_by_mfac(2, window=KINDS[kind])
    state = opt.init({"table": jnp.zeros((9, 5))})
    with pytest.raises(ValueError, match=r"gradient of table .*expected .* got \("):
        opt.update({"table": jnp.zeros(shape)}, state)


@pytest.mark.parametrize("kind", ["row_sparse", "int8", "topk"])
@pytest.mark.eight_devices
def test_explicit_sharding_is_for_dense_windows(kind):
    mesh = jax.make_mesh((2,), ("x",), axis_types=(AxisType.Explicit,))
    opt = mfac_jax.scale_by_mfac(2, window=KINDS[kind])
    with jax.set_mesh(mesh):
        leaf = jax.device_put(jnp.ones((8, 5)), NamedSharding(mesh, PartitionSpec("x")))
        with pytest.raises(ValueError, match=r"table is sharded .*\.DenseWindow"):
            jax.jit(opt.init)({"table": leaf})


MASKS = {
    "none": None,
    "true": {"table": True, "bias": False},
    "prefix": True,
    "function": lambda params: jax.tree.map(lambda p: p.ndim > 1, params),
}


@pytest.mark.parametrize("mask", MASKS)
def test_coupled_decay_of_a_row_sparse_table_is_rejected(mask):
    params = {"table": jnp.ones((9, 2)), "bias": jnp.ones(2)}
    window = mfac_jax.RowSparseWindow(3)
    opt = mfac_jax.mfac(0.1, 2, weight_decay=0.01, mask=MASKS[mask], window=window)
    with pytest.raises(
        ValueError,
        match=r"table .*dense .*weight_decay 0.01,.* 3 of 9 rows.*add_decayed_weights",
    ):
        opt.init(params)


def test_decay_that_leaves_the_rows_alone_is_accepted():
    params = {"table": jnp.ones((9, 2)), "bias": jnp.ones(2)}
    window = mfac_jax.RowSparseWindow(3)
    spared = {"table": False, "bias": True}
    for arguments in [
        {"weight_decay": 0.0, "window": window},
        {"weight_decay": 0.01, "window": window, "mask": spared},
        {"weight_decay": 0.01, "window": mfac_jax.RowSparseWindow(9)},
        {"weight_decay": 0.01, "window": mfac_jax.TopKWindow()},
        # `init` cannot check a schedule.
        {"weight_decay": lambda _: 0.01, "window": window},
    ]:
        mfac_jax.mfac(0.1, 2, **arguments).init(params)
