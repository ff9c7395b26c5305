"""Plots the curves of one or several runs."""

from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib.figure import Figure

# Maximum points of a curve; longer runs are averaged in this many pieces.
_MAX_POINTS = 200

_Run = Sequence[Mapping[str, float]]  # The lines of its `metrics.jsonl`.


def smooth(steps: Sequence[float], values: Any) -> tuple[list[float], list[float]]:
    """Averages values in pieces; returns the last step and the mean of each."""
    num_pieces = min(len(steps), _MAX_POINTS)
    last_steps = [piece[-1] for piece in np.array_split(steps, num_pieces)]
    return last_steps, [piece.mean() for piece in np.array_split(values, num_pieces)]


def plot_curves(
    path: Path, title: str, runs: Mapping[str, _Run], metrics: Sequence[str]
) -> None:
    """Plots training and validation loss and metrics against the step."""
    for axes, name, run, lines, color in _panels(path, title, ["loss", *metrics], runs):
        steps, values = _shared_points([lines], name)
        if steps:
            curve = smooth(steps, values[0])
            axes.plot(*curve, label=f"{run}, training", color=color)
        _plot_evaluations(axes, f"{run}, validation", [lines], name, color)


def plot_bands(
    path: Path, title: str, groups: Mapping[str, Sequence[_Run]], metrics: Sequence[str]
) -> None:
    """Plots the mean over seeds ± one standard deviation of each evaluation.

    ``groups`` maps an optimizer to its runs. Only steps that all runs share are drawn;
    runs without evaluations are left out. Training means are dashed, without a band.
    """
    for axes, name, group, runs, color in _panels(path, title, metrics, groups):
        steps, values = _shared_points(runs, name)
        if steps:
            axes.plot(steps, values.mean(axis=0), "--", lw=0.8, color=color)
        _plot_evaluations(axes, group, runs, name, color)


def _panels(
    path: Path, title: str, names: Sequence[str], groups: Mapping[str, Any]
) -> Iterator[tuple[Any, str, str, Any, str]]:
    """Yields axes, name, group, runs and color of each curve; then writes the PNG."""
    figure = Figure(figsize=(5 * len(names), 4), layout="constrained")
    figure.suptitle(title)
    panels = figure.subplots(1, len(names), squeeze=False)[0]
    for name, axes in zip(names, panels, strict=True):
        axes.set(xlabel="step", ylabel=name.replace("_", " "))
        axes.grid(alpha=0.3)
        for number, (group, runs) in enumerate(groups.items()):
            yield axes, name, group, runs, f"C{number}"
        if axes.get_legend_handles_labels()[0]:
            axes.legend(fontsize="small")
    figure.savefig(path, dpi=150)


def _plot_evaluations(
    axes: Any, label: str, runs: Sequence[_Run], name: str, color: str
) -> None:
    steps, values = _shared_points(runs, f"eval_{name}")
    if not steps:
        return
    means = values.mean(axis=0)
    label += f": {means[-1]:.3f}"
    if len(values) > 1:
        with np.errstate(invalid="ignore"):  # A seed may have diverged.
            deviations = values.std(axis=0, ddof=1)
        label += f" ± {deviations[-1]:.3f}, {len(values)} seeds"
        band = (means - deviations, means + deviations)
        axes.fill_between(steps, *band, alpha=0.2, lw=0, color=color)
    axes.plot(steps, means, "o-", ms=4, label=label, color=color)


def _shared_points(runs: Sequence[_Run], name: str) -> tuple[list[float], np.ndarray]:
    """Returns the steps shared by all runs that log ``name``, and its values by run."""
    found = [{line["step"]: line[name] for line in run if name in line} for run in runs]
    points = [by_step for by_step in found if by_step]
    steps = sorted(set.intersection(*map(set, points))) if points else []
    return steps, np.array([[p[step] for step in steps] for p in points], float)
