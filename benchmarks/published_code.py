r"""Compares the time of an update with the authors' PyTorch optimizer.

    git clone https://github.com/IST-DASLab/M-FAC
    pip install torch
    python benchmarks/published_code.py --reference M-FAC

Both run in one process and get the same number of gradients of BERT-tiny's shapes, on
the same device: a GPU if both find one. The authors' CUDA kernels are used if they are
installed. Ratios are meaningful on a GPU only: on a CPU, a substitute replaces an
elimination that PyTorch implements for GPUs alone. Prints a table; `--output` appends
each row to a file.
"""

import argparse
import os
import time
from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import Any

# Both frameworks must fit on the device.
os.environ.setdefault("XLA_PYTHON_CLIENT_PREALLOCATE", "false")

import jax
import jax.numpy as jnp
from bert_finetune.cli import run_script
from crosscheck_pytorch import published_code
from step_time import BERT_TINY, SMALL_SHAPES, TOUCHED, random_gradient
from tables import append_row

import mfac_jax

Shapes = tuple[tuple[str, tuple[int, ...]], ...]
WINDOWS = {
    "dense": None,
    "row-sparse": mfac_jax.compact_windows(TOUCHED),
    "row-sparse bfloat16": mfac_jax.compact_windows(TOUCHED, jnp.bfloat16),
}


def best_step(step: Callable[[jax.Array], float], repeats: int) -> float:
    """Returns the seconds of the fastest step; each gets a different gradient."""
    return min([step(jax.random.key(i)) for i in range(repeats + 2)][2:])


def our_step(
    shapes: Shapes, window: Any, num_grads: int
) -> Callable[[jax.Array], float]:
    """Returns a function that times an update with the gradient of a key."""
    optimizer = mfac_jax.scale_by_mfac(num_grads, window=window)
    update = jax.jit(optimizer.update, donate_argnums=1)
    params = {name: jnp.zeros(shape) for name, shape in shapes}
    state = jax.jit(optimizer.init)(params)

    def step(key: jax.Array) -> float:
        nonlocal state
        gradient = jax.block_until_ready(random_gradient(key, shapes))
        start = time.perf_counter()
        _, state = jax.block_until_ready(update(gradient, state))
        return time.perf_counter() - start

    return step


def their_step(
    module: ModuleType, shapes: Shapes, num_grads: int
) -> Callable[[jax.Array], float]:
    """Returns such a function for the authors' optimizer."""
    torch = module.torch
    on_gpu = torch.cuda.is_available()
    device = torch.device("cuda:0" if on_gpu else "cpu")
    params = [torch.zeros(shape, device=device) for _, shape in shapes]
    optimizer = module.MFAC(
        params, 1e-4, ngrads=num_grads, damp=1e-6, moddev=device, optdev=device
    )

    def wait() -> None:
        if on_gpu:
            torch.cuda.synchronize()

    def step(key: jax.Array) -> float:
        gradient = jax.device_get(random_gradient(key, shapes))
        for param, (name, _) in zip(params, shapes, strict=True):
            param.grad = torch.tensor(gradient[name], device=device)
        wait()
        start = time.perf_counter()
        optimizer.step()
        wait()
        return time.perf_counter() - start

    return step


def main() -> None:
    """Prints the table."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--reference", type=Path, required=True, metavar="DIR")
    parser.add_argument("--num_grads", type=int, default=1024)
    parser.add_argument("--repeats", type=int, default=8)
    parser.add_argument("--small", action="store_true", help="Tiny shapes, as a test.")
    parser.add_argument("--output", type=Path, help="Append rows to this file.")
    args = parser.parse_args()
    shapes = tuple((SMALL_SHAPES if args.small else BERT_TINY).items())
    with published_code(args.reference) as module:
        step = their_step(module, shapes, args.num_grads)
        theirs = 1e3 * best_step(step, args.repeats)
        has_kernels, torch = module.USE_CUDA, module.torch
        del step
        torch.cuda.empty_cache()
    milliseconds = {"published code": theirs}
    for name, window in WINDOWS.items():
        step = our_step(shapes, window, args.num_grads)
        milliseconds[name] = 1e3 * best_step(step, args.repeats)
        del step
    print(f"{args.num_grads} gradients; the authors' CUDA kernels: {has_kernels}\n")
    print("| optimizer | ms | times faster |\n| --- | ---: | ---: |")
    for name, ms in milliseconds.items():
        print(f"| {name} | {ms:.1f} | {theirs / ms:.1f} |")
        row = {
            "optimizer": name,
            "num_grads": args.num_grads,
            "update_ms": ms,
            "their_cuda_kernels": has_kernels,
            "torch": torch.__version__,
        }
        append_row(args.output, row)


if __name__ == "__main__":
    run_script(main, "nothing was left to save.")
