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
# Left out on the console.
_NOT_SHOWN = re.compile("^num_|^effective_rank|_samples|_runtime|_per_second")
_AVERAGED = ("loss", "accuracy")
# Seconds that a running TensorBoard lags behind at most.
_TENSORBOARD_SECONDS = 10


class Log:
    """Writes a line every few steps and for every evaluation.

    Args:
      directory: of the run.
      start: steps taken before, by the run that this one resumes.
      num_steps: of the run.
      steps_per_epoch: of the data.
      logging_steps: from one line to the next; the first and the last step have one.
      to_tensorboard: whether to write files for TensorBoard too. ``eval_NAME`` becomes
        ``eval/NAME`` there, other names are under ``train/``.
      saved: what :meth:`state` returned at step ``start``. Later lines are dropped.
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
        # Since the last line.
        self._sums: dict[str, float] = dict(saved.get("sums", {}))
        self._num_summed: int = saved.get("num_summed", 0)
        self._total_loss: float = saved.get("total_loss", 0.0)
        self._last: dict[str, float] = saved.get("last", {})
        kept = []
        if self._path.exists():
            kept = read_json_lines(self._path)[: saved.get("num_lines", 0)]
        self._num_lines = len(kept)
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
                # The library's own names repeat within a second, and it overwrites.
                filename_suffix=f".{time.time_ns()}",
            )

    def __enter__(self) -> "Log":
        return self

    def __exit__(self, *_: object) -> None:
        self._bar.close()
        if self._tensorboard is not None:
            self._tensorboard.close()

    def state(self) -> dict[str, Any]:
        """Returns what a checkpoint has to keep."""
        return {
            "num_lines": self._num_lines,
            "sums": self._sums,
            "num_summed": self._num_summed,
            "total_loss": self._total_loss,
            "last": self._last,
        }

    def step(self, step: int, metrics: Mapping[str, float]) -> None:
        """Adds the metrics of a step."""
        self._last = dict(metrics)
        self._total_loss += metrics["loss"]
        self._num_summed += 1
        for name in _AVERAGED:
            if name in metrics:
                self._sums[name] = self._sums.get(name, 0.0) + metrics[name]
        if not self._bar.disable:
            shown = f"loss={metrics['loss']:.4f}, lr={metrics['learning_rate']:.2e}"
            self._bar.set_postfix_str(shown, refresh=False)
        self._bar.update()
        if step % self._logging_steps == 0 or step in (1, self._num_steps):
            means = {n: total / self._num_summed for n, total in self._sums.items()}
            self._write(step, {**metrics, **means})
            self._sums, self._num_summed = {}, 0

    def evaluation(self, step: int, results: Mapping[str, float]) -> None:
        """Adds the results of an evaluation after a step."""
        self._write(step, {n: v for n, v in results.items() if n.startswith("eval_")})

    def summary(self) -> dict[str, float]:
        """Returns the mean loss and the optimizer's last diagnostics."""
        others = (*_AVERAGED, "learning_rate")
        diagnostics = {n: v for n, v in self._last.items() if n not in others}
        return {"train_loss": self._total_loss / self._num_steps, **diagnostics}

    def _write(self, step: int, values: Mapping[str, float]) -> None:
        line = {"epoch": step / self._steps_per_epoch, **values}
        append_json_line(self._path, {"step": step, **line})
        self._num_lines += 1
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
