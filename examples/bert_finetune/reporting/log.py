"""Streams the metrics of a run to `metrics.jsonl`, the console and TensorBoard."""

import datetime
import re
import sys
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from tqdm import tqdm

from bert_finetune.files import append_json_line, read_json_lines, write_json_lines

METRICS_FILE = "metrics.jsonl"
# Not shown on the console.
_NOT_SHOWN = re.compile("^num_|^effective_rank|_samples|_runtime|_per_second")
_AVERAGED = ("loss", "accuracy")
# Maximum lag of a running TensorBoard, in seconds.
_TENSORBOARD_SECONDS = 10


class Log:
    """Writes a line every few steps, for the first and last, and for each evaluation.

    A resumed run starts after ``start`` steps; ``saved`` is what :meth:`state` returned
    there, and later lines are dropped.
    """

    def __init__(
        self,
        directory: Path,
        start: int,
        num_steps: int,
        steps_per_epoch: int,
        logging_steps: int,
        to_tensorboard: bool,
        saved: Mapping[str, Any],
    ):
        self._path = directory / METRICS_FILE
        self._start, self._num_steps = start, num_steps
        self._steps_per_epoch = steps_per_epoch
        self._logging_steps = logging_steps
        # Sums cover the steps since the last line.
        new = {"num_lines": 0, "sums": {}, "num_summed": 0, "total_loss": 0.0}
        self._state: dict[str, Any] = {**new, "last": {}, **saved}
        lines = read_json_lines(self._path) if self._path.exists() else []
        kept = lines[: self._state["num_lines"]]
        self._state["num_lines"] = len(kept)
        write_json_lines(self._path, kept)
        self._began = time.perf_counter()
        self._bar = tqdm(
            total=num_steps,
            initial=start,
            unit="step",
            mininterval=0.2,
            disable=not sys.stderr.isatty(),
        )
        self._tensorboard = None
        if to_tensorboard:
            from tensorboardX import SummaryWriter

            self._tensorboard = SummaryWriter(
                str(directory / "runs"),
                purge_step=start + 1,
                flush_secs=_TENSORBOARD_SECONDS,
                # Default names repeat within a second; the later file would overwrite.
                filename_suffix=f".{time.time_ns()}",
            )

    def __enter__(self) -> "Log":
        return self

    def __exit__(self, *_: object) -> None:
        self._bar.close()
        if self._tensorboard is not None:
            self._tensorboard.close()

    def state(self) -> dict[str, Any]:
        """Returns the state to save in a checkpoint."""
        return self._state

    def step(self, step: int, metrics: Mapping[str, float]) -> None:
        """Adds the metrics of a step."""
        state = self._state
        state["last"] = dict(metrics)
        state["total_loss"] += metrics["loss"]
        state["num_summed"] += 1
        for name in _AVERAGED:
            if name in metrics:
                state["sums"][name] = state["sums"].get(name, 0.0) + metrics[name]
        if not self._bar.disable:
            shown = f"loss={metrics['loss']:.4f}, lr={metrics['learning_rate']:.2e}"
            self._bar.set_postfix_str(shown, refresh=False)
        self._bar.update()
        if step % self._logging_steps == 0 or step in (1, self._num_steps):
            means = {k: v / state["num_summed"] for k, v in state["sums"].items()}
            self._write(step, {**metrics, **means})
            state |= {"sums": {}, "num_summed": 0}

    def evaluation(self, step: int, results: Mapping[str, float]) -> None:
        """Adds the results of an evaluation after a step."""
        self._write(step, {n: v for n, v in results.items() if n.startswith("eval_")})

    def summary(self) -> dict[str, float]:
        """Returns the mean loss and the optimizer's last diagnostics."""
        others, last = (*_AVERAGED, "learning_rate"), self._state["last"]
        diagnostics = {name: v for name, v in last.items() if name not in others}
        return {
            "train_loss": self._state["total_loss"] / self._num_steps,
            **diagnostics,
        }

    def _write(self, step: int, values: Mapping[str, float]) -> None:
        line = {"epoch": step / self._steps_per_epoch, **values}
        append_json_line(self._path, {"step": step, **line})
        self._state["num_lines"] += 1
        if self._tensorboard is not None:
            for name, value in line.items():
                kind = "eval" if name.startswith("eval_") else "train"
                tag = f"{kind}/{name.removeprefix('eval_')}"
                self._tensorboard.add_scalar(tag, value, step)
        rate = (step - self._start) / (time.perf_counter() - self._began)
        seconds_left = round((self._num_steps - step) / max(rate, 1e-9))
        shown = ", ".join(
            f"{name} {value:.4g}"
            for name, value in values.items()
            if not _NOT_SHOWN.search(name)
        )
        tqdm.write(
            f"step {step}/{self._num_steps}: {shown}, {rate:.1f} steps/s, "
            f"{datetime.timedelta(seconds=seconds_left)} left",
            file=sys.stderr,
        )
