"""Measures the time of the solve with an updated inverse and by factorization.

    python benchmarks/solve_time.py

`updated` is the usual case: the previous step's inverse is updated. `recomputed`
factorizes and inverts the matrix from scratch. `factorized` is the factorization and
the refined solution alone, the cost of a step that keeps no inverse.
"""

import argparse
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
from step_time import best_time
from tables import append_row

from mfac_jax import _solve

DAMP = 1e-6


def measure(num_grads: int, repeats: int) -> dict[str, float]:
    """Returns milliseconds for independent gradients of norm 1."""
    rows = np.random.default_rng(0).normal(size=(num_grads, 3 * num_grads))
    rows /= np.linalg.norm(rows, axis=1, keepdims=True)
    gram = rows @ rows.T
    exact = np.linalg.inv(gram + num_grads * DAMP * np.eye(num_grads))
    gram, inverse = jnp.asarray(gram, jnp.float32), jnp.asarray(exact, jnp.float32)
    index, damp = jnp.int32(3), jnp.float32(DAMP)
    solve, unit = jax.jit(_solve.solve_for_row), jax.nn.one_hot(index, num_grads)
    factorized = jax.jit(_solve.damped_solve)
    useless = jnp.zeros_like(inverse)
    calls = {
        "updated_ms": lambda: solve(gram, inverse, index, damp),
        "recomputed_ms": lambda: solve(gram, useless, index, damp),
        "factorized_ms": lambda: factorized(gram, damp, unit),
    }
    return {name: 1e3 * best_time(call, repeats) for name, call in calls.items()}


def main() -> None:
    """Prints a row per number of gradients."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--num_grads", type=int, nargs="+", default=[256, 1024, 2048])
    parser.add_argument("--repeats", type=int, default=10)
    parser.add_argument("--output", type=Path, help="Append rows to this file.")
    args = parser.parse_args()
    print("| num_grads | updated | recomputed | factorized |")
    print("| ---: " * 4 + "|")
    for num_grads in args.num_grads:
        found = measure(num_grads, args.repeats)
        cells = [f"{milliseconds:.1f} ms" for milliseconds in found.values()]
        print(f"| {num_grads} | {' | '.join(cells)} |", flush=True)
        append_row(args.output, {"num_grads": num_grads, **found})


if __name__ == "__main__":
    main()
