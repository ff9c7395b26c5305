r"""Compares mfac_jax with the authors' PyTorch code, gradient by gradient.

    git clone https://github.com/IST-DASLab/M-FAC
    pip install torch
    python examples/crosscheck_pytorch.py --reference M-FAC

Trains a small network on scikit-learn's digits with M-FAC and feeds each gradient to
both implementations, in float32 and float64. Prints the relative differences from the
authors' code in float64. Exits with an error if mfac_jax differs by more than rounding
explains.
"""

import argparse
import contextlib
import importlib.machinery
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType
from typing import Any
from unittest import mock

import jax
import jax.numpy as jnp
import numpy as np
import optax
from bert_finetune.cli import run_script
from bert_finetune.errors import UserError
from jax.flatten_util import ravel_pytree
from sklearn.datasets import load_digits

import mfac_jax

# The authors' code requires num_grads to be a multiple of 32, at most 1024.
NUM_GRADS, DAMP, NUM_STEPS = 64, 1e-6, 200
# Largest differences that rounding explains for these gradients.
LIMITS = {"mfac_jax, float64": 1e-8, "mfac_jax, float32": 1e-3}


@contextlib.contextmanager
def published_code(directory: Path) -> Iterator[ModuleType]:
    """Yields the authors' `optim.py`, patched to run without a GPU if there is none."""
    file = directory / "optim.py"
    loader = importlib.machinery.SourceFileLoader("published_mfac", str(file))
    module = ModuleType(loader.name)
    try:
        loader.exec_module(module)
    except FileNotFoundError as error:
        raise UserError(
            f"there is no {file}: --reference must be a clone of "
            "https://github.com/IST-DASLab/M-FAC."
        ) from error
    except ImportError as error:
        raise UserError("the authors' code needs torch: pip install torch") from error
    torch = module.torch
    if torch.cuda.is_available():
        yield module
        return

    # The authors' code calls two PyTorch functions that work only on GPUs.
    def eliminate(matrix: Any, pivot: bool) -> tuple[Any, None]:
        assert not pivot
        factors = matrix.clone()
        for i in range(len(factors) - 1):
            column, row = factors[i + 1 :, i], factors[i, i + 1 :]
            column /= factors[i, i].clone()
            factors[i + 1 :, i + 1 :] -= torch.outer(column, row)
        return factors, None

    def apply_each(functions: Any, inputs: Any) -> list[Any]:
        return [f(x) for f, x in zip(functions, inputs, strict=True)]

    with (
        mock.patch.object(torch, "lu", eliminate),
        mock.patch.object(torch.nn.parallel, "parallel_apply", apply_each),
    ):
        yield module


def gradients_of_digits() -> np.ndarray:
    """Returns the float32 gradients of an M-FAC run, one per row."""
    pixels, labels = map(jnp.asarray, load_digits(return_X_y=True))
    images = pixels.astype(jnp.float32) / 16
    keys = jax.random.split(jax.random.key(0))
    params, unravel = ravel_pytree(
        {
            "hidden": jax.random.normal(keys[0], (64, 32)) / 8,
            "hidden_bias": jnp.zeros(32),
            "output": jax.random.normal(keys[1], (32, 10)) / 6,
            "output_bias": jnp.zeros(10),
        }
    )
    optimizer = mfac_jax.mfac(1e-3, NUM_GRADS, DAMP)

    def loss(params, images, labels):
        p = unravel(params)
        hidden = jnp.tanh(images @ p["hidden"] + p["hidden_bias"][None])
        logits = hidden @ p["output"] + p["output_bias"][None]
        losses = optax.losses.softmax_cross_entropy_with_integer_labels(logits, labels)
        return losses.mean()

    def step(carry, batch):
        params, state = carry
        gradient = jax.grad(loss)(params, images[batch], labels[batch])
        updates, state = optimizer.update(gradient, state)
        return (optax.apply_updates(params, updates), state), gradient

    batches = np.random.default_rng(0).integers(len(images), size=(NUM_STEPS, 32))
    _, gradients = jax.lax.scan(step, (params, optimizer.init(params)), batches)
    return np.asarray(gradients)


def our_directions(gradients: np.ndarray, dtype: str) -> np.ndarray:
    """Returns mfac_jax's directions for these gradients."""
    optimizer = mfac_jax.scale_by_mfac(NUM_GRADS, DAMP)

    def step(state, gradient):
        direction, state = optimizer.update(gradient, state)
        return state, direction

    with jax.enable_x64(dtype == "float64"):
        rows = jnp.asarray(gradients, dtype)
        _, directions = jax.lax.scan(step, optimizer.init(rows[0]), rows)
        return np.asarray(directions, np.float64)


def their_directions(
    module: ModuleType, gradients: np.ndarray, dtype: str
) -> np.ndarray:
    """Returns the directions of the authors' code for these gradients."""
    torch = module.torch
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    rows = torch.tensor(gradients, dtype=getattr(torch, dtype), device=device)
    window = torch.zeros((NUM_GRADS, rows.shape[1]), dtype=rows.dtype)
    inverse = module.HInvFastUpMulti(window, device, [device], DAMP)
    return np.stack([inverse.update_mul(row).cpu().double().numpy() for row in rows])


def main(argv: list[str] | None = None) -> None:
    """Prints the table; raises if the implementations disagree."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--reference", type=Path, required=True, metavar="DIR")
    args = parser.parse_args(argv)
    gradients = gradients_of_digits()
    with published_code(args.reference) as module:
        exact = their_directions(module, gradients, "float64")
        published = their_directions(module, gradients, "float32")
    found = {
        "mfac_jax, float64": our_directions(gradients, "float64"),
        "mfac_jax, float32": our_directions(gradients, "float32"),
        "the authors' code, float32": published,
    }
    too_large = []
    print("| | largest | median |\n| --- | ---: | ---: |")
    for name, directions in found.items():
        differences = np.linalg.norm(directions - exact, axis=1)
        differences /= np.linalg.norm(exact, axis=1)
        print(f"| {name} | {differences.max():.1e} | {np.median(differences):.1e} |")
        if name in LIMITS and not differences.max() <= LIMITS[name]:
            by = f"{differences.max():.1e} (rounding explains {LIMITS[name]:.0e})"
            too_large.append(f"{name} by {by}")
    if too_large:
        raise UserError(f"directions differ from the authors': {'; '.join(too_large)}.")


if __name__ == "__main__":
    run_script(main, "there was nothing to save.")
