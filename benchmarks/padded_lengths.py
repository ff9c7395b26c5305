r"""Compares training with batches padded to their own length and to the maximum.

    python benchmarks/padded_lengths.py \
        --model_name_or_path prajjwal1/bert-tiny

Takes the same steps of QQP (batch 32, length 128, AdamW) both ways, alternately in one
process, and once more without dropout to compare the losses. Batches are prepared on a
thread as in training. Compilation is excluded. Prints a JSON object; `--output` appends
it to a file.
"""

import argparse
import itertools
import json
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import jax
import numpy as np
from bert_finetune import cli
from bert_finetune.arguments import GlueArguments, parse_arguments
from bert_finetune.data.batches import prefetch, train_batches
from bert_finetune.glue.task import Classification
from bert_finetune.model import bert
from bert_finetune.training import loop, losses, optimizers, steps
from bert_finetune.training.memory import nbytes
from tables import append_row

STEPS_PER_TURN = 100


def make_run(model: str, dataset: str, flags: Sequence[str]) -> loop.Run:
    """Prepares a run in the same way as the trainer's scripts."""
    cli.set_up_jax()
    args = parse_arguments(
        GlueArguments,
        [
            *("--model_name_or_path", model, "--dataset_name", dataset),
            *("--task_name", "qqp", "--do_train", "--output_dir", "unused"),
            *("--per_device_train_batch_size", "32", "--learning_rate", "1e-4", *flags),
        ],
    )
    return loop.prepare(Classification(args), optimizers.parse_hyperparams(args))


class Steps:
    """Takes the steps of a run a few at a time.

    Attributes:
      seconds: Time of all steps of `take`.
      ready_seconds: Time of all steps of `take_ready`.
      losses: Loss of each step of `take`.
      optimizer_state_bytes: Size of the optimizer's state.
    """

    def __init__(
        self,
        run: loop.Run,
        loss: losses.LossFn | None = None,
        params: bert.Params | None = None,
    ):
        optimizer = run.optimizer.transformation
        initial: Any = jax.tree.map(np.asarray, params or run.task.model.params)
        self._state = steps.init_state(initial, optimizer, seed=0)
        self.optimizer_state_bytes = nbytes(self._state.opt_state)
        started = time.perf_counter()
        self._step = steps.compile_ahead(
            steps.make_train_step(loss or run.task.loss, optimizer),
            jax.eval_shape(lambda: self._state),
            run.first_batches,
        )
        self.compile_seconds = time.perf_counter() - started
        self._batches = prefetch(train_batches(run.train_data))
        self.seconds = self.ready_seconds = 0.0
        self.losses: list[float] = []

    def take(self, num_steps: int) -> float:
        """Takes steps like the trainer; returns the seconds until the last is done."""
        started = time.perf_counter()
        queue = steps.MetricsQueue(
            lambda step, metrics: self.losses.append(metrics["loss"])
        )
        for i, batch in enumerate(itertools.islice(self._batches, num_steps)):
            self._state, metrics = self._step(self._state, batch)
            queue.put(i, metrics)
        queue.flush()
        jax.block_until_ready(self._state)
        seconds = time.perf_counter() - started
        self.seconds += seconds
        return seconds

    def take_ready(self, num_steps: int) -> None:
        """Takes steps whose batches are already on the device."""
        batches = jax.device_put(list(itertools.islice(self._batches, num_steps)))
        jax.block_until_ready(batches)
        started = time.perf_counter()
        for batch in batches:
            self._state, _ = self._step(self._state, batch)
        jax.block_until_ready(self._state)
        self.ready_seconds += time.perf_counter() - started


def main() -> None:
    """Prints the result and appends it to the output."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--model_name_or_path", required=True)
    parser.add_argument("--dataset_name", default="nyu-mll/glue")
    parser.add_argument("--turns", type=int, default=6)
    parser.add_argument("--output", type=Path, help="Append rows to this file.")
    given = parser.parse_args()
    num_steps = given.turns * STEPS_PER_TURN
    source = given.model_name_or_path, given.dataset_name
    runs = {
        name: make_run(*source, ["--max_steps", str(num_steps), *flags])
        for name, flags in {"short": [], "fixed": ["--pad_to_max_length"]}.items()
    }
    rivals = {name: Steps(run) for name, run in runs.items()}
    for _ in range(given.turns):
        for taking in rivals.values():
            taking.take(STEPS_PER_TURN)
    rates = {name: num_steps / taking.seconds for name, taking in rivals.items()}
    # Without dropout, whose masks depend on the length.
    found = {}
    for name, run in runs.items():
        config = run.task.model.config
        config.hidden_dropout_prob = config.attention_probs_dropout_prob = 0.0
        apply = bert.make_apply(config, bert.BertForSequenceClassification)
        without = Steps(run, losses.label_loss(apply))
        without.take(STEPS_PER_TURN)
        found[name] = np.array(without.losses)
    train_data = runs["short"].train_data
    result = {
        "steps_per_second": rates,
        "ratio": rates["short"] / rates["fixed"],
        "compile_seconds": {n: taking.compile_seconds for n, taking in rivals.items()},
        "lengths": sorted(
            {batch["input_ids"].shape[1] for batch in runs["short"].first_batches}
        ),
        "mean_length": float(np.diff(train_data.features.starts).mean()),
        "mean_padded_length": float(
            np.mean([b["input_ids"].shape[1] for b in train_batches(train_data)])
        ),
        "largest_difference_of_losses": float(
            np.max(np.abs(found["short"] - found["fixed"]))
        ),
    }
    print(json.dumps(result, indent=2))
    append_row(given.output, result)


if __name__ == "__main__":
    main()
