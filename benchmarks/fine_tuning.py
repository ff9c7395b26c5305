r"""Table and pictures of fine-tuning, from `results/fine_tuning.jsonl`.

    python examples/run_seeds.py ... -- ... --output_dir seeds_out
    python benchmarks/fine_tuning.py add seeds_out/seeds.json --name qqp-1500-mfac
    python benchmarks/fine_tuning.py table 'qqp-1500-*'
    python benchmarks/fine_tuning.py pictures

`add` appends a row per optimizer of a finished `run_seeds.py`: settings, the results
and curves of all seeds, and the command. `table` prints the rows whose names match, in
Markdown, with the settings that differ. `pictures` draws the pictures of the
documentation.
"""

import argparse
import dataclasses
import fnmatch
import json
import statistics
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import run_seeds
import tables
from matplotlib.figure import Figure
from pictures import COLORS, PICTURES, label_ends, save

RESULTS = tables.RESULTS / "fine_tuning.jsonl"
# The mean of accuracy and F1.
NOT_SHOWN = "combined_score"
COUNTERS = ("num_raised", "num_rejected", "num_dropped")
# Flags that do not change what is learned, or that have a field of their own.
NOT_SETTINGS = set(
    "model_name_or_path dataset_name task_name optim optim_args learning_rate do_train "
    "do_eval per_device_eval_batch_size logging_steps eval_strategy eval_steps "
    "save_strategy save_steps".split()
)


def make_row(name: str, content: Mapping[str, Any], optimizer: str) -> tables.Row:
    """Returns the row of an optimizer in the content of a `seeds.json`."""
    summary = content["optimizers"][optimizer]
    metrics = {k: m for k, m in summary["metrics"].items() if k != NOT_SHOWN}
    seeds = {}
    for seed, run in summary["runs"].items():
        seeds[seed] = {k: m["values"][seed] for k, m in metrics.items()}
        for key in ("train_loss", "train_runtime", *COUNTERS):
            if key in run:
                seeds[seed][key] = run[key]
        lines = run["lines"]
        seeds[seed]["train"] = make_curve(lines, {"loss": "loss"})
        seeds[seed]["eval"] = make_curve(lines, {m: f"eval_{m}" for m in metrics})
    kept = ("date", "device", "model", "versions", "command")
    return {
        "name": name,
        "task": content["task"],
        "optimizer": optimizer,
        "settings": settings_of(summary["arguments"]),
        "seeds": seeds,
        **{key: content[key] for key in kept},
    }


def make_curve(
    lines: Sequence[Mapping[str, float]], names: Mapping[str, str]
) -> dict[str, list[float]]:
    """Returns steps and metrics of the lines of a `metrics.jsonl` that have a loss."""
    found = [line for line in lines if names["loss"] in line]
    curve = {"step": [line["step"] for line in found]}
    for metric, name in names.items():
        if found and all(name in line for line in found):
            curve[metric] = [round(line[name], 5) for line in found]
    return curve


def settings_of(arguments: Mapping[str, Any]) -> dict[str, Any]:
    """Returns learning rate, hyperparameters, and flags that are not the default."""
    kinds = [kind for _, kind in run_seeds.SCRIPTS.values()]
    defaults = {(f.name, f.default) for kind in kinds for f in dataclasses.fields(kind)}
    flags = {
        name: value
        for name, value in arguments.items()
        if name not in NOT_SETTINGS and (name, value) not in defaults
    }
    hyperparameters = json.loads(arguments["optim_args"] or "{}")
    return {"lr": arguments["learning_rate"], **hyperparameters, **flags}


def print_table(rows: Sequence[tables.Row]) -> None:
    """Prints rows in Markdown, with the settings that differ."""
    settings = [{"optimizer": row["optimizer"], **row["settings"]} for row in rows]
    names = list(dict.fromkeys(name for setting in settings for name in setting))
    names = [n for n in names if len({str(s.get(n)) for s in settings}) > 1]
    known = {key for row in rows for seed in row["seeds"].values() for key in seed}
    metrics = [m for m in ("accuracy", "f1", "exact", "loss") if m in known]
    titles = ["name", *names, "seeds", *metrics, "training loss"]
    print("| " + " | ".join(titles) + " |")
    print("| --- |" + " ---: |" * (len(titles) - 1))
    for row, setting in zip(rows, settings, strict=True):
        seeds = row["seeds"].values()
        cells = [row["name"], *(format_setting(setting.get(name)) for name in names)]
        cells.append(str(len(seeds)))
        for metric in metrics:
            values = [seed[metric] for seed in seeds if metric in seed]
            if not values:
                cells.append("")
                continue
            std = statistics.stdev(values) if len(values) > 1 else None
            result = {"mean": statistics.mean(values), "std": std}
            cells.append(run_seeds.format_result(metric, result))
        cells.append(f"{statistics.mean(seed['train_loss'] for seed in seeds):.4f}")
        print("| " + " | ".join(cells) + " |")


def format_setting(value: Any) -> str:
    """Formats a value for a cell; what an optimizer does not have is empty."""
    if value is None:
        return ""
    return f"{value:g}" if isinstance(value, float) else str(value)


class Line(NamedTuple):
    """A row in the pictures: where it is, and how it looks."""

    label: str
    name: str
    optimizer: str
    color: str
    width: float
    style: str = "-"


LINES = (
    Line("AdamW, published rate", "qqp-1500-adamw", "adamw", "0.45", 1.2, ":"),
    Line("M-FAC, as published", "qqp-1500-mfac", "MFAC", COLORS["mfac"], 1.8, "--"),
    Line("AdamW, tuned", "recipe-qqp-1500", "adamw", COLORS["adamw"], 1.8),
    Line("adam_mfac", "recipe-qqp-1500", "adam_mfac", COLORS["adam_mfac"], 2.8),
)


def values_of(
    rows: Sequence[tables.Row], line: Line, curve: str, metric: str
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Returns steps, and mean and standard deviation over the seeds at each."""
    (row,) = (r for r in rows if (r["name"], r["optimizer"]) == line[1:3])
    curves = [seed[curve] for seed in row["seeds"].values()]
    values = np.array([c[metric] for c in curves])
    steps = np.array(curves[0]["step"])
    return steps, values.mean(axis=0), values.std(axis=0, ddof=1)


def plot_training(rows: Sequence[tables.Row], path: Path) -> None:
    """Draws training loss against steps, mean ± one standard deviation."""
    figure = Figure(figsize=(7, 4), layout="constrained")
    axes = figure.subplots()
    ends = {}
    for line in LINES:
        # Without the first point, which is the loss of a single batch.
        steps, mean, std = (x[1:] for x in values_of(rows, line, "train", "loss"))
        axes.fill_between(
            steps, mean - std, mean + std, color=line.color, alpha=0.15, lw=0
        )
        axes.plot(steps, mean, color=line.color, lw=line.width, ls=line.style)
        ends[line.label] = mean[-1], line.color
    axes.set(
        title="Fine-tuning BERT-tiny on QQP, 3 seeds",
        xlabel="Step",
        ylabel="Training loss (mean of 100 steps)",
        xlim=(0, 1500),
        xticks=range(0, 1501, 300),
    )
    label_ends(axes, ends, gap=0.08)
    save(figure, path)


def plot_validation(rows: Sequence[tables.Row], path: Path) -> None:
    """Draws validation metrics half-way and at the end, ± one standard deviation."""
    figure = Figure(figsize=(9, 2.6), layout="constrained")
    figure.suptitle("QQP, validation: ○ after 750 steps, ● after 1,500 (3 seeds)")
    panels = figure.subplots(1, 3, sharey=True)
    titles = {"accuracy": "Accuracy (%)", "f1": "F1 (%)", "loss": "Loss"}
    for axes, (metric, title) in zip(panels, titles.items(), strict=True):
        scale = 1 if metric == "loss" else 100
        for height, line in enumerate(LINES):
            _, mean, std = values_of(rows, line, "eval", metric)
            for i, shift, fill in ((0, -0.15, "white"), (1, 0.15, line.color)):
                axes.errorbar(
                    scale * mean[i],
                    height + shift,
                    xerr=scale * std[i],
                    fmt="o",
                    color=line.color,
                    mfc=fill,
                )
        axes.set(xlabel=title, yticks=range(len(LINES)), ylim=(-0.6, len(LINES) - 0.4))
    panels[0].set_yticklabels([line.label for line in LINES])
    for tick, line in zip(panels[0].get_yticklabels(), LINES, strict=True):
        tick.set_color(line.color)
    save(figure, path)


def main() -> None:
    """Adds rows, prints the table or draws the pictures."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    commands = parser.add_subparsers(dest="command", required=True)
    add = commands.add_parser("add", help="Append the rows of a fresh run.")
    add.add_argument("path", type=Path, metavar="seeds.json")
    add.add_argument("--name", help="Of the rows; by default that of the directory.")
    table = commands.add_parser("table", help="Print rows in Markdown.")
    table.add_argument("names", nargs="+", help="Patterns such as 'qqp-1500-*'.")
    commands.add_parser("pictures", help="Draw the pictures of docs/results.md.")
    args = parser.parse_args()
    if args.command == "add":
        content = json.loads(args.path.read_text())
        name = args.name or args.path.resolve().parent.name
        lines = [
            tables.format_row(make_row(name, content, optimizer))
            for optimizer in content["optimizers"]
        ]
        with RESULTS.open("a") as file:
            file.writelines(lines)
        return
    rows = tables.read_rows(RESULTS)
    if args.command == "pictures":
        PICTURES.mkdir(parents=True, exist_ok=True)
        plot_training(rows, PICTURES / "qqp.png")
        plot_validation(rows, PICTURES / "qqp-1500.png")
        return
    chosen = [
        row for row in rows if any(fnmatch.fnmatch(row["name"], n) for n in args.names)
    ]
    if not chosen:
        parser.error(f"no row is named {' or '.join(args.names)}")
    print_table(chosen)


if __name__ == "__main__":
    main()
