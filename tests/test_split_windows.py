"""Tests windows split over eight devices against the same updates on one."""

import functools
import math
import re
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
import orbax.checkpoint as ocp
import pytest
from flax import nnx
from float8_window import Float8Window
from jax.sharding import AxisType, NamedSharding, PartitionSpec

import mfac_jax

pytestmark = [
    pytest.mark.usefixtures("quick_compilation"),
    pytest.mark.eight_devices,
]

P = PartitionSpec
NUM_GRADS = 24  # No leaf has an axis of this size, or of a device's share, 3 or 6.
# One leaf per kind, so that one program covers them all, and a small leaf.
KINDS = {
    "dense": None,
    "bf16": mfac_jax.DenseWindow(jnp.bfloat16),
    "int8": mfac_jax.Int8Window(),
    "row_sparse": mfac_jax.RowSparseWindow(8),
    "topk": mfac_jax.TopKWindow(0.1, block_size=1024),
    "float8": Float8Window(),
    "bias": None,
}
# These kinds store gradients unrounded, and their programs compile faster.
EXACT = ("dense", "row_sparse", "bias")
SHAPES = dict.fromkeys(KINDS, (64, 128)) | {"bias": (8,)}
OPTIMIZERS = {
    "mfac": functools.partial(mfac_jax.scale_by_mfac, NUM_GRADS, 1e-4),
    "adam_mfac": functools.partial(mfac_jax.scale_by_adam_mfac, NUM_GRADS),
}


def window_of(path, leaf):
    return KINDS[path]


def make_mesh(sizes, axis_type=AxisType.Auto):
    names = ("data", "model")[: len(sizes)]
    devices = jax.devices()[: math.prod(sizes)]
    return jax.make_mesh(sizes, names, (axis_type,) * len(sizes), devices=devices)


def tree_norm(tree):
    return math.sqrt(sum(np.sum(np.square(x, dtype=float)) for x in tree.values()))


def relative_error(found, expected):
    found = {path: np.asarray(x) for path, x in found.items()}
    expected = {path: np.asarray(x) for path, x in expected.items()}
    return max(
        np.linalg.norm(found[path] - x) / np.linalg.norm(x)
        for path, x in expected.items()
    )


@pytest.fixture(scope="module")
def gradients():
    """Returns one and a half windows of independent gradients, by step."""
    rng, steps = np.random.default_rng(0), []
    for _ in range(NUM_GRADS * 3 // 2):
        steps.append({k: np.float32(rng.normal(size=s)) for k, s in SHAPES.items()})
        zero = rng.permutation(SHAPES["row_sparse"][0])[8:]
        steps[-1]["row_sparse"][zero] = 0
    return steps


@pytest.fixture(scope="module")
def on_one_device(gradients):
    """Runs an optimizer on one device: gradients, updates and last state."""

    @functools.cache
    def run(name, kinds=tuple(KINDS)):
        opt = OPTIMIZERS[name](window=window_of)
        grads = [{kind: g[kind] for kind in kinds} for g in gradients]
        state, update = opt.init(grads[0]), jax.jit(opt.update)
        updates = []
        for g in grads:
            update_, state = update(g, state)
            updates.append(jax.tree.map(np.asarray, update_))
        return grads, updates, state

    return run


# Mesh sizes, axis type, spec of the parameters, window axis.
LAYOUTS = {
    "replicated": ((8,), AxisType.Auto, P(), "data"),
    "fsdp": ((8,), AxisType.Auto, P("data"), "data"),
    "columns": ((4, 2), AxisType.Auto, P(None, "model"), "data"),
    "rows": ((4, 2), AxisType.Auto, P("model", "data"), "data"),
    "two axes": ((4, 2), AxisType.Auto, P("model"), ("data", "model")),
    "explicit": ((8,), AxisType.Explicit, P(), "data"),
    "explicit fsdp": ((8,), AxisType.Explicit, P("data"), "data"),
    "explicit, one device": ((1,), AxisType.Explicit, P("data"), "data"),
    "explicit columns": ((4, 2), AxisType.Explicit, P(None, "model"), "data"),
}
CASES = [*(("mfac", layout) for layout in LAYOUTS), ("adam_mfac", "fsdp")]


@pytest.mark.parametrize(("name", "layout"), CASES)
def test_every_update_matches_one_device(on_one_device, name, layout):
    sizes, axis_type, spec, axis = LAYOUTS[layout]
    kinds = tuple(KINDS)
    if name == "adam_mfac":  # Rounding would amplify differences in the last bit.
        kinds = EXACT
    if layout == "explicit columns":  # Only dense windows support it.
        kinds = "dense", "bf16"
    grads, expected, last = on_one_device(name, kinds)
    mesh = make_mesh(sizes, axis_type)
    of_params = {
        kind: NamedSharding(mesh, P() if kind == "bias" else spec) for kind in kinds
    }
    opt = OPTIMIZERS[name](window=window_of, window_axis=axis)
    with jax.set_mesh(mesh):
        params = jax.device_put(grads[0], of_params)
        shardings = mfac_jax.state_shardings(opt, params, mesh, axis)
        state = jax.jit(opt.init, out_shardings=shardings)(params)
        update = jax.jit(opt.update, donate_argnums=1)
        for gradient, of_one in zip(grads, expected, strict=True):
            gradient = jax.device_put(gradient, of_params)
            found, state = update(gradient, state)
            assert relative_error(found, of_one) <= 2e-6
        shapes = jax.eval_shape(opt.update, gradient, state)[0]
    if axis_type == AxisType.Explicit:  # Only these types have a sharding.
        assert jax.tree.map(lambda x: x.sharding.spec, shapes) == jax.tree.map(
            lambda x: jax.typeof(x).sharding.spec, gradient
        )
    assert update._cache_size() == 1
    assert jax.tree.map(lambda x: x.sharding, state) == shardings
    state, last = (getattr(s, "mfac", s) for s in (state, last))
    assert state.num_raised == 0
    np.testing.assert_allclose(state.gram, last.gram, rtol=2e-6, atol=4e-3)
    # The devices along `axis` share the window.
    share = sum(
        x.addressable_shards[0].data.nbytes
        for path, stored in state.window.items()
        for name, x in stored._asdict().items()
        if x.ndim and name != "error"
    )
    errors = sum(s.error.nbytes for s in state.window.values() if hasattr(s, "error"))
    num_shares = math.prod(sizes) if isinstance(axis, tuple) else sizes[0]
    whole = mfac_jax.window_nbytes(state) - errors
    assert share <= whole / num_shares * 1.05


def test_inside_shard_map(on_one_device, gradients):
    """The scan needs one type of state: what varies over devices must keep varying."""
    mesh = make_mesh((8,))
    opt = OPTIMIZERS["mfac"](window=window_of, window_axis="data")

    def run(grads):
        def step(state, gradient):
            update, state = opt.update(gradient, state)
            return state, update

        return jax.lax.scan(step, opt.init(jax.tree.map(lambda x: x[0], grads)), grads)

    def mapped(grads):
        shardings = mfac_jax.state_shardings(opt, grads[0], mesh, "data")
        specs = jax.tree.map(lambda s: s.spec, shardings)
        stacked = jax.tree.map(lambda *x: jnp.stack(x), *grads)
        return jax.shard_map(run, in_specs=P(), out_specs=(specs, P())), stacked

    with jax.set_mesh(mesh):
        jax.eval_shape(*mapped(gradients))  # Checks the types of all kinds.
        grads, expected, last = on_one_device("mfac", EXACT)
        function, stacked = mapped(grads)
        state, found = jax.jit(function)(stacked)
        product = mfac_jax.inverse_fisher_vector_product(
            state, jax.tree.map(lambda x: x[0], stacked), 1.0, window_axis="data"
        )
    for i, of_one in enumerate(expected):
        assert relative_error({k: x[i] for k, x in found.items()}, of_one) <= 2e-6
    of_one = mfac_jax.inverse_fisher_vector_product(last, grads[0], 1.0)
    assert relative_error(product, of_one) <= 2e-6


def collectives(program):
    """Returns the shapes and bytes of the operands of all collectives."""
    names = "all-gather|all-reduce|reduce-scatter|all-to-all|collective-permute"
    shapes = {
        m[1]: [(kind, size) for kind, size in re.findall(r"(\w+)\[([\d,]*)\]", m[2])]
        for m in re.finditer(r"^\s*(?:ROOT )?(%\S+) = (.*?) [\w-]+\(", program, re.M)
    }
    operands = []
    for match in re.finditer(rf" (?:{names})(?:-start)?\(([^)]*)\)", program):
        for name in re.findall(r"%[\w.-]+", match[1]):
            operands += shapes[name]
    sizes = [tuple(int(n) for n in size.split(",") if n) for _, size in operands]
    itemsizes = {"pred": 1, "s8": 1, "u8": 1, "u16": 2, "f16": 2, "bf16": 2}
    nbytes = sum(
        itemsizes.get(kind, 4) * math.prod(size)
        for (kind, _), size in zip(operands, sizes, strict=True)
    )
    return sizes, nbytes


@pytest.mark.parametrize("path", ["cpu", "default"])
@pytest.mark.parametrize("layout", ["replicated", "fsdp", "rows"])
def test_no_window_is_communicated(monkeypatch, path, layout):
    """Only sums of gradients and products with the newest gradient are sent."""
    if path == "default":
        monkeypatch.setattr(
            jax.lax, "platform_dependent", lambda *args, cpu, default: default(*args)
        )
    sizes, axis_type, spec, axis = LAYOUTS[layout]
    mesh = make_mesh(sizes, axis_type)
    opt = OPTIMIZERS["mfac"](window=window_of, window_axis=axis)
    with jax.set_mesh(mesh):
        params = {
            kind: jax.ShapeDtypeStruct(
                shape,
                jnp.float32,
                sharding=NamedSharding(mesh, P() if kind == "bias" else spec),
            )
            for kind, shape in SHAPES.items()
        }
        shardings = mfac_jax.state_shardings(opt, params, mesh, axis)
        state = jax.tree.map(
            lambda x, s: x.update(sharding=s),
            jax.eval_shape(opt.init, params),
            shardings,
        )
        init = jax.jit(opt.init, out_shardings=shardings).lower(params).compile()
        of_params = jax.tree.map(lambda x: x.sharding, params)
        update = jax.jit(
            opt.update, donate_argnums=1, out_shardings=(of_params, shardings)
        )
        program = update.lower(params, state).compile()
    found, nbytes = collectives(program.as_text())
    of_params = 4 * sum(math.prod(shape) for shape in SHAPES.values())
    times = 1 if layout == "replicated" else 2
    assert nbytes <= times * of_params + 64 * NUM_GRADS + 4096
    num_rows = NUM_GRADS // sizes[0]
    for size in found:
        assert len(size) < 2 or size[0] not in (NUM_GRADS, num_rows)
        assert math.prod(size) != NUM_GRADS**2
    share = sum(
        math.prod(s.shard_shape(x.shape)) * x.dtype.itemsize
        for x, s in zip(jax.tree.leaves(state), jax.tree.leaves(shardings), strict=True)
    )
    assert init.memory_analysis().output_size_in_bytes <= 1.05 * share
    assert init.memory_analysis().temp_size_in_bytes <= of_params
    if path == "cpu":
        temporaries = program.memory_analysis().temp_size_in_bytes
        assert temporaries <= 3 * of_params + 0.05 * share


@pytest.mark.parametrize("num_devices", [1, 2, 4])
def test_a_checkpoint_moves_to_other_devices_and_back(
    on_one_device, tmp_path, num_devices
):
    gradients, _, last = on_one_device("mfac", EXACT)
    of_one = jax.jit(OPTIMIZERS["mfac"](window=window_of).update)
    opt = OPTIMIZERS["mfac"](window=window_of, window_axis="data")
    state = last
    for step, (saved_on, restored_on) in enumerate(
        [(8, num_devices), (num_devices, 8)]
    ):
        meshes = [make_mesh((n,)) for n in (saved_on, restored_on)]
        saved, restored = (
            mfac_jax.state_shardings(opt, gradients[0], mesh, "data") for mesh in meshes
        )
        shapes = jax.tree.map(
            lambda x, s: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=s),
            state,
            restored,
        )
        with ocp.StandardCheckpointer() as checkpointer:
            path = tmp_path / str(step)
            checkpointer.save(path, jax.device_put(state, saved))
            checkpointer.wait_until_finished()
            state = checkpointer.restore(path, shapes)
        with jax.set_mesh(meshes[1]):
            found, state = jax.jit(opt.update)(gradients[step], state)
        expected, last = of_one(gradients[step], last)
        assert relative_error(found, expected) <= 2e-6


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_nnx_needs_only_the_argument_and_the_mesh(name):
    """Passes no shardings: eager `init` places the share of each device."""
    alias = {"mfac": mfac_jax.mfac, "adam_mfac": mfac_jax.adam_mfac}[name]
    x = np.float32(np.random.default_rng(0).normal(size=(16, 8)))

    def train(axis):
        model = nnx.Linear(8, 8, rngs=nnx.Rngs(0))
        opt = nnx.Optimizer(model, alias(0.1, 16, window_axis=axis), wrt=nnx.Param)
        windows = [
            stored.values[...]
            for state in nnx_states(opt)
            for stored in state.window.values()
        ]

        @nnx.jit(donate_argnums=(0, 1))
        def step(model, opt):
            opt.update(model, nnx.grad(lambda m: jnp.mean(jnp.square(m(x))))(model))

        for _ in range(3):
            step(model, opt)
        windows += [
            stored.values[...]
            for state in nnx_states(opt)
            for stored in state.window.values()
        ]
        return np.asarray(model.kernel[...]), [w.sharding for w in windows]

    with jax.set_mesh(make_mesh((8,))):
        found, shardings = train("data")
    assert [s.spec[0] for s in shardings] == ["data"] * 4
    expected, _ = train(None)
    np.testing.assert_allclose(found, expected, rtol=1e-5, atol=1e-6)


def nnx_states(opt):
    return [
        node
        for node in jax.tree.leaves(
            opt.opt_state,
            is_leaf=lambda x: isinstance(x, mfac_jax.ScaleByMFACState),
        )
        if isinstance(node, mfac_jax.ScaleByMFACState)
    ]


def test_shardings_of_other_states():
    """Subtrees like the parameters are split like them, masked ones too."""
    mesh = make_mesh((4, 2))
    params = {
        "embedding": jax.ShapeDtypeStruct(
            (30, 4), jnp.float32, sharding=NamedSharding(mesh, P("model"))
        ),
        "kernel": jax.ShapeDtypeStruct(
            (4, 6), jnp.float32, sharding=NamedSharding(mesh, P("data", "model"))
        ),
        "bias": np.zeros(3, np.float32),
    }

    def shardings(opt):
        found = mfac_jax.state_shardings(opt, params, mesh, "data")
        with jax.set_mesh(mesh):
            shapes = jax.eval_shape(opt.init, params)
        # Neither another mesh in context nor an abstract mesh changes the result.
        with jax.set_mesh(make_mesh((2,))):
            planned = mfac_jax.state_shardings(opt, params, mesh.abstract_mesh, "data")
        assert jax.tree.map(lambda s: s.spec, planned) == jax.tree.map(
            lambda s: s.spec, found
        )
        assert jax.tree.structure(found) == jax.tree.structure(shapes)
        return jax.tree.map(lambda s: s.spec, found)

    specs = {"embedding": P("model"), "kernel": P("data", "model"), "bias": P()}
    compact = mfac_jax.compact_windows(5)
    inject = optax.inject_hyperparams(
        mfac_jax.mfac, static_args=("num_grads", "mask", "window")
    )
    found = shardings(
        inject(0.1, 8, momentum=0.9, window=compact, window_axis="data")
    ).inner_state
    assert found[2].average == specs
    assert found[1].gram == found[1].inverse == P()
    window = found[1].window
    assert window["embedding"] == (P("data"), P("data"), P())
    assert window["kernel"].values == P("data", None, "model")
    assert window["bias"].values == P("data")
    found = shardings(
        optax.chain(
            optax.clip_by_global_norm(1.0),
            optax.partition(
                {"words": optax.adamw(0.1), "rest": mfac_jax.adam_mfac(0.1, 8)},
                {"embedding": "words", "kernel": "rest", "bias": "rest"},
            ),
        )
    )[1].inner_states
    adam, ours = (found[k].inner_state[0] for k in ("words", "rest"))
    assert adam.mu["embedding"] == P("model")
    assert ours.nu["kernel"] == P("data", "model")
    assert ours.mfac.window["kernel"].values == P("data", None, "model")
    assert "embedding" not in ours.mfac.window
    assert shardings(optax.adamw(0.1))[0].mu == specs
    # Arrays whose shape differs from the parameter's are not split like it.
    factored = shardings(optax.adafactor(0.1, min_dim_size_to_factor=4))
    assert factored[0].v["kernel"] == factored[0].v_row["kernel"] == P()
    flat = shardings(optax.flatten(mfac_jax.scale_by_mfac(8)))
    assert flat.window[""].values == P("data")
    topk = shardings(mfac_jax.scale_by_mfac(8, window=mfac_jax.TopKWindow()))
    assert topk.window["kernel"] == (P("data"), P("data"), P())


class Rotated(NamedTuple):
    values: jax.Array
    rotation: jax.Array


class RotatedWindow(Float8Window):
    def init(self, leaf, num_grads):
        values = jnp.zeros((num_grads, *leaf.shape))
        return Rotated(values, jnp.eye(leaf.shape[-1]))


@pytest.mark.parametrize("axis_type", [AxisType.Auto, AxisType.Explicit])
def test_a_state_that_is_not_split_yet(gradients, axis_type):
    """The first update splits it. An empty leaf has no row to write."""
    mesh, of_nothing = make_mesh((8,), axis_type), np.zeros((0, 3), np.float32)
    grads = {"dense": gradients[0]["dense"], "bias": of_nothing}
    make = OPTIMIZERS["mfac"]
    _, state = make().update(grads, make().init(grads))
    state = jax.tree.map(np.asarray, state)
    opt = make(window_axis="data")
    of_one, _ = jax.jit(make().update)(grads, state)
    with jax.set_mesh(mesh):
        mfac_jax.state_shardings(opt, grads, mesh, "data")
        # `state_shardings` leaves nothing in JAX's caches.
        empty = jax.jit(opt.init)(grads)
        found, state = jax.jit(opt.update)(grads, state)
    for split in (empty, state):
        assert split.window["dense"].values.sharding.spec[0] == "data"
    del of_one["bias"]
    assert relative_error(found, of_one) <= 2e-6


def test_unsupported_splits_are_rejected():
    params = {"w": np.ones((4, 8), np.float32)}
    opt = mfac_jax.scale_by_mfac(12, window_axis="data")
    with pytest.raises(
        ValueError, match=r"window_axis 'data' needs a mesh: .*set_mesh"
    ):
        opt.init(params)
    mesh = make_mesh((8,))
    with jax.set_mesh(mesh):
        with pytest.raises(
            ValueError, match=r"multiple of the 8 .* got 12: take 8 or 16"
        ):
            opt.init(params)
        with pytest.raises(ValueError, match=r"multiple of the 8 .* got 5: take 8\."):
            mfac_jax.mfac(0.1, 5, window_axis="data").init(params)
        message = r"rotation in the window of w must hold 8 .* got 5\. List .*not_grad"
        rotated = mfac_jax.mfac(0.1, 8, window=RotatedWindow(), window_axis="data")
        with pytest.raises(ValueError, match=message):
            rotated.init({"w": np.ones((4, 5), np.float32)})
        with pytest.raises(ValueError, match=r"'model' is not an axis .* are 'data'\."):
            mfac_jax.adam_mfac(0.1, 8, window_axis="model").init(params)
    with pytest.raises(
        ValueError, match=r"multiple of the 8 devices of mesh axis 'data'"
    ):
        mfac_jax.state_shardings(mfac_jax.mfac(0.1, 12), params, mesh, "data")
    with pytest.raises(ValueError, match=r"axis 'x' is not an axis of the mesh"):
        mfac_jax.state_shardings(mfac_jax.mfac(0.1, 8), params, mesh, "x")

    for names in (["data"], ("data", "data"), (), 3):
        with pytest.raises(TypeError, match=r"window_axis must be the name of"):
            mfac_jax.mfac(0.1, 8, window_axis=names)
    mixed = (AxisType.Auto, AxisType.Explicit)
    with (
        jax.set_mesh(jax.make_mesh((4, 2), ("data", "model"), mixed)),
        pytest.raises(ValueError, match=r"all automatic or all explicit"),
    ):
        mfac_jax.mfac(0.1, 8, window_axis=("data", "model")).init(params)
    of_model = NamedSharding(make_mesh((4, 2)), P("model"))
    with pytest.raises(ValueError, match=r"w is split over 'model', .* not an axis"):
        mfac_jax.state_shardings(opt, jax.device_put(params, of_model), mesh, "data")

    # A split state is passed to an optimizer without `window_axis`.
    forgetful = mfac_jax.scale_by_mfac(8)
    specs = jax.tree.map(
        lambda s: s.spec, mfac_jax.state_shardings(forgetful, params, mesh, "data")
    )
    mapped = jax.shard_map(
        forgetful.update, mesh=mesh, in_specs=(P(), specs), out_specs=P()
    )
    message = r"values in the window of w must hold 8 gradients here, got 1\. .*axis"
    with pytest.raises(ValueError, match=message):
        mapped(params, forgetful.init(params))
    both = mfac_jax.scale_by_mfac(8, window_axis=("data", "model"))
    mapped = jax.shard_map(
        both.init,
        mesh=make_mesh((4, 2)),
        in_specs=P(),
        out_specs=P(),
        axis_names={"data"},
    )
    with pytest.raises(ValueError, match=r"map all of these axes or none.*\['data'\]"):
        jax.jit(mapped)(params)
    # Compact windows of leaves that are split over another explicit axis.
    mesh = make_mesh((4, 2), AxisType.Explicit)
    with jax.set_mesh(mesh):
        params = jax.device_put(params, NamedSharding(mesh, P(None, "model")))
        opt = mfac_jax.scale_by_mfac(
            8, window=mfac_jax.Int8Window(), window_axis="data"
        )
        with pytest.raises(ValueError, match=r"w is sharded over explicit mesh axes"):
            opt.init(params)
