"""Measures the memory of an optimizer's state and of an update.

    python benchmarks/memory.py

`temporaries` are the temporary buffers of the compiled, donated update, as XLA reports
them. `peak` is measured: how far the memory of a process rises while it initializes the
state and takes three updates. On a CPU this is the resident set, on a GPU the peak of
the allocator, which includes compilation. Each row runs in a process of its own. Prints
a table; `--output` appends each row to a file.
"""

import argparse
import multiprocessing
import re
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import optax
from step_time import CASES, LARGE, random_gradient
from tables import append_row

import mfac_jax

ROWS = ["adamw", *CASES]
ROWS_BY_DEFAULT = [name for name in ROWS if name not in LARGE]


def held_bytes() -> tuple[int, int]:
    """Returns current and peak memory of this process."""
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
    """Resets the peak of the resident set to its current size."""
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
    }


def main() -> None:
    """Prints each row of the table as soon as it is measured."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--cases", nargs="+", choices=ROWS, default=ROWS_BY_DEFAULT)
    parser.add_argument("--output", type=Path, help="Append rows to this file.")
    args = parser.parse_args()
    print("| optimizer | state | temporaries | peak |")
    print("| --- | ---: | ---: | ---: |")
    for name in args.cases:
        with ProcessPoolExecutor(1, multiprocessing.get_context("spawn")) as pool:
            found = pool.submit(measure, name).result()
            # In the same process, since this one must not start JAX's backend.
            pool.submit(append_row, args.output, {"optimizer": name, **found}).result()
        names = ("state_mb", "temporaries_mb", "peak_mb")
        columns = (f"{found[name]:,.0f} MB" for name in names)
        print(f"| {name} | {' | '.join(columns)} |", flush=True)


if __name__ == "__main__":
    main()
