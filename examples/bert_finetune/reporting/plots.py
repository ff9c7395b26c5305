"""Curves of a run, and of several."""

import contextlib
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

# Points of a curve; longer runs are averaged in as many pieces.
_MAX_POINTS = 200


def smooth(
    steps: Sequence[float], values: Sequence[float]
) -> tuple[np.ndarray, np.ndarray]:
    """Averages values in pieces; returns the last step and the mean of each."""
    num_pieces = max(1, min(len(steps), _MAX_POINTS))
    pieces = np.array_split(np.asarray(values, float), num_pieces)
    last = np.cumsum([len(piece) for piece in pieces]) - 1
    return np.asarray(steps)[last], np.array([piece.mean() for piece in pieces])


def plot_curves(
    path: Path,
    title: str,
    runs: Mapping[str, Sequence[Mapping[str, float]]],
    metrics: Sequence[str],
) -> None:
    """Draws loss and metrics against the step, in training and in evaluation.

    Args:
      path: of the PNG.
      title: of the figure.
      runs: per run the lines of its `metrics.jsonl`.
      metrics: the names, without ``eval_``, that get a panel beside the loss.
    """
    with _panels(path, title, ["loss", *metrics]) as panels:
        for name, axes in panels.items():
            for color, (run, lines) in enumerate(runs.items()):
                style = {"color": f"C{color}"}
                if points := _points(lines, name):
                    curve = smooth([*points], [*points.values()])
                    axes.plot(*curve, label=f"{run}, training", **style)
                if points := _points(lines, f"eval_{name}"):
                    steps, values = [*points], [*points.values()]
                    label = f"{run}, validation: {values[-1]:.3f}"
                    axes.plot(steps, values, "o-", lw=0.8, ms=4, label=label, **style)


def plot_bands(
    path: Path,
    title: str,
    groups: Mapping[str, Sequence[Sequence[Mapping[str, float]]]],
    metrics: Sequence[str],
) -> None:
    """Draws the mean over seeds ± one standard deviation of what evaluations found.

    Means of the same names in training are dashed, without a band.

    Args:
      path: of the PNG.
      title: of the figure.
      groups: per optimizer, and per seed, the lines of a `metrics.jsonl`. Seeds without
        evaluations are left out; those of the others count at the steps they share.
      metrics: the names, without ``eval_``, that get a panel.
    """
    with _panels(path, title, metrics) as panels:
        for name, axes in panels.items():
            for color, (group, runs) in enumerate(groups.items()):
                style = {"color": f"C{color}"}
                steps, values = _shared_points(runs, name)
                if steps:
                    axes.plot(steps, values.mean(axis=0), "--", lw=0.8, **style)
                steps, values = _shared_points(runs, f"eval_{name}")
                if not steps:
                    continue
                means = values.mean(axis=0)
                label = f"{group}: {means[-1]:.3f}"
                if len(values) > 1:
                    with np.errstate(invalid="ignore"):  # A seed may have diverged.
                        deviations = values.std(axis=0, ddof=1)
                    label += f" ± {deviations[-1]:.3f}, {len(values)} seeds"
                    band = (means - deviations, means + deviations)
                    axes.fill_between(steps, *band, alpha=0.2, lw=0, **style)
                axes.plot(steps, means, "o-", ms=4, label=label, **style)


def _shared_points(
    runs: Sequence[Sequence[Mapping[str, float]]], name: str
) -> tuple[list[float], np.ndarray]:
    """Returns the steps that the runs with this name share, and its values by run."""
    points = [p for p in (_points(run, name) for run in runs) if p]
    steps = sorted(set.intersection(*map(set, points))) if points else []
    return steps, np.array([[p[step] for step in steps] for p in points], float)


def _points(lines: Sequence[Mapping[str, float]], name: str) -> dict[float, float]:
    return {line["step"]: line[name] for line in lines if name in line}


@contextlib.contextmanager
def _panels(path: Path, title: str, names: Sequence[str]) -> Iterator[dict[str, Any]]:
    """Yields axes by name to draw into; writes the PNG afterwards."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(5 * len(names), 4), layout="constrained")
    FigureCanvasAgg(figure)
    figure.suptitle(title)
    panels = dict(
        zip(names, figure.subplots(1, len(names), squeeze=False)[0], strict=True)
    )
    yield panels
    for name, axes in panels.items():
        axes.set(xlabel="step", ylabel=name.replace("_", " "))
        axes.grid(alpha=0.3)
        if axes.get_legend_handles_labels()[0]:
            axes.legend(fontsize="small")
    figure.savefig(path, dpi=150)
