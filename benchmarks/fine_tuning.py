r"""The table and the curves of fine-tuned models, from what `run_seeds.py` has written.

    python examples/run_seeds.py ... -- ... --output_dir seeds_out
    python benchmarks/fine_tuning.py seeds_out/seeds.json

A row is an optimizer with its settings, those that are not the same in all rows. Give
the files of one task and one length of training; the curves are drawn into one picture.
"""

import argparse
import json
import statistics
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import run_seeds
from bert_finetune.reporting.plots import plot_bands

# Says nothing that accuracy and F1 do not say.
NOT_SHOWN = "combined_score"


def settings_of(summary: Mapping[str, Any]) -> dict[str, Any]:
    """Returns all that a run was told, the arguments of its optimizer among it."""
    arguments = dict(summary["arguments"])
    optim_args = json.loads(arguments.pop("optim_args") or "{}")
    learning_rate = arguments.pop("learning_rate")
    return {**arguments, "lr": learning_rate, **optim_args}


def format_setting(value: Any) -> str:
    """Formats a value for a cell; what an optimizer does not have is empty."""
    if value is None:
        return ""
    return f"{value:g}" if isinstance(value, float) else str(value)


def read_rows(paths: Sequence[Path]) -> list[Mapping[str, Any]]:
    """Returns what the files say of each optimizer."""
    return [
        summary
        for path in paths
        for summary in json.loads(path.read_text())["optimizers"].values()
    ]


def main() -> None:
    """Prints the table in Markdown; draws the curves."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("paths", nargs="+", type=Path, metavar="seeds.json")
    parser.add_argument("--picture", type=Path, help="Where to draw the curves (PNG).")
    parser.add_argument("--title", default="", help="Of the picture.")
    parser.add_argument("--names", nargs="+", help="Of the rows in the picture.")
    args = parser.parse_args()
    rows = read_rows(args.paths)
    settings = [settings_of(row) for row in rows]
    names = [
        name
        for name in dict.fromkeys(name for setting in settings for name in setting)
        if any(setting.get(name) != settings[0].get(name) for setting in settings)
    ]
    cells = [
        [format_setting(setting.get(name)) for name in names] for setting in settings
    ]
    labels = args.names or [" ".join(filter(None, values)) for values in cells]
    by_setting = dict(zip(labels, rows, strict=True))
    metrics = [m for m in run_seeds.metric_names(by_setting) if m != NOT_SHOWN]
    print("| " + " | ".join([*names, "seeds", *metrics, "training loss"]) + " |")
    print("| --- |" + " ---: |" * (len(names) + len(metrics) + 1))
    for values, row in zip(cells, rows, strict=True):
        losses = [run["train_loss"] for run in row["runs"].values()]
        results = [run_seeds.format_result(m, row["metrics"][m]) for m in metrics]
        loss = f"{statistics.mean(losses):.4f}"
        print("| " + " | ".join([*values, str(len(losses)), *results, loss]) + " |")
    groups = {
        name: [run["lines"] for run in row["runs"].values()]
        for name, row in by_setting.items()
    }
    if args.picture is not None:
        plot_bands(args.picture, args.title, groups, metrics)


if __name__ == "__main__":
    main()
