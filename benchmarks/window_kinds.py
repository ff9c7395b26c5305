r"""Compares all kinds of windows on the same gradients: bytes, time and direction.

    python benchmarks/window_kinds.py \
        --model_name_or_path prajjwal1/bert-tiny

Trains on QQP for `num_grads` steps (batch 32, length 128) and feeds the gradients to
each kind of window. The time of a step with a full window is compared with two reads of
the window, at the bandwidth of a matrix product in the same process, and with a step of
the dense float32 window. Prints a JSON object; `--output` appends its rows to a file.
"""

import argparse
import json
import tempfile
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from bert_finetune.arguments import GlueArguments, parse_arguments
from bert_finetune.data.batches import max_distinct_tokens, train_batches
from bert_finetune.glue.task import Classification
from bert_finetune.model import bert
from bert_finetune.training import loop, optimizers
from step_time import best_time
from tables import append_row

import mfac_jax

Gradients = list[Any]


def qqp_gradients(args: GlueArguments) -> tuple[Gradients, dict[str, int]]:
    """Returns the clipped gradients of a short run and their maximum touched rows."""
    run = loop.prepare(Classification(args), optimizers.parse_hyperparams(args))
    max_rows = bert.touched_rows(
        max_distinct_tokens(run.train_data, run.first_batches), args.max_seq_length
    )
    loss_fn = run.task.loss
    clip = optax.clip_by_global_norm(1.0)
    opt = mfac_jax.mfac(1e-4, args.max_steps, window=mfac_jax.compact_windows(max_rows))

    @jax.jit
    def gradient_of(params, batch, step):
        key = jax.random.fold_in(jax.random.key(args.seed), step)
        gradient = jax.grad(lambda p: loss_fn(p, batch, key)[0])(params)
        return clip.update(gradient, clip.init(params))[0]

    update = jax.jit(opt.update, donate_argnums=1)
    params, gradients = run.task.model.params, []
    state = opt.init(params)
    for step, batch in enumerate(train_batches(run.train_data)):
        gradients.append(gradient_of(params, batch, step))
        updates, state = update(gradients[-1], state)
        params = optax.apply_updates(params, updates)
    return gradients, max_rows


def measure(window: Any, gradients: Gradients, repeats: int) -> tuple[Any, float, int]:
    """Fills a window; returns the last direction, seconds per step, and bytes."""
    opt = mfac_jax.scale_by_mfac(len(gradients), window=window)
    update = jax.jit(opt.update, donate_argnums=1)
    state, direction = opt.init(gradients[0]), None
    for gradient in gradients:
        direction, state = update(gradient, state)
    nbytes = mfac_jax.window_nbytes(state)

    def step():
        nonlocal state
        updates, state = update(gradients[0], state)
        return updates

    return direction, best_time(step, repeats), nbytes


def read_bandwidth(repeats: int) -> float:
    """Returns bytes per second of a linear combination of rows, a pass over 1 GB."""
    matrix = jnp.ones((256, 1_000_000))
    combine = jax.jit(lambda c, g: jnp.matmul(c, g, precision="highest"))
    return matrix.nbytes / best_time(lambda: combine(matrix[:, 0], matrix), repeats)


def cosine(x: Any, y: Any) -> float:
    """Returns the cosine of the angle between two trees."""
    return float(optax.tree.vdot(x, y) / optax.tree.norm(x) / optax.tree.norm(y))


def main() -> None:
    """Prints the result and appends a row per kind to the output."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--model_name_or_path", required=True)
    parser.add_argument("--dataset_name", default="nyu-mll/glue")
    parser.add_argument("--num_grads", type=int, default=256)
    parser.add_argument("--repeats", type=int, default=10)
    parser.add_argument("--output", type=Path, help="Append rows to this file.")
    given = parser.parse_args()
    with tempfile.TemporaryDirectory() as output_dir:
        flags = [
            *("--model_name_or_path", given.model_name_or_path),
            *("--dataset_name", given.dataset_name, "--task_name", "qqp"),
            *("--per_device_train_batch_size", "32", "--max_train_samples", "20000"),
            *("--max_steps", str(given.num_grads), "--pad_to_max_length"),
            *("--do_train", "--output_dir", output_dir),
        ]
        gradients, max_rows = qqp_gradients(parse_arguments(GlueArguments, flags))
    kinds = {
        "dense float32": mfac_jax.DenseWindow(),
        "dense bfloat16": mfac_jax.DenseWindow(jnp.bfloat16),
        "int8": mfac_jax.Int8Window(),
        "row-sparse float32": mfac_jax.compact_windows(max_rows),
        "row-sparse bfloat16": mfac_jax.compact_windows(max_rows, jnp.bfloat16),
        "top-k 1 %": mfac_jax.TopKWindow(),
    }
    bandwidth = read_bandwidth(given.repeats)
    exact, dense_time, rows = None, 0.0, {}
    for name, window in kinds.items():
        direction, seconds, nbytes = measure(window, gradients, given.repeats)
        if exact is None:
            exact, dense_time = direction, seconds
        rows[name] = {
            "window_mb": nbytes / 1e6,
            "step_ms": 1e3 * seconds,
            "ratio_to_two_reads": seconds * bandwidth / (2 * nbytes),
            "times_faster_than_dense": dense_time / seconds,
            "cosine_with_dense": cosine(direction, exact),
            "length_to_dense": float(
                optax.tree.norm(direction) / optax.tree.norm(exact)
            ),
        }
    shared = {
        "num_grads": given.num_grads,
        "parameters": int(sum(np.size(x) for x in jax.tree.leaves(gradients[0]))),
        "max_rows": max_rows,
        "read_gb_per_s": bandwidth / 1e9,
    }
    print(json.dumps({**shared, "kinds": rows}, indent=2))
    for name, row in rows.items():
        append_row(given.output, {"window": name, **row, **shared})


if __name__ == "__main__":
    main()
