r"""Compares steps per second of this trainer and of PyTorch with transformers.

    pip install torch
    python benchmarks/pytorch_step.py \
        --model_name_or_path prajjwal1/bert-tiny

Both alternate in one process and take the same batches of QQP (32 pairs, at most 128
tokens) with AdamW, dropout and clipping, on the same device with the same number of
threads. With `short`, this trainer pads to the smallest of a few lengths and PyTorch to
the longest example; with `128`, both pad to 128. Batches are prepared on a thread.
Compilation is excluded.
"""

import argparse
import importlib
import itertools
import os
import statistics
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

# Both frameworks must fit on the device.
os.environ.setdefault("XLA_PYTHON_CLIENT_PREALLOCATE", "false")

from bert_finetune import hub
from bert_finetune.cli import run_script
from bert_finetune.data.batches import prefetch, train_batches
from bert_finetune.errors import UserError
from bert_finetune.training import loop
from padded_lengths import Steps, make_run
from tables import append_row

PADDING = {"short": [], "128": ["--pad_to_max_length"]}


class TorchSteps:
    """Takes the steps of a run in a plain PyTorch loop."""

    def __init__(self, torch: Any, run: loop.Run):
        transformers = importlib.import_module("transformers")
        args = run.task.args
        self._torch = torch
        self._on_gpu = torch.cuda.is_available()
        self._device = torch.device("cuda" if self._on_gpu else "cpu")
        self._model = transformers.BertForSequenceClassification.from_pretrained(
            hub.resolve_model(args.model_name_or_path), num_labels=2
        ).to(self._device)
        self._model.train()
        self._optimizer = torch.optim.AdamW(
            self._model.parameters(), lr=args.learning_rate, weight_decay=0.0
        )
        self._batches = prefetch(self._make_batches(run))

    def _make_batches(self, run: loop.Run) -> Iterator[dict[str, Any]]:
        args = run.task.args
        longest = args.max_seq_length
        lengths = [longest] if args.pad_to_max_length else range(1, longest + 1)
        for batch in train_batches(run.train_data._replace(lengths=lengths)):
            del batch["weights"]
            yield {
                name: self._torch.as_tensor(array, dtype=self._torch.int64)
                for name, array in batch.items()
            }

    def take(self, num_steps: int) -> float:
        """Takes steps; returns the seconds until the last one is done."""
        started = time.perf_counter()
        for batch in itertools.islice(self._batches, num_steps):
            batch = {k: v.to(self._device, non_blocking=True) for k, v in batch.items()}
            self._model(**batch).loss.backward()
            self._torch.nn.utils.clip_grad_norm_(self._model.parameters(), 1.0)
            self._optimizer.step()
            self._optimizer.zero_grad()
        if self._on_gpu:
            self._torch.cuda.synchronize()
        return time.perf_counter() - started


def main() -> None:
    """Prints a row per padding."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--model_name_or_path", required=True)
    parser.add_argument("--dataset_name", default="nyu-mll/glue")
    parser.add_argument("--turns", type=int, default=8)
    parser.add_argument("--steps_per_turn", type=int, default=40)
    parser.add_argument("--output", type=Path, help="Append rows to this file.")
    args = parser.parse_args()
    try:
        torch = importlib.import_module("torch")
    except ImportError as error:
        raise UserError("this comparison needs torch: pip install torch.") from error
    print("| padded to | this trainer | PyTorch | ratio |\n| --- |" + " ---: |" * 3)
    num_steps = (args.turns + 1) * args.steps_per_turn
    for padding, flags in PADDING.items():
        run = make_run(
            args.model_name_or_path,
            args.dataset_name,
            ["--optim", "adamw", "--max_steps", str(num_steps), *flags],
        )
        rivals = {
            "this trainer": Steps(run),
            "PyTorch": TorchSteps(torch, run),
        }
        seconds = {name: [] for name in rivals}
        for _ in range(args.turns + 1):
            for name, rival in rivals.items():
                seconds[name].append(rival.take(args.steps_per_turn))
        # Without the first turn, a warm-up.
        rates = {
            name: args.steps_per_turn / statistics.median(times[1:])
            for name, times in seconds.items()
        }
        ours, theirs = rates.values()
        print(
            f"| {padding} | {ours:.1f} | {theirs:.1f} | {ours / theirs:.2f} |",
            flush=True,
        )
        row = {
            "padded_to": padding,
            "steps_per_second": rates,
            "ratio": ours / theirs,
            "torch": torch.__version__,
            "transformers": importlib.import_module("transformers").__version__,
            "threads": torch.get_num_threads(),
        }
        append_row(args.output, row)


if __name__ == "__main__":
    run_script(main, "nothing was left to save.")
