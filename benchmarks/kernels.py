"""Summarizes the device's work per update in traces of `step_time.py`.

    python benchmarks/step_time.py --traces traces/
    python benchmarks/kernels.py traces/*.pb

Prints, per update, the launches, the copies to the host (each a synchronization), the
time in which the device is busy, the time from first to last kernel, and the longest
kernels. Traces of a CPU have XLA operations instead of kernels.
"""

import argparse
import collections
import contextlib
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import jax

NUM_TRACED = 3
# Lines of a trace with the device's work: streams, or XLA's threads.
LINES = {
    "gpu": ("/device:GPU", "Stream"),
    "cpu": ("/host:CPU", "tf_XLAPjRtCpuClient"),
}
NOT_WORK = ("ThreadpoolListener", "ThunkExecutor", "end: ")


class Event(NamedTuple):
    """An executed kernel, copy or operation; times in nanoseconds."""

    name: str
    start: float
    duration: float


@contextlib.contextmanager
def recorded(path: Path) -> Iterator[None]:
    """Records ``NUM_TRACED`` updates with JAX's profiler and writes the trace."""
    options = jax.profiler.ProfileOptions()
    options.python_tracer_level = 0
    with tempfile.TemporaryDirectory() as directory:
        with jax.profiler.trace(directory, profiler_options=options):
            yield
        (trace,) = Path(directory).glob("**/*.xplane.pb")
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(trace.read_bytes())


def read_events(path: Path) -> list[Event]:
    """Returns the events of the device, ordered by start."""
    planes = list(jax.profiler.ProfileData.from_file(str(path)).planes)
    has_gpu = any(plane.name.startswith("/device:GPU") for plane in planes)
    device, lines = LINES["gpu" if has_gpu else "cpu"]
    events = [
        Event(event.name, event.start_ns, event.duration_ns)
        for plane in planes
        if plane.name.startswith(device)
        for line in plane.lines
        if line.name.startswith(lines)
        for event in line.events
        if not event.name.startswith(NOT_WORK)
    ]
    return sorted(events, key=lambda event: event.start)


def busy_time(events: list[Event]) -> float:
    """Returns the nanoseconds in which at least one event runs."""
    busy, end = 0.0, 0.0
    for event in events:
        busy += max(0.0, event.start + event.duration - max(end, event.start))
        end = max(end, event.start + event.duration)
    return busy


def main() -> None:
    """Prints a summary and a table for each trace."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("traces", nargs="+", type=Path, metavar="FILE.pb")
    parser.add_argument("--longest", type=int, default=12, help="Kernels to show.")
    args = parser.parse_args()
    for path in args.traces:
        events = read_events(path)
        if not events:
            parser.error(f"{path} has no events of a device")
        span = max(e.start + e.duration for e in events) - events[0].start
        copies = sum("DtoH" in e.name or "D2H" in e.name for e in events)
        print(
            f"{path.name}: per update {len(events) / NUM_TRACED:.0f} launches, "
            f"{copies / NUM_TRACED:.1f} copies to the host, "
            f"{busy_time(events) / NUM_TRACED / 1e6:.3f} ms of work in "
            f"{span / NUM_TRACED / 1e6:.3f} ms\n"
        )
        total = sum(event.duration for event in events)
        by_name = collections.defaultdict(list)
        for event in events:
            by_name[event.name].append(event.duration)
        longest = sorted(by_name, key=lambda name: -sum(by_name[name]))
        print("| kernel | launches | ms | share |\n| --- | ---: | ---: | ---: |")
        for name in longest[: args.longest]:
            durations = by_name[name]
            print(
                f"| {name[:60]} | {len(durations) / NUM_TRACED:.1f} | "
                f"{sum(durations) / NUM_TRACED / 1e6:.3f} | "
                f"{sum(durations) / total:.1%} |"
            )
        print()


if __name__ == "__main__":
    main()
