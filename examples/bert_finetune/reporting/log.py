"""`metrics.jsonl`, and whatever else follows a run as it goes."""

import contextlib
import datetime
import re
import sys
import time
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

from tqdm import tqdm

from bert_finetune.errors import UserError
from bert_finetune.files import append_json_line, read_json_lines, write_json_lines

# Seconds that a running TensorBoard is behind at most, and that a killed run loses.
_TENSORBOARD_SECONDS = 10


METRICS_FILE = "metrics.jsonl"


# A line for people has no room for these.
_NOT_SHOWN = re.compile("^num_|^effective_rank|_samples|_runtime|_per_second")


_AVERAGED = ("loss", "accuracy")


class Progress:
    """Shows the progress of a training run on the standard error.

    Args:
      num_steps: of the run.
      start: steps taken before.
    """

    def __init__(self, num_steps: int, start: int):
        self._num_steps, self._start = num_steps, start
        self._began = time.perf_counter()
        self._bar = tqdm(
            total=num_steps,
            initial=start,
            unit="step",
            mininterval=0.2,
            disable=not sys.stderr.isatty(),
        )

    def step(self, metrics: Mapping[str, float]) -> None:
        """Moves the bar by one step."""
        if not self._bar.disable:
            self._bar.set_postfix_str(
                f"loss={metrics['loss']:.4f}, lr={metrics['learning_rate']:.2e}",
                refresh=False,
            )
        self._bar.update()

    def line(self, step: int, values: Mapping[str, float]) -> None:
        """Writes a line for a log file; above the bar where there is one."""
        rate = (step - self._start) / (time.perf_counter() - self._began)
        left = datetime.timedelta(
            seconds=round((self._num_steps - step) / max(rate, 1e-9))
        )
        shown = ", ".join(f"{name} {value:.4g}" for name, value in values.items())
        tqdm.write(
            f"step {step}/{self._num_steps}: {shown}, {rate:.1f} steps/s, {left} left",
            file=sys.stderr,
        )

    def __enter__(self) -> "Progress":
        return self

    def __exit__(self, *_: object) -> None:
        self._bar.close()


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
        self._path = output_dir / METRICS_FILE
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
            read_json_lines(self._path)[: saved.get("num_lines", 0)]
            if self._path.exists()
            else []
        )
        self._num_lines = len(kept)
        write_json_lines(self._path, kept)

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
        append_json_line(self._path, line)
        self._num_lines += 1
        self._write_tensorboard(line)
        self._progress.line(
            step, {n: v for n, v in values.items() if not _NOT_SHOWN.search(n)}
        )


def require_tensorboard() -> None:
    """Checks that TensorBoard's files can be written, before anything else is done.

    Raises:
      UserError: if the library is not installed.
    """
    try:
        import tensorboardX  # noqa: F401
    except ImportError:
        raise UserError(
            "--report_to tensorboard needs tensorboardX: pip install tensorboardX"
        ) from None


@contextlib.contextmanager
def tensorboard(
    directory: Path, last_step: int = 0
) -> Iterator[Callable[[Mapping[str, float]], None]]:
    """Opens a directory for TensorBoard; yields what writes a line of `metrics.jsonl`.

    Names that start with ``eval_`` become scalars under ``eval/``, all others under
    ``train/``.

    Args:
      directory: made if it is not there.
      last_step: what the directory holds of later steps is hidden: the step a resumed
        run starts from, or 0 for a run that starts anew.

    Raises:
      UserError: if the library is not installed.
    """
    require_tensorboard()
    from tensorboardX import SummaryWriter

    writer = SummaryWriter(
        str(directory),
        purge_step=last_step + 1,
        flush_secs=_TENSORBOARD_SECONDS,
        # The library's own names repeat within a second, and it overwrites.
        filename_suffix=f".{time.time_ns()}",
    )

    def write(line: Mapping[str, float]) -> None:
        for name, value in line.items():
            if name != "step":
                kind = "eval" if name.startswith("eval_") else "train"
                tag = f"{kind}/{name.removeprefix('eval_')}"
                writer.add_scalar(tag, value, int(line["step"]))

    with writer:
        yield write
