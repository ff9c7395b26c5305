"""How far a run is: a bar on a terminal, plain lines in a log file."""

import datetime
import sys
import time
from collections.abc import Mapping

from tqdm import tqdm


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
