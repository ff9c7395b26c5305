"""`metrics.jsonl`, and whatever else follows a run as it goes."""

import re
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from bert_finetune import reporting
from bert_finetune.progress import Progress

FILE = "metrics.jsonl"
# A line for people has no room for these.
_NOT_SHOWN = re.compile("^num_|^effective_rank|_samples|_runtime|_per_second")
_AVERAGED = ("loss", "accuracy")


class TrainingLog:
    """Writes a line for every few steps and for every evaluation.

    Args:
      output_dir: of the run.
      num_steps: of the run.
      steps_per_epoch: of the data.
      logging_steps: from one line to the next; the first and the last step have one.
      progress: moved by every step, told every line.
      write_tensorboard: called with every line.
      saved: what :meth:`state` returned when the checkpoint was written from which the
        run goes on. Lines written later are dropped.
    """

    def __init__(
        self,
        output_dir: Path,
        num_steps: int,
        steps_per_epoch: int,
        logging_steps: int,
        progress: Progress,
        write_tensorboard: Callable[[Mapping[str, float]], None],
        saved: Mapping[str, Any] | None,
    ):
        self._path = output_dir / FILE
        self._num_steps, self._steps_per_epoch = num_steps, steps_per_epoch
        self._logging_steps, self._progress = logging_steps, progress
        self._write_tensorboard = write_tensorboard
        saved = saved or {}
        # Since the last line.
        self._sums: dict[str, float] = dict(saved.get("sums", {}))
        self._num_summed: int = saved.get("num_summed", 0)
        self._total_loss: float = saved.get("total_loss", 0.0)
        self._last: dict[str, float] = saved.get("last", {})
        kept = (
            reporting.read_json_lines(self._path)[: saved.get("num_lines", 0)]
            if self._path.exists()
            else []
        )
        self._num_lines = len(kept)
        reporting.write_json_lines(self._path, kept)

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
        """Takes in the metrics of a step."""
        self._last = dict(metrics)
        self._total_loss += metrics["loss"]
        self._num_summed += 1
        for name in _AVERAGED:
            if name in metrics:
                self._sums[name] = self._sums.get(name, 0.0) + metrics[name]
        self._progress.step(metrics)
        if step % self._logging_steps == 0 or step in (1, self._num_steps):
            means = {n: total / self._num_summed for n, total in self._sums.items()}
            self._write(step, {**metrics, **means})
            self._sums, self._num_summed = {}, 0

    def evaluation(self, step: int, results: Mapping[str, float]) -> None:
        """Takes in the results of an evaluation after a step."""
        self._write(step, {n: v for n, v in results.items() if n.startswith("eval_")})

    def summary(self) -> dict[str, float]:
        """Returns the mean loss and the optimizer's last diagnostics."""
        others = (*_AVERAGED, "learning_rate")
        diagnostics = {n: v for n, v in self._last.items() if n not in others}
        return {"train_loss": self._total_loss / self._num_steps, **diagnostics}

    def _write(self, step: int, values: Mapping[str, float]) -> None:
        line = {"step": step, "epoch": step / self._steps_per_epoch, **values}
        reporting.append_json_line(self._path, line)
        self._num_lines += 1
        self._write_tensorboard(line)
        self._progress.line(
            step, {n: v for n, v in values.items() if not _NOT_SHOWN.search(n)}
        )
