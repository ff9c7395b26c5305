"""Time of the solve: from the inverse of the step before, and by factorization.

    python benchmarks/solve_time.py

`updated` is what a step usually costs; `computed again` is one whose matrix has to be
factorized and inverted from scratch; `factorized` is the factorization and the refined
solution alone, which is what a step would cost without keeping an inverse.
"""

import argparse
import json
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
from step_time import best_time, environment

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
        "computed_again_ms": lambda: solve(gram, useless, index, damp),
        "factorized_ms": lambda: factorized(gram, damp, unit),
    }
    return {name: 1e3 * best_time(call, repeats) for name, call in calls.items()}


def main() -> None:
    """Prints a table by the number of gradients."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--num_grads", type=int, nargs="+", default=[256, 1024, 2048])
    parser.add_argument("--repeats", type=int, default=10)
    parser.add_argument("--output", type=Path, help="Where to write the JSON.")
    args = parser.parse_args()
    print("| num_grads | updated | computed again | factorized |")
    print("| ---: " * 4 + "|")
    results = {}
    for num_grads in args.num_grads:
        found = results[num_grads] = measure(num_grads, args.repeats)
        cells = [f"{milliseconds:.1f} ms" for milliseconds in found.values()]
        print(f"| {num_grads} | {' | '.join(cells)} |", flush=True)
    if args.output is not None:
        content = {**environment(), "results": results}
        args.output.write_text(json.dumps(content, indent=2) + "\n")


if __name__ == "__main__":
    main()
