"""What a run leaves in its output directory beside the model."""

import json
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

# Points of a curve; longer runs are averaged in as many pieces.
_MAX_POINTS = 200


def write_json(path: Path, content: Mapping[str, Any]) -> None:
    """Writes a JSON file that is there whole or not at all."""
    partial = path.with_name(f".{path.name}.partial")
    partial.write_text(json.dumps(content, indent=4, sort_keys=True) + "\n")
    os.replace(partial, path)


def append_json_line(path: Path, content: Mapping[str, Any]) -> None:
    """Appends one line to a `.jsonl` file."""
    with open(path, "a") as file:
        file.write(json.dumps(content) + "\n")


def smooth(values: Sequence[float]) -> tuple[np.ndarray, np.ndarray]:
    """Averages values of steps 1, 2, … in pieces; returns last steps and means."""
    pieces = np.array_split(np.asarray(values), min(len(values), _MAX_POINTS))
    return np.cumsum([len(p) for p in pieces]), np.array([p.mean() for p in pieces])


def plot_curves(
    path: Path,
    title: str,
    runs: Mapping[str, Mapping[str, Sequence[float]]],
    results: Mapping[str, Mapping[str, float]],
) -> None:
    """Draws loss and accuracy against the step.

    Args:
      path: of the PNG.
      title: of the figure.
      runs: per run its metrics, ``loss`` and ``accuracy`` of every step.
      results: per run its evaluation, whose ``eval_loss`` and ``eval_accuracy`` become
        points at the last step; may be empty.
    """
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(10, 4), layout="constrained")
    FigureCanvasAgg(figure)
    figure.suptitle(title)
    for axes, name in zip(figure.subplots(1, 2), ("loss", "accuracy"), strict=True):
        for color, (run, metrics) in enumerate(runs.items()):
            steps, means = smooth(metrics[name])
            style = {"color": f"C{color}"}
            axes.plot(steps, means, label=f"{run}, training", **style)
            if f"eval_{name}" in results.get(run, {}):
                value = results[run][f"eval_{name}"]
                label = f"{run}, validation: {value:.3f}"
                axes.plot(len(metrics[name]), value, "o", label=label, **style)
        axes.set(xlabel="step", ylabel=name)
        axes.grid(alpha=0.3)
        axes.legend()
    figure.savefig(path, dpi=150)
