"""Memory of an optimizer: what its state holds, and what an update needs beside it.

    python benchmarks/memory.py

`temporaries` are those of the compiled, donated update, by XLA's own account. `peak` is
measured: how far the memory of a process that initialises the state and takes three
updates rises above what it held before, on a CPU by the resident set, on a GPU by the
allocator, whose peak may be that of the compilation. Each row has a process of its own.
Prints a table, and with `--output` writes it as JSON.
"""

import argparse
import json
import multiprocessing
import re
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import optax
from step_time import CASES, LARGE, environment, random_gradient

import mfac_jax

ROWS = ["adamw", *CASES]
ROWS_BY_DEFAULT = [name for name in ROWS if name not in LARGE]


def held_bytes() -> tuple[int, int]:
    """Returns the memory that this process holds, and the most that it has held."""
    statistics = jax.devices()[0].memory_stats()
    if statistics is not None:
        return statistics["bytes_in_use"], statistics["peak_bytes_in_use"]
    status = Path("/proc/self/status").read_text()
    now, most = (
        1024 * int(re.findall(rf"{name}:\s*(\d+) kB", status)[0])
        for name in ("VmRSS", "VmHWM")
    )
    return now, most


def forget_peak() -> None:
    """Lets a CPU's peak begin anew, at what is held now."""
    Path("/proc/self/clear_refs").write_text("5")


def measure(name: str) -> dict[str, Any]:
    """Measures one row."""
    case = CASES[name if name in CASES else "row-sparse, BERT-tiny"]
    params = {key: jnp.zeros(shape) for key, shape in case.shapes.items()}
    optimizer: Any = optax.adamw(1e-4)
    if name in CASES:
        optimizer = mfac_jax.scale_by_mfac(case.num_grads, window=case.window)
    init = jax.jit(optimizer.init).lower(params).compile()
    state: Any = jax.eval_shape(optimizer.init, params)
    update = jax.jit(optimizer.update, donate_argnums=1)
    update = update.lower(params, state, params).compile()
    analysis: Any = update.memory_analysis()
    shapes = tuple(case.shapes.items())
    updates = jax.block_until_ready(random_gradient(jax.random.key(0), shapes))
    forget_peak()
    before, _ = held_bytes()
    state = jax.block_until_ready(init(params))
    for i in range(3):
        gradient = random_gradient(jax.random.key(i), shapes)
        updates, state = jax.block_until_ready(update(gradient, state, params))
    del updates
    peak = held_bytes()[1] - before
    return {
        "num_grads": case.num_grads if name in CASES else None,
        "parameters_mb": sum(x.nbytes for x in params.values()) / 1e6,
        "window_mb": mfac_jax.window_nbytes(state) / 1e6 if name in CASES else None,
        "state_mb": sum(x.nbytes for x in jax.tree.leaves(state)) / 1e6,
        "temporaries_mb": analysis.temp_size_in_bytes / 1e6,
        "peak_mb": peak / 1e6,
        "environment": environment(),
    }


def main() -> None:
    """Prints the table, a row when it is measured."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--cases", nargs="+", choices=ROWS, default=ROWS_BY_DEFAULT)
    parser.add_argument("--output", type=Path, help="Where to write the JSON.")
    args = parser.parse_args()
    print("| optimizer | state | temporaries | peak |")
    print("| --- | ---: | ---: | ---: |")
    results, content = {}, {}
    for name in args.cases:
        with ProcessPoolExecutor(1, multiprocessing.get_context("spawn")) as pool:
            results[name] = pool.submit(measure, name).result()
        content = results[name].pop("environment")
        columns = (
            f"{results[name][c]:,.0f} MB" for c in ("state_mb", "temporaries_mb")
        )
        print(
            f"| {name} | {' | '.join(columns)} | {results[name]['peak_mb']:,.0f} MB |"
        )
    if args.output is not None:
        content = {**content, "results": results}
        args.output.write_text(json.dumps(content, indent=2) + "\n")


if __name__ == "__main__":
    main()
