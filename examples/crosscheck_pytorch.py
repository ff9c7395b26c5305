r"""Compares mfac_jax with the authors' PyTorch code, gradient by gradient.

    git clone https://github.com/IST-DASLab/M-FAC
    pip install torch
    python examples/crosscheck_pytorch.py --reference M-FAC

Trains a small network on scikit-learn's digits with M-FAC and feeds each of its
gradients to both programs, in float32 and float64. The table has the relative
differences from what the authors' code finds in float64. Ends with an error if ours
differs by more than float64, or float32, explains.
"""

import argparse
import contextlib
import importlib
import importlib.util
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

# Largest differences that rounding explains, for gradients such as these.
LIMITS = {"float64": 1e-8, "float32": 1e-3}


@contextlib.contextmanager
def published_code(directory: Path) -> Iterator[ModuleType]:
    """Yields the authors' `optim.py`, made to run on a CPU too.

    Raises:
      UserError: if it is not there, or torch is not.
    """
    try:
        torch = importlib.import_module("torch")
    except ImportError as error:
        raise UserError("the authors' code needs torch: pip install torch") from error
    file = directory / "optim.py"
    if not file.is_file():
        raise UserError(
            f"there is no {file}. --reference is a clone of "
            "https://github.com/IST-DASLab/M-FAC."
        )
    spec = importlib.util.spec_from_file_location("published_mfac", file)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)

    # Two functions of PyTorch that the authors' code calls are for GPUs alone.
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

    with contextlib.ExitStack() as stack:
        if not torch.cuda.is_available():
            for owner, name, substitute in (
                (torch, "lu", eliminate),
                (torch.nn.parallel, "parallel_apply", apply_each),
            ):
                stack.enter_context(mock.patch.object(owner, name, substitute))
        yield module


def gradients_of_digits(num_steps: int, num_grads: int, damp: float) -> np.ndarray:
    """Returns the gradients of a run of M-FAC, one a row, float32."""
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
    optimizer = mfac_jax.mfac(1e-3, num_grads, damp)

    def loss(params, images, labels):
        p = unravel(params)
        hidden = jnp.tanh(images @ p["hidden"] + p["hidden_bias"][None])
        logits = hidden @ p["output"] + p["output_bias"][None]
        return optax.losses.softmax_cross_entropy_with_integer_labels(
            logits, labels
        ).mean()

    def step(carry, batch):
        params, state = carry
        gradient = jax.grad(loss)(params, images[batch], labels[batch])
        updates, state = optimizer.update(gradient, state)
        return (optax.apply_updates(params, updates), state), gradient

    batches = np.random.default_rng(0).integers(len(images), size=(num_steps, 32))
    run = jax.jit(lambda carry: jax.lax.scan(step, carry, batches)[1])
    return np.asarray(run((params, optimizer.init(params))))


def our_directions(
    gradients: np.ndarray, num_grads: int, damp: float, dtype: str
) -> np.ndarray:
    """Returns the directions that mfac_jax finds."""
    optimizer = mfac_jax.scale_by_mfac(num_grads, damp)

    def step(state, gradient):
        direction, state = optimizer.update(gradient, state)
        return state, direction

    with jax.enable_x64(dtype == "float64"):
        rows = jnp.asarray(gradients, dtype)
        run = jax.jit(lambda rows: jax.lax.scan(step, optimizer.init(rows[0]), rows)[1])
        return np.asarray(run(rows), np.float64)


def their_directions(
    module: ModuleType, gradients: np.ndarray, num_grads: int, damp: float, dtype: str
) -> np.ndarray:
    """Returns the directions that the authors' code finds."""
    torch = module.torch
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    rows = torch.tensor(gradients, dtype=getattr(torch, dtype), device=device)
    window = torch.zeros((num_grads, rows.shape[1]), dtype=rows.dtype)
    inverse = module.HInvFastUpMulti(window, device, [device], damp)
    return np.stack([inverse.update_mul(row).cpu().double().numpy() for row in rows])


def main(argv: list[str] | None = None) -> None:
    """Prints the table.

    Raises:
      UserError: if the programs disagree.
    """
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--reference", type=Path, required=True, metavar="DIR")
    parser.add_argument(
        "--num_grads", type=int, default=64, help="A multiple of 32, at most 1024."
    )
    parser.add_argument("--damp", type=float, default=1e-6)
    parser.add_argument("--num_steps", type=int, default=200)
    args = parser.parse_args(argv)
    if args.num_grads % 32 or not 0 < args.num_grads <= 1024:
        raise UserError(
            "--num_grads must be a multiple of 32 and at most 1024, for the authors' "
            f"code, got {args.num_grads}."
        )
    settings = args.num_grads, args.damp
    gradients = gradients_of_digits(args.num_steps, *settings)
    with published_code(args.reference) as module:
        exact, published = (
            their_directions(module, gradients, *settings, dtype)
            for dtype in ("float64", "float32")
        )
    print("| | largest | median |\n| --- | ---: | ---: |")

    def compare(name: str, directions: np.ndarray) -> float:
        differences = np.linalg.norm(directions - exact, axis=1)
        differences /= np.linalg.norm(exact, axis=1)
        print(f"| {name} | {differences.max():.1e} | {np.median(differences):.1e} |")
        return float(differences.max())

    found = {
        dtype: compare(
            f"mfac_jax, {dtype}", our_directions(gradients, *settings, dtype)
        )
        for dtype in LIMITS
    }
    compare("the authors' code, float32", published)
    for dtype, limit in LIMITS.items():
        if not found[dtype] <= limit:
            raise UserError(
                f"directions in {dtype} differ by {found[dtype]:.1e} from those of the "
                f"authors' code; rounding explains {limit:.0e}."
            )


if __name__ == "__main__":
    run_script(main, "nothing was left to save.")
