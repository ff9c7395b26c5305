"""Fine-tunes with several optimizers and seeds, as for the published tables.

    python examples/run_seeds.py --optims MFAC adamw --seeds 5 -- \
        --model_name_or_path prajjwal1/bert-tiny --task_name qqp --do_train --do_eval \
        --per_device_train_batch_size 32 --learning_rate 1e-4 --num_train_epochs 5 \
        --output_dir seeds_out

Passes the flags after `--` to `run_glue.py`, or to `run_qa.py` with `--script run_qa`,
and runs it once per optimizer and seed, in OUTPUT_DIR/OPTIMIZER/seed-SEED. Rerun the
same command to resume after an interruption. Tabulates means and standard deviations
next to the published ones (`published_results.csv`) in seeds.md, seeds.json (with the
lines of every run's metrics.jsonl) and seeds.png.
"""

import argparse
import csv
import dataclasses
import datetime
import json
import shlex
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import jax
import numpy as np
import run_glue
import run_qa
from bert_finetune import arguments as flags
from bert_finetune import cli
from bert_finetune.errors import Interrupted, UserError
from bert_finetune.files import (
    read_json_lines,
    read_numbers,
    write_json,
    write_text,
)
from bert_finetune.reporting.model_card import versions
from bert_finetune.reporting.plots import plot_bands
from bert_finetune.training.optimizers import parse_hyperparams

SCRIPTS = {
    "run_glue": (run_glue, flags.GlueArguments),
    "run_qa": (run_qa, flags.QaArguments),
}
PUBLISHED = Path(__file__).with_name("published_results.csv")
PUBLISHED_OPTIMIZERS = {"MFAC": "M-FAC", "adamw": "Adam", "adam": "Adam"}
# Prefixes of results that are not metrics, and of SQuAD's details.
NOT_METRICS = ("runtime", "samples", "steps_per", "total", "HasAns", "NoAns", "best")


class Run(NamedTuple):
    """One optimizer with one seed."""

    argv: list[str]
    args: flags.Arguments


def main(argv: Sequence[str] | None = None) -> None:
    """Runs what is not finished, then writes and prints the table.

    Raises a UserError before the first run if a flag is invalid or differs from the
    flags of an earlier run in the same directory.
    """
    argv = sys.argv[1:] if argv is None else list(argv)
    options = parse_options(argv)
    base, runs = make_runs(options)
    finished = [is_finished(run) for run in runs]
    for number, (run, skip) in enumerate(zip(runs, finished, strict=True), start=1):
        state = f" is finished in {run.args.output_dir}" if skip else ""
        name = f"{run.args.optim}, seed {run.args.seed}"
        print(f"Run {number} of {len(runs)}: {name}{state}.")
        if skip:
            continue
        try:
            SCRIPTS[options.script][0].main(run.argv)
        except Interrupted as error:
            message = f"{error} The same run_seeds.py command continues the grid."
            raise Interrupted(message, error.exit_code) from error
    report(base, runs, shlex.join(["python", "examples/run_seeds.py", *argv]))


def parse_options(argv: Sequence[str]) -> argparse.Namespace:
    """Parses the flags; ``arguments`` holds the flags of the runs."""
    usage = "%(prog)s [--script S] --optims NAME[=JSON] ... --seeds N -- ARGUMENTS"
    what = "Fine-tunes with several optimizers and seeds."
    parser = argparse.ArgumentParser(usage=usage, description=what, allow_abbrev=False)
    add = parser.add_argument
    add(
        "--script",
        choices=SCRIPTS,
        default="run_glue",
        help="script to run (default: run_glue)",
    )
    optim_args = "optimizers, with optional --optim_args: 'MFAC={\"num_grads\": 512}'"
    add("--optims", nargs="+", required=True, help=optim_args)
    add(
        "--seeds",
        type=int,
        required=True,
        help="number of seeds; the first is --seed, or 0",
    )
    add("arguments", nargs="+", metavar="ARGUMENTS", help="flags of the script")
    options = parser.parse_args(argv)
    if options.seeds < 1:
        raise UserError(f"--seeds must be at least 1, got {options.seeds}.")
    return options


def make_runs(options: argparse.Namespace) -> tuple[flags.Arguments, list[Run]]:
    """Returns the parsed flags that all runs share, and the runs."""
    # The last occurrence of a flag counts: defaults go first, fixed values last.
    shared, (_, kind) = options.arguments, SCRIPTS[options.script]
    base = flags.parse_arguments(kind, ["--seed", "0", *shared])
    if not (base.do_train and base.do_eval):
        raise UserError("--do_train and --do_eval are needed after --.")
    if base.overwrite_output_dir or base.resume_from_checkpoint:
        raise UserError(
            "--overwrite_output_dir and --resume_from_checkpoint are for single runs: "
            "here finished runs are kept and interrupted runs resume automatically."
        )
    if base.is_distributed:
        raise UserError("--distributed is for single runs of run_glue.py or run_qa.py.")
    own_flags: dict[str, list[str]] = {}
    for name, given, optim_args in (entry.partition("=") for entry in options.optims):
        if name in own_flags:
            raise UserError(f"--optims has {name} twice; both would write to {name}/.")
        own_flags[name] = ["--optim_args", optim_args] if given else []
    runs = []
    # Seed by seed, so that the optimizers can be compared early.
    for seed in range(base.seed, base.seed + options.seeds):
        for optim, own in own_flags.items():
            directory = Path(base.output_dir, optim, f"seed-{seed}")
            argv = ["--eval_strategy", "epoch", *shared, "--optim", optim, *own]
            argv += ["--seed", str(seed), "--output_dir", str(directory)]
            runs.append(Run(argv, flags.parse_arguments(kind, argv)))
            # Reports a mistake in the last optimizer before the first run.
            parse_hyperparams(runs[-1].args)
    return base, runs


def is_finished(run: Run) -> bool:
    """Returns whether the run is finished; raises if its flags were different."""
    directory = Path(run.args.output_dir)
    path = directory / "arguments.json"
    if not path.exists():
        return False
    before, now = json.loads(path.read_text()), dataclasses.asdict(run.args)
    # The same directory may be spelled differently.
    changes = [
        f"--{name} was {before.get(name)!r}, now {now.get(name)!r}"
        for name in sorted((before.keys() | now.keys()) - {"output_dir"})
        if before.get(name) != now.get(name)
    ]
    if changes:
        what = f"{directory} holds a run with other flags: {'; '.join(changes)}"
        raise UserError(f"{what}. Use another --output_dir.")
    return (directory / "all_results.json").exists()


def report(base: flags.Arguments, runs: Sequence[Run], command: str) -> None:
    """Writes the table and the plot of finished runs, and prints the table."""
    model = Path(base.model_name_or_path).name.lower().replace("_", "-")
    summaries = summarize(runs, published_results(model, base.data_name))
    root, title = Path(base.output_dir), f"{model} on {base.data_name}"
    seeds = sorted({run.args.seed for run in runs})
    content = {
        "model": model,
        "task": base.data_name,
        "seeds": seeds,
        "optimizers": summaries,
        "command": command,
        "date": datetime.date.today().isoformat(),
        "device": jax.devices()[0].device_kind,
        "versions": versions(),
    }
    write_json(root / "seeds.json", content)
    table = "\n\n".join([make_table(summaries), *published_notes(summaries)])
    text = (
        f"# {title}\n\nMean ± sample standard deviation on the validation split, in "
        f"percent except the loss; seeds: {', '.join(map(str, seeds))}.\n\n{table}\n\n"
        f"```bash\n{command}\n```\n"
    )
    write_text(root / "seeds.md", text)
    groups = {
        optim: [run["lines"] for run in s["runs"].values()]
        for optim, s in summaries.items()
    }
    plot_bands(root / "seeds.png", title, groups, metric_names(summaries))
    print(f"\n{table}\nThe table and curves are in {root}: seeds.md, .json and .png.")


def published_results(model: str, task: str) -> dict[str, dict[str, dict[str, Any]]]:
    """Returns the published results as fractions, by optimizer and metric."""
    results: dict[str, dict[str, dict[str, Any]]] = {}
    with open(PUBLISHED, newline="", encoding="utf-8") as file:
        for row in csv.DictReader(file):
            if (row["model"], row["task"]) == (model, task):
                results.setdefault(row["optimizer"], {})[row["metric"]] = {
                    # Scaled in decimal: 77.58 / 100 is not the float nearest to 0.7758.
                    "mean": float(f"{row['mean']}e-2"),
                    "std": float(f"{row['std']}e-2"),
                    "num_grads": int(row["num_grads"]) if row["num_grads"] else None,
                    "epochs": int(row["epochs"]) if row["epochs"] else None,
                    "source": row["source"],
                }
    return results


def summarize(runs: Sequence[Run], published: Mapping[str, Any]) -> dict[str, Any]:
    """Returns the runs, metrics and published metrics of each optimizer."""
    summaries: dict[str, dict[str, Any]] = {}
    for run in runs:
        arguments = dataclasses.asdict(run.args)
        seed, directory = arguments.pop("seed"), Path(arguments.pop("output_dir"))
        theirs = published.get(PUBLISHED_OPTIMIZERS.get(run.args.optim, ""), {})
        summary = summaries.setdefault(
            run.args.optim, {"arguments": arguments, "runs": {}, "published": theirs}
        )
        results = read_numbers((directory / "all_results.json").read_text())
        lines = read_json_lines(directory / "metrics.jsonl")
        summary["runs"][str(seed)] = {**results, "lines": lines}
    full_score = 100 if isinstance(runs[0].args, flags.QaArguments) else 1
    for summary in summaries.values():
        summary["metrics"] = metrics_of(summary["runs"], full_score)
    return summaries


def metrics_of(runs: Mapping[str, Any], full_score: float) -> dict[str, Any]:
    """Returns each metric's values by seed, mean and standard deviation."""
    metrics = {}
    for key in next(iter(runs.values())):
        name = key.removeprefix("eval_")
        if name == key or name.startswith(NOT_METRICS):
            continue
        values = {seed: run[key] / full_score for seed, run in runs.items()}
        array = np.array([*values.values()])
        with np.errstate(invalid="ignore"):  # A seed may have diverged.
            std = float(array.std(ddof=1)) if len(array) > 1 else None
        metrics[name] = {"values": values, "mean": float(array.mean()), "std": std}
    return metrics


def metric_names(summaries: Mapping[str, Mapping[str, Any]]) -> list[str]:
    """Returns the metrics of all optimizers, in the order of the results."""
    return list(dict.fromkeys(n for s in summaries.values() for n in s["metrics"]))


def published_notes(summaries: Mapping[str, Mapping[str, Any]]) -> list[str]:
    """Returns the source of each optimizer's published results."""
    notes = {}
    for optim, summary in summaries.items():
        for result in summary["published"].values():
            name, text = PUBLISHED_OPTIMIZERS[optim], result["source"]
            if result["num_grads"]:
                text += f", num_grads {result['num_grads']}"
            if result["epochs"]:
                text += f", {result['epochs']} epochs"
            notes[name] = f"Published {name}: {text}."
    return list(notes.values())


def make_table(summaries: Mapping[str, Mapping[str, Any]]) -> str:
    """Returns a Markdown table of metrics, ours above the published ones."""
    names = metric_names(summaries)
    rows = [["", *names]]
    for optim, summary in summaries.items():
        results = {optim: summary["metrics"]}
        if summary["published"]:
            results[f"{PUBLISHED_OPTIMIZERS[optim]}, published"] = summary["published"]
        for label, found in results.items():
            cells = [format_result(n, found[n]) if n in found else "" for n in names]
            rows.append([label, *cells])
    first, *others = [max(map(len, column)) for column in zip(*rows, strict=True)]
    rows.insert(1, ["-" * first, *("-" * (width - 1) + ":" for width in others)])
    aligned = [[row[0].ljust(first), *map(str.rjust, row[1:], others)] for row in rows]
    return "\n".join(f"| {' | '.join(row)} |" for row in aligned)


def format_result(metric: str, result: Mapping[str, Any]) -> str:
    """Formats mean and standard deviation, in percent unless it is a loss."""
    scale, digits = (1, 4) if metric.startswith("loss") else (100, 2)
    values = [v for v in (result["mean"], result["std"]) if v is not None]
    return " ± ".join(f"{scale * value:.{digits}f}" for value in values)


if __name__ == "__main__":
    cli.run_script(main, "rerun the same command to continue the grid.")
