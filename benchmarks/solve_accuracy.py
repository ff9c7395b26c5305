"""Measures the float32 error of a direction: ours and the paper's recursion.

    python benchmarks/solve_accuracy.py

Like the gradients of a network, these share a common component, half of each. Each
entry is the worst error relative to float64 over three windows. `raised` counts the
steps at which float32 could not resolve the damping and a larger one was used; their
error is measured with that larger damping.
"""

import argparse
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from tables import append_row

import mfac_jax

NUM_GRADS, SIZE = 64, 2_000


def gradients(norm: float) -> np.ndarray:
    """Returns three windows of gradients of this norm."""
    rng = np.random.default_rng(0)
    common, own = rng.normal(size=SIZE), rng.normal(size=(3 * NUM_GRADS, SIZE))
    rows = common + own
    rows *= norm / np.linalg.norm(rows, axis=1, keepdims=True)
    return rows.astype(np.float32)


def windows(rows: np.ndarray) -> Iterator[tuple[np.ndarray, int]]:
    """Yields the window after each gradient, and the row of the newest."""
    window = np.zeros((NUM_GRADS, SIZE), rows.dtype)
    for step, row in enumerate(rows):
        window[step % NUM_GRADS] = row
        yield window, step % NUM_GRADS


def exact_direction(window: np.ndarray, index: int, damp: float) -> np.ndarray:
    """Returns the direction in float64."""
    wide = window.astype(np.float64)
    system = wide @ wide.T + NUM_GRADS * damp * np.eye(NUM_GRADS)
    return NUM_GRADS * np.linalg.solve(system, np.eye(NUM_GRADS)[index]) @ wide


def recursive_direction(window: np.ndarray, index: int, damp: float) -> np.ndarray:
    """Returns the direction by the rank-one updates of the paper, in float32.

    With `x = F_{i-1}⁻¹ g_i` every product follows from the one before as
    `F_i⁻¹ y = F_{i-1}⁻¹ y - x (xᵀ y) / (m + g_iᵀ x)`.
    """
    products = window / np.float32(damp)
    for i in range(NUM_GRADS):
        newest = products[i].copy()
        pivot = np.float32(NUM_GRADS) + window[i] @ newest
        products -= np.outer(window @ newest / pivot, newest)
        products[i] = newest * (NUM_GRADS / pivot)
    return products[index]


def measure(norm: float, damp: float) -> dict[str, float]:
    """Returns the worst errors, and how often the damping was raised."""
    rows = gradients(norm)
    optimizer = mfac_jax.scale_by_mfac(NUM_GRADS, damp)
    state: Any = optimizer.init(jnp.zeros(SIZE))
    update = jax.jit(optimizer.update, donate_argnums=1)
    worst = {"ours": 0.0, "recursion": 0.0}

    def note(name: str, direction: np.ndarray, exact: np.ndarray) -> None:
        error = np.linalg.norm(direction - exact) / np.linalg.norm(exact)
        worst[name] = float(np.maximum(worst[name], error))

    for window, index in windows(rows):
        direction, state = update(jnp.asarray(window[index]), state)
        exact = exact_direction(window, index, float(state.damp))
        note("ours", np.asarray(direction), exact)
        asked = exact_direction(window, index, damp)
        note("recursion", recursive_direction(window, index, damp), asked)
    return {**worst, "raised": int(state.num_raised)}


def main() -> None:
    """Prints a row per norm and damping."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--output", type=Path, help="Append rows to this file.")
    args = parser.parse_args()
    print("| norm | damping | ours | recursion | raised |")
    print("| ---: " * 5 + "|")
    for norm in (0.01, 1.0, 100.0):
        for damp in (1e-8, 1e-6, 1e-4, 1e-2):
            found = measure(norm, damp)
            row = {"num_grads": NUM_GRADS, "norm": norm, "damp": damp, **found}
            append_row(args.output, row)
            print(
                f"| {norm:g} | {damp:g} | {found['ours']:.0e} | "
                f"{found['recursion']:.0e} | {found['raised']} |",
                flush=True,
            )


if __name__ == "__main__":
    main()
