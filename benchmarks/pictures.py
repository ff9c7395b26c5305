"""What the pictures share: colors, labels at the ends of lines, and the format."""

import io
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from matplotlib.figure import Figure
from PIL import Image

PICTURES = Path(__file__).parents[1] / "docs" / "_static"
# Okabe and Ito's, which color-blind readers can tell apart.
COLORS = {
    "adam_mfac": "#D55E00",
    "adamw": "#0072B2",
    "mfac": "#009E73",
    "muon": "#CC79A7",
    "adamw_b2_0.99": "#56B4E9",
    "sgd": "#E69F00",
    "lion": "#555555",
}


def label_ends(axes: Any, ends: Mapping[str, tuple[float, str]], gap: float) -> None:
    """Writes labels next to the right edge of axes, at least `gap` apart.

    Args:
      axes: With their final limits; nothing else is to the right of them.
      ends: By label the height at which its line ends, in data units, and its color.
      gap: Least distance of two labels, as a fraction of the height of the axes.
    """
    low, high = axes.get_ylim()
    order = sorted(ends, key=lambda label: ends[label][0])
    heights = [(ends[label][0] - low) / (high - low) for label in order]
    # Labels that are too close form a block around the mean of their heights.
    blocks = [[height] for height in heights]
    i = 0
    while i + 1 < len(blocks):
        if _bottom(blocks[i + 1], gap) - _top(blocks[i], gap) < gap - 1e-9:
            blocks[i : i + 2] = [blocks[i] + blocks[i + 1]]
            i = max(0, i - 1)
        else:
            i += 1
    places = [
        _bottom(block, gap) + gap * k for block in blocks for k in range(len(block))
    ]
    for label, height, place in zip(order, heights, places, strict=True):
        axes.annotate(
            label,
            xy=(1, height),
            xytext=(1.04, place),
            xycoords="axes fraction",
            va="center",
            color=ends[label][1],
            annotation_clip=False,
            arrowprops={
                "arrowstyle": "-",
                "color": ends[label][1],
                "lw": 0.8,
                "shrinkA": 0,
                "shrinkB": 2,
                "relpos": (0, 0.5),
            },
        )


def save(figure: Figure, path: Path) -> None:
    """Adds a light grid and writes a PNG of few colors, which is a third as large."""
    for axes in figure.axes:
        axes.grid(color="0.9", lw=0.8)
        axes.set_axisbelow(True)
        axes.spines[["top", "right"]].set_visible(False)
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png", dpi=200)
    Image.open(buffer).convert("RGB").quantize(128).save(path, optimize=True)


def _bottom(block: list[float], gap: float) -> float:
    return sum(block) / len(block) - gap * (len(block) - 1) / 2


def _top(block: list[float], gap: float) -> float:
    return sum(block) / len(block) + gap * (len(block) - 1) / 2
