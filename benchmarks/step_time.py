"""Time of one update, as a ratio to two reads of its window.

    python benchmarks/step_time.py

A step cannot be faster than two reads of the window. `ratio` is its time over theirs:
that of the bare products `G g` and `c G` of a dense array, which are run by turns with
the update, per byte. `GB/s` are those two reads over the time of the update, `of copy`
is their share of what a copy moves. `adamw` is the time over that of `optax.adamw`'s
step on the same parameters. Medians; prints a table, and with `--output` writes it as
JSON, row by row, with the device, the versions and the commit. With `--traces` what the
device did in some more updates is recorded for `kernels.py`.

    python benchmarks/step_time.py --devices 1 2 4 8

splits the window over so many devices and prints bytes per device next to the time;
`window` and `state` are the optimizer's, `temporaries` those of the compiled update. A
CPU shows eight devices that share its cores and its memory: only real ones are faster.
"""

import argparse
import functools
import json
import platform
import re
import shutil
import statistics
import subprocess
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import kernels
import optax
from jax.sharding import NamedSharding, PartitionSpec

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
# Rows of the tables that a batch of QQP touches: 32 pairs of up to 128 tokens.
TOUCHED = {"word_embeddings": 450, "position_embeddings": 128}


class Case(NamedTuple):
    """What is measured."""

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

# With `--small` every case has these, so that a test runs the script in no time.
SMALL_SHAPES = {"word_embeddings": (500, 4), "position_embeddings": (130, 4)}
SMALL_NUM_GRADS = 8


def seconds_of(call: Callable[[], object]) -> float:
    """Returns the seconds of a call, with the device's work."""
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
    """Returns the two products of 256 rows, a copy, and the bytes that either moves."""
    window = jax.random.normal(jax.random.key(0), (256, size))
    vector, coefficients = jnp.ones(window.shape[1]), jnp.ones(window.shape[0])

    @jax.jit
    def products(window, vector, coefficients):
        first = jnp.matmul(window, vector, precision="highest")
        # Not both in one pass.
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

    The same gradient again would raise the damping, and what a step of a healthy window
    costs would not be seen.
    """
    params = {name: jnp.zeros(shape) for name, shape in case.shapes.items()}
    shapes = tuple(case.shapes.items())

    def time_of(optimizer: Any, trace: Path | None = None) -> tuple[float, float, Any]:
        """Returns the seconds of an update and of the two products, and the state."""
        update = jax.jit(optimizer.update, donate_argnums=1)
        state = jax.jit(optimizer.init)(params)
        update_seconds, product_seconds = [], []
        # All beforehand: to make one takes kernels too.
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
    """Prints the table of `--devices`."""
    jax.config.update("jax_num_cpu_devices", max(args.devices))
    titles = ["window", "m", "devices", "window", "state", "temporaries", "ms"]
    print("| " + " | ".join(titles) + " |\n| --- |" + " ---: |" * 6)
    results = []
    for name in args.cases:
        for num_devices in args.devices:
            found = measure_split(case_of(name, args.small), num_devices, args.repeats)
            print(
                f"| {name} | {found['num_grads']} | {num_devices} | "
                f"{found['window_mb']:,.1f} MB | {found['state_mb']:,.1f} MB | "
                f"{found['temporaries_mb']:,.1f} MB | {found['update_ms']:.1f} |",
                flush=True,
            )
            results.append({"window": name, **found})
            write_results(args.output, {"results": results})


def case_of(name: str, small: bool) -> Case:
    """Returns a case, with tiny shapes for a trial."""
    case = CASES[name]
    if not small:
        return case
    return case._replace(num_grads=SMALL_NUM_GRADS, shapes=SMALL_SHAPES)


def write_results(path: Path | None, content: Mapping[str, Any]) -> None:
    """Writes what has been measured so far."""
    if path is not None:
        path.write_text(json.dumps({**environment(), **content}, indent=2) + "\n")


def environment() -> dict[str, str]:
    """Returns device, versions and commit."""
    commit = ""
    if shutil.which("git"):
        command = ["git", "describe", "--always", "--dirty"]
        commit = subprocess.run(
            command, cwd=Path(__file__).parent, capture_output=True, text=True
        ).stdout.strip()
    return {
        "device": jax.devices()[0].device_kind,
        "jax": jax.__version__,
        "python": platform.python_version(),
        "commit": commit,
    }


def main() -> None:
    """Prints the table, a row when it is measured."""
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
    parser.add_argument("--small", action="store_true", help="Tiny shapes: a trial.")
    parser.add_argument("--traces", type=Path, metavar="DIR", help="Where to put them.")
    parser.add_argument("--output", type=Path, help="Where to write the JSON.")
    args = parser.parse_args()
    if args.devices:
        print_split(args)
        return
    products, copy, nbytes = make_passes(1_000 if args.small else 999_936)
    copied = nbytes / best_time(copy, 4) / 1e9
    print(f"A copy moves {copied:.1f} GB/s.\n")
    titles = ["window", "m", "MB", "ms", "ratio", "GB/s", "of copy", "adamw"]
    print("| " + " | ".join(titles) + " |\n| --- |" + " ---: |" * 7)
    results = {}
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
        results[name] = found
        write_results(args.output, {"copy_gb_per_s": copied, "results": results})


if __name__ == "__main__":
    main()
