r"""Trains with the authors' PyTorch optimizer and with ours on the same batches.

    git clone https://github.com/IST-DASLab/M-FAC
    pip install torch
    python benchmarks/published_training.py --reference M-FAC \
        --model_name_or_path prajjwal1/bert-tiny

Fine-tunes on MRPC three times from the same weights, with the same batches and dropout
masks: with the authors' code, with mfac_jax, and with mfac_jax from parameters that are
off by a rounding error. The third run shows how far rounding alone drives two runs
apart. Prints the mean training loss of each epoch.
"""

import argparse
import json
from pathlib import Path
from types import ModuleType

import jax
import numpy as np
import optax
from bert_finetune.cli import run_script
from bert_finetune.model import bert
from bert_finetune.training import loop
from crosscheck_pytorch import published_code
from jax.experimental import io_callback
from jax.flatten_util import ravel_pytree
from padded_lengths import Steps, make_run
from tables import append_row


def scale_by_published_mfac(
    module: ModuleType, num_grads: int, damp: float
) -> optax.GradientTransformation:
    """Wraps the authors' code; holds its window outside the state, for one run."""
    torch = module.torch
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    window = None

    def direction(gradient: jax.Array) -> np.ndarray:
        nonlocal window
        row = torch.tensor(np.asarray(gradient), device=device)
        if window is None:
            empty = torch.zeros((num_grads, len(row)))
            window = module.HInvFastUpMulti(empty, device, [device], damp)
        return window.update_mul(row).cpu().numpy()

    def update(updates, state, params=None):
        del params
        flat, unravel = ravel_pytree(updates)
        flat = io_callback(direction, jax.typeof(flat), flat, ordered=True)
        return unravel(flat), state

    return optax.GradientTransformation(optax.init_empty_state, update)


def losses_of(run: loop.Run, params: bert.Params | None = None) -> np.ndarray:
    """Trains, from `params` if given; returns the mean loss of each epoch."""
    steps = Steps(run, params=params)
    steps.take(run.train_data.num_steps)
    epochs = np.array_split(steps.losses, round(run.task.args.num_train_epochs))
    return np.array([np.mean(epoch) for epoch in epochs])


def main() -> None:
    """Prints the table."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--reference", type=Path, required=True, metavar="DIR")
    parser.add_argument("--model_name_or_path", required=True)
    parser.add_argument("--dataset_name", default="nyu-mll/glue")
    parser.add_argument(
        "--num_grads", type=int, default=64, help="A multiple of 32, at most 1024."
    )
    parser.add_argument("--damp", type=float, default=1e-6)
    parser.add_argument("--learning_rate", type=float, default=1e-4)
    parser.add_argument("--num_train_epochs", type=int, default=5)
    parser.add_argument("--output", type=Path, help="Append rows to this file.")
    args = parser.parse_args()
    optim_args = {"num_grads": args.num_grads, "damp": args.damp}
    run = make_run(
        args.model_name_or_path,
        args.dataset_name,
        [
            *("--task_name", "mrpc", "--num_train_epochs", str(args.num_train_epochs)),
            *("--optim", "MFAC", "--optim_args", json.dumps(optim_args)),
            *("--learning_rate", str(args.learning_rate)),
        ],
    )
    moved = jax.tree.map(
        lambda p: np.nextafter(p, np.float32(np.inf)), run.task.model.params
    )
    with published_code(args.reference) as module:
        published = optax.chain(
            optax.clip_by_global_norm(run.task.args.max_grad_norm),
            scale_by_published_mfac(module, args.num_grads, args.damp),
            optax.scale_by_learning_rate(run.optimizer.schedule),
        )
        optimizer = run.optimizer._replace(transformation=published)
        losses = {"the authors' code": losses_of(run._replace(optimizer=optimizer))}
    losses["mfac_jax"] = losses_of(run)
    losses["mfac_jax, moved"] = losses_of(run, moved)
    print(
        "| optimizer | "
        + " | ".join(f"epoch {i + 1}" for i in range(len(losses["mfac_jax"])))
        + " |"
    )
    for name, values in losses.items():
        print(f"| {name} | " + " | ".join(f"{value:.5f}" for value in values) + " |")
        row = {
            "optimizer": name,
            "losses": values.tolist(),
            **optim_args,
            "learning_rate": args.learning_rate,
            "torch": module.torch.__version__,
        }
        append_row(args.output, row)


if __name__ == "__main__":
    run_script(main, "nothing was left to save.")
