"""Measures the time of one update relative to two reads of its window.

    python benchmarks/step_time.py

A step cannot be faster than two reads of the window. `ratio` is the time of an update
divided by the time of these reads, at the bandwidth of the bare products `G g` and
`c G` of a dense array, measured alternately with the update. `GB/s` is two window
sizes divided by the time of the update, and `of copy` its share of the bandwidth of a
copy. `adamw` is the time relative to `optax.adamw` on the same parameters. All times
are medians. Prints a table; `--output` appends each row to a file. `--traces` records
a few more updates for `kernels.py`.

    python benchmarks/step_time.py --devices 1 2 4 8

splits the window over devices and prints bytes per device and time. `window` and
`state` belong to the optimizer, `temporaries` to the compiled update. On a CPU the
devices share cores and memory, so splitting saves no time there.
"""

import argparse
import functools
import re
import statistics
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import kernels
import optax
from jax.sharding import NamedSharding, PartitionSpec
from tables import append_row

import mfac_jax

Shapes = Mapping[str, tuple[int, ...]]


def encoder_shapes(num_layers: int, hidden: int) -> dict[str, tuple[int, ...]]:
    """Returns the shapes of a BERT encoder with a classifier of two labels."""
    shapes: dict[str, tuple[int, ...]] = {
        "word_embeddings": (30_522, hidden),
        "position_embeddings": (512, hidden),
        "token_type_embeddings": (2, hidden),
        "embeddings_norm": (2, hidden),
        "pooler": (hidden + 1, hidden),
        "classifier": (hidden + 1, 2),
    }
    for i in range(num_layers):
        for name in ("query", "key", "value", "output"):
            shapes |= {f"{i}_{name}": (hidden, hidden), f"{i}_{name}_bias": (hidden,)}
        shapes |= {
            f"{i}_intermediate": (hidden, 4 * hidden),
            f"{i}_intermediate_bias": (4 * hidden,),
            f"{i}_out": (4 * hidden, hidden),
            f"{i}_out_bias": (hidden,),
        }
        shapes |= {f"{i}_{name}": (hidden,) for name in ("scale", "shift")}
        shapes |= {f"{i}_out_{name}": (hidden,) for name in ("scale", "shift")}
    return shapes


BERT_TINY = encoder_shapes(2, 128)
# Embedding rows that a batch of QQP touches: 32 pairs of up to 128 tokens.
TOUCHED = {"word_embeddings": 450, "position_embeddings": 128}


class Case(NamedTuple):
    """A window, its number of gradients and the parameters' shapes."""

    window: Any
    num_grads: int
    shapes: Shapes


# Up to 18 GB: for GPUs.
LARGE = [
    "dense, BERT-tiny, 1024",
    "dense bfloat16, BERT-tiny, 1024",
    "int8, BERT-tiny, 1024",
]
CASES = {
    "dense, 1 M": Case(None, 256, {"kernel": (7_812, 128)}),
    "dense, BERT-tiny": Case(None, 256, BERT_TINY),
    "dense, BERT-tiny, 1024": Case(None, 1024, BERT_TINY),
    "dense bfloat16, BERT-tiny": Case(
        mfac_jax.DenseWindow(jnp.bfloat16), 256, BERT_TINY
    ),
    "dense bfloat16, BERT-tiny, 1024": Case(
        mfac_jax.DenseWindow(jnp.bfloat16), 1024, BERT_TINY
    ),
    "int8, BERT-tiny": Case(mfac_jax.Int8Window(), 256, BERT_TINY),
    "int8, BERT-tiny, 1024": Case(mfac_jax.Int8Window(), 1024, BERT_TINY),
    "row-sparse, BERT-tiny": Case(mfac_jax.compact_windows(TOUCHED), 256, BERT_TINY),
    "row-sparse, BERT-tiny, 1024": Case(
        mfac_jax.compact_windows(TOUCHED), 1024, BERT_TINY
    ),
    "row-sparse bfloat16, BERT-tiny, 1024": Case(
        mfac_jax.compact_windows(TOUCHED, jnp.bfloat16), 1024, BERT_TINY
    ),
    "top-k 1 %, BERT-tiny, 1024": Case(mfac_jax.TopKWindow(0.01), 1024, BERT_TINY),
}

# For all cases with `--small`, which the tests use.
SMALL_SHAPES = {"word_embeddings": (500, 4), "position_embeddings": (130, 4)}
SMALL_NUM_GRADS = 8


def seconds_of(call: Callable[[], object]) -> float:
    """Returns the seconds of a call, including the device's work."""
    start = time.perf_counter()
    jax.block_until_ready(call())
    return time.perf_counter() - start


def best_time(call: Callable[[], object], repeats: int) -> float:
    """Returns the shortest of ``repeats`` times, in seconds, after one warm-up."""
    return min([seconds_of(call) for _ in range(repeats + 1)][1:])


@functools.partial(jax.jit, static_argnums=1)
def random_gradient(key: jax.Array, shapes: tuple[tuple[str, tuple[int, ...]], ...]):
    """Returns a gradient of norm 1, zero in the rows that a batch does not touch."""
    leaves = {}
    for i, (name, shape) in enumerate(shapes):
        leaf_key, row_key = jax.random.split(jax.random.fold_in(key, i))
        leaf = jax.random.normal(leaf_key, shape)
        if name in TOUCHED:
            order = jax.random.permutation(row_key, shape[0])
            leaf = jnp.where(order[:, None] < TOUCHED[name], leaf, 0)
        leaves[name] = leaf
    norm = optax.tree.norm(leaves)
    return jax.tree.map(lambda leaf: leaf / norm, leaves)


def make_passes(size: int) -> tuple[Callable[[], Any], Callable[[], Any], int]:
    """Returns two products with 256 rows, a copy, and the bytes that each moves."""
    window = jax.random.normal(jax.random.key(0), (256, size))
    vector, coefficients = jnp.ones(window.shape[1]), jnp.ones(window.shape[0])

    @jax.jit
    def products(window, vector, coefficients):
        first = jnp.matmul(window, vector, precision="highest")
        # The dependency keeps XLA from fusing both into one pass.
        second = jnp.matmul(coefficients + 0 * first, window, precision="highest")
        return first, second

    copy = jax.jit(jnp.copy)
    return (
        lambda: products(window, vector, coefficients),
        lambda: copy(window),
        2 * window.nbytes,
    )


def measure(
    case: Case,
    products: Callable[[], Any],
    products_nbytes: int,
    repeats: int,
    trace: Path | None = None,
) -> dict[str, float]:
    """Measures the update of a case, with a new gradient each time.

    Repeating a gradient would raise the damping, which takes longer than a usual step.
    """
    params = {name: jnp.zeros(shape) for name, shape in case.shapes.items()}
    shapes = tuple(case.shapes.items())

    def time_of(optimizer: Any, trace: Path | None = None) -> tuple[float, float, Any]:
        """Returns the seconds of an update and of the two products, and the state."""
        update = jax.jit(optimizer.update, donate_argnums=1)
        state = jax.jit(optimizer.init)(params)
        update_seconds, product_seconds = [], []
        # All beforehand, because generating one runs kernels too.
        num_gradients = repeats + 2 + kernels.NUM_TRACED
        keys = map(jax.random.key, range(num_gradients))
        gradients = [random_gradient(key, shapes) for key in keys]
        jax.block_until_ready((gradients, state))
        for gradient in gradients[: repeats + 2]:
            start = time.perf_counter()
            updates, state = jax.block_until_ready(update(gradient, state, params))
            update_seconds.append(time.perf_counter() - start)
            del updates
            product_seconds.append(seconds_of(products))
        if trace is not None:
            with kernels.recorded(trace):
                for gradient in gradients[repeats + 2 :]:
                    _, state = jax.block_until_ready(update(gradient, state, params))
        warm = slice(2, None)
        return (
            statistics.median(update_seconds[warm]),
            statistics.median(product_seconds[warm]),
            state,
        )

    adamw, _, _ = time_of(optax.adamw(1e-4))
    optimizer = mfac_jax.scale_by_mfac(case.num_grads, window=case.window)
    step, two_reads, state = time_of(optimizer, trace)
    assert state.num_raised == 0, "the damping was raised"
    nbytes = mfac_jax.window_nbytes(state)
    return {
        "num_grads": case.num_grads,
        "window_mb": nbytes / 1e6,
        "update_ms": 1e3 * step,
        "products_gb_per_s": products_nbytes / two_reads / 1e9,
        "ratio": step / (two_reads * 2 * nbytes / products_nbytes),
        "gb_per_s": 2 * nbytes / step / 1e9,
        "ratio_to_adamw": step / adamw,
    }


def measure_split(case: Case, num_devices: int, repeats: int) -> dict[str, float]:
    """Measures the update of a case whose window is split over devices."""
    mesh = jax.make_mesh((num_devices,), ("data",), devices=jax.devices()[:num_devices])
    everywhere = NamedSharding(mesh, PartitionSpec())
    optimizer = mfac_jax.scale_by_mfac(
        case.num_grads, window=case.window, window_axis="data"
    )
    with jax.set_mesh(mesh):
        params = {
            name: jnp.zeros(shape, device=everywhere)
            for name, shape in case.shapes.items()
        }
        shardings = mfac_jax.state_shardings(optimizer, params, mesh, "data")
        state = jax.jit(optimizer.init, out_shardings=shardings)(params)
        update = jax.jit(
            optimizer.update, donate_argnums=1, out_shardings=(everywhere, shardings)
        )
        keys = map(jax.random.key, range(repeats + 2))
        gradients = [random_gradient(key, tuple(case.shapes.items())) for key in keys]
        gradients = jax.block_until_ready(jax.device_put(gradients, everywhere))
        compiled: Any = update.lower(gradients[0], state).compile()
        seconds = []
        for gradient in gradients:
            start = time.perf_counter()
            _, state = jax.block_until_ready(compiled(gradient, state))
            seconds.append(time.perf_counter() - start)
    assert state.num_raised == 0, "the damping was raised"

    def own_bytes(tree: Any) -> int:
        return sum(x.addressable_data(0).nbytes for x in jax.tree.leaves(tree))

    return {
        "num_grads": case.num_grads,
        "devices": num_devices,
        "window_mb": own_bytes(state.window) / 1e6,
        "state_mb": own_bytes(state) / 1e6,
        "temporaries_mb": compiled.memory_analysis().temp_size_in_bytes / 1e6,
        "update_ms": 1e3 * statistics.median(seconds[2:]),
    }


def print_split(args: argparse.Namespace) -> None:
    """Prints the table for `--devices`."""
    jax.config.update("jax_num_cpu_devices", max(args.devices))
    titles = ["window", "m", "devices", "window", "state", "temporaries", "ms"]
    print("| " + " | ".join(titles) + " |\n| --- |" + " ---: |" * 6)
    for name in args.cases:
        for num_devices in args.devices:
            found = measure_split(case_of(name, args.small), num_devices, args.repeats)
            print(
                f"| {name} | {found['num_grads']} | {num_devices} | "
                f"{found['window_mb']:,.1f} MB | {found['state_mb']:,.1f} MB | "
                f"{found['temporaries_mb']:,.1f} MB | {found['update_ms']:.1f} |",
                flush=True,
            )
            append_row(args.output, {"window": name, **found})


def case_of(name: str, small: bool) -> Case:
    """Returns a case, with tiny shapes if `small`."""
    case = CASES[name]
    if not small:
        return case
    return case._replace(num_grads=SMALL_NUM_GRADS, shapes=SMALL_SHAPES)


def main() -> None:
    """Prints each row of the table as soon as it is measured."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "--cases",
        nargs="+",
        choices=CASES,
        default=[name for name in CASES if name not in LARGE],
    )
    parser.add_argument("--devices", type=int, nargs="+", metavar="N")
    parser.add_argument("--repeats", type=int, default=12)
    parser.add_argument("--small", action="store_true", help="Tiny shapes, as a test.")
    parser.add_argument(
        "--traces", type=Path, metavar="DIR", help="Record traces there."
    )
    parser.add_argument("--output", type=Path, help="Append rows to this file.")
    args = parser.parse_args()
    if args.devices:
        print_split(args)
        return
    products, copy, nbytes = make_passes(1_000 if args.small else 999_936)
    copied = nbytes / best_time(copy, 4) / 1e9
    print(f"A copy moves {copied:.1f} GB/s.\n")
    titles = ["window", "m", "MB", "ms", "ratio", "GB/s", "of copy", "adamw"]
    print("| " + " | ".join(titles) + " |\n| --- |" + " ---: |" * 7)
    for name in args.cases:
        trace = None
        if args.traces is not None:
            trace = args.traces / f"{re.sub(r'[^a-z0-9]+', '-', name.lower())}.pb"
        case = case_of(name, args.small)
        found = measure(case, products, nbytes, args.repeats, trace)
        print(
            f"| {name} | {found['num_grads']} | {found['window_mb']:,.0f} | "
            f"{found['update_ms']:.2f} | {found['ratio']:.2f} | "
            f"{found['gb_per_s']:.1f} | {found['gb_per_s'] / copied:.0%} | "
            f"{found['ratio_to_adamw']:.1f} |",
            flush=True,
        )
        row = {"window": name, **found, "copy_gb_per_s": copied}
        append_row(args.output, row)


if __name__ == "__main__":
    main()
