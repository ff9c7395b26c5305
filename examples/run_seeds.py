"""Fine-tunes with several optimizers and seeds: the published table in one command.

    python examples/run_seeds.py --optims MFAC adamw --seeds 5 -- \
        --model_name_or_path prajjwal1/bert-tiny --task_name qqp --do_train --do_eval \
        --per_device_train_batch_size 32 --learning_rate 1e-4 --num_train_epochs 5 \
        --output_dir seeds_out

What follows `--` are flags of `run_glue.py`, or of `run_qa.py` with `--script run_qa`.
It runs once for every optimizer and seed, in OUTPUT_DIR/OPTIMIZER/seed-SEED. The same
command after an interruption goes on where it stopped. The result is a table of means
and standard deviations beside the published ones (`published_results.csv`), in
seeds.md, seeds.json (with the lines of every run's metrics.jsonl) and seeds.png.
"""

import argparse
import csv
import dataclasses
import datetime
import importlib.metadata
import json
import math
import platform
import shlex
import statistics
import sys
import types
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import jax
import run_glue
import run_qa
from bert_finetune import cli
from bert_finetune.arguments import (
    Arguments,
    GlueArguments,
    QaArguments,
    parse_arguments,
)
from bert_finetune.errors import Interrupted, UserError
from bert_finetune.files import read_json_lines, write_json
from bert_finetune.reporting.plots import plot_bands
from bert_finetune.training import optimizers

SCRIPTS = {"run_glue": (run_glue, GlueArguments), "run_qa": (run_qa, QaArguments)}

PUBLISHED = Path(__file__).with_name("published_results.csv")
PUBLISHED_OPTIMIZERS = {"MFAC": "M-FAC", "adamw": "Adam", "adam": "Adam"}
# How names begin of what an evaluation says beside its metrics, and of SQuAD's details.
NOT_METRICS = ("runtime", "samples", "steps_per", "total", "HasAns", "NoAns", "best")
PACKAGES = ("mfac_jax", "jax", "jaxlib", "optax", "flax", "numpy", "transformers")


class Run(NamedTuple):
    """One optimizer with one seed."""

    script: types.ModuleType
    optim: str
    seed: int
    argv: list[str]
    args: Arguments

    @property
    def directory(self) -> Path:
        return Path(self.args.output_dir)


def main(argv: Sequence[str] | None = None) -> None:
    """Does the runs that are not finished, then writes and prints the table.

    Raises:
      UserError: before the first run, for flags that cannot be used or that differ from
        those of a run in the same directory; and whatever stops a run.
    """
    argv = sys.argv[1:] if argv is None else list(argv)
    base, runs = parse_grid(argv)
    finished = [is_finished(run) for run in runs]
    for number, (run, skip) in enumerate(zip(runs, finished, strict=True), start=1):
        state = f" is finished in {run.directory}" if skip else ""
        print(f"Run {number} of {len(runs)}: {run.optim}, seed {run.seed}{state}.")
        if skip:
            continue
        try:
            run.script.main(run.argv)
        except Interrupted as error:
            message = f"{error} The same command of run_seeds.py continues the grid."
            raise Interrupted(message, error.exit_code) from error
    report(base, runs, shlex.join(["python", "examples/run_seeds.py", *argv]))


def parse_grid(argv: Sequence[str]) -> tuple[Arguments, list[Run]]:
    """Parses the flags; returns those that all runs share, and the runs.

    Raises:
      UserError: naming the flag, or whatever is wrong with those of one of the runs.
    """
    parser = argparse.ArgumentParser(
        description=__doc__.splitlines()[0],  # pyright: ignore[reportOptionalMemberAccess]
        usage="%(prog)s [--script S] --optims NAME[=JSON] ... --seeds N -- ARGUMENTS",
        allow_abbrev=False,
    )
    parser.add_argument(
        "--script",
        choices=SCRIPTS,
        default="run_glue",
        help="What runs; run_glue by default.",
    )
    parser.add_argument(
        "--optims",
        nargs="+",
        required=True,
        metavar="NAME[=JSON]",
        help="Optimizers, each optionally with an --optim_args of its own, for example "
        "'MFAC={\"num_grads\": 512}'.",
    )
    parser.add_argument(
        "--seeds",
        type=int,
        required=True,
        metavar="N",
        help="Number of seeds, counted from the --seed of ARGUMENTS, or 0.",
    )
    end = argv.index("--") if "--" in argv else len(argv)
    options, unknown = parser.parse_known_args(argv[:end])
    shared = list(argv[end + 1 :])
    if not shared:
        raise UserError(
            f"the arguments of {options.script}.py are missing: give them after --."
        )
    if unknown:
        parser.error(f"unrecognized arguments before --: {' '.join(unknown)}")
    if options.seeds < 1:
        raise UserError(f"--seeds must be at least 1, got {options.seeds}.")
    # The last of two equal flags counts: a default goes before, a fixed value after.
    script, kind = SCRIPTS[options.script]
    base = parse_arguments(kind, ["--seed", "0", *shared])
    if not (base.do_train and base.do_eval):
        raise UserError("--do_train and --do_eval are needed after --.")
    if base.overwrite_output_dir or base.resume_from_checkpoint:
        raise UserError(
            "--overwrite_output_dir and --resume_from_checkpoint are not for several "
            "runs: finished ones are kept and interrupted ones go on by themselves."
        )
    optims: dict[str, list[str]] = {}
    for name, given, optim_args in (entry.partition("=") for entry in options.optims):
        if name in optims:
            raise UserError(f"--optims has {name} twice; both would be in {name}/.")
        optims[name] = ["--optim_args", optim_args] if given else []
    runs = []
    # Seed by seed, so that the optimizers can be compared early.
    for seed in range(base.seed, base.seed + options.seeds):
        for optim, optim_flags in optims.items():
            directory = Path(base.output_dir, optim, f"seed-{seed}")
            run_argv = ["--eval_strategy", "epoch", *shared, "--optim", optim]
            run_argv += [*optim_flags, "--seed", str(seed)]
            run_argv += ["--output_dir", str(directory)]
            run = Run(script, optim, seed, run_argv, parse_arguments(kind, run_argv))
            # A mistake in the last optimizer must not show after the first ones' runs.
            optimizers.parse_hyperparams(run.args)
            runs.append(run)
    return base, runs


def is_finished(run: Run) -> bool:
    """Says whether the run was done before.

    Raises:
      UserError: if its directory holds a run with other flags, finished or not.
    """
    path = run.directory / "arguments.json"
    if not path.exists():
        return False
    before = json.loads(path.read_text())
    now = dataclasses.asdict(run.args)
    # The directory is the same one, however its path was spelled.
    changes = [
        f"--{name} was {before.get(name)!r}, now {now.get(name)!r}"
        for name in sorted((before.keys() | now.keys()) - {"output_dir"})
        if before.get(name) != now.get(name)
    ]
    if changes:
        raise UserError(
            f"{run.directory} holds a run with other flags: {'; '.join(changes)}. Use "
            "another --output_dir."
        )
    return (run.directory / "all_results.json").exists()


def report(base: Arguments, runs: Sequence[Run], command: str) -> None:
    """Writes the table and the plot of finished runs, and prints the table."""
    model = Path(base.model_name_or_path).name.lower().replace("_", "-")
    task = base.data_name
    optimizers = summarize(runs, published_results(model, task))
    table = make_table(optimizers)
    root = Path(base.output_dir)
    seeds = sorted({run.seed for run in runs})
    versions = {name: importlib.metadata.version(name) for name in PACKAGES}
    write_json(
        root / "seeds.json",
        {
            "model": model,
            "task": task,
            "seeds": seeds,
            "optimizers": optimizers,
            "command": command,
            "date": datetime.date.today().isoformat(),
            "device": jax.devices()[0].device_kind,
            "versions": {"python": platform.python_version(), **versions},
        },
    )
    title = f"{model} on {task}"
    notes = [
        f"Published {name}: {source}."
        for name, source in published_sources(optimizers).items()
    ]
    paragraphs = [
        f"# {title}",
        "Mean ± sample standard deviation on the validation split, in percent except "
        f"the loss; seeds: {', '.join(map(str, seeds))}.",
        table,
        *notes,
        f"```bash\n{command}\n```",
    ]
    (root / "seeds.md").write_text("\n\n".join(paragraphs) + "\n", encoding="utf-8")
    groups = {
        optim: [run["lines"] for run in summary["runs"].values()]
        for optim, summary in optimizers.items()
    }
    plot_bands(root / "seeds.png", title, groups, metric_names(optimizers))
    print("\n".join(["", table, "", *notes]))
    print(f"The table and the curves are in {root}, as seeds.md, .json and .png.")


def published_results(model: str, task: str) -> dict[str, dict[str, dict[str, Any]]]:
    """Returns what is published, as shares of 1, by name of optimizer and metric."""
    results: dict[str, dict[str, dict[str, Any]]] = {}
    with open(PUBLISHED, newline="", encoding="utf-8") as file:
        for row in csv.DictReader(file):
            if (row["model"], row["task"]) == (model, task):
                results.setdefault(row["optimizer"], {})[row["metric"]] = {
                    # In decimal: 77.58 / 100 is not the number nearest to 0.7758.
                    "mean": float(f"{row['mean']}e-2"),
                    "std": float(f"{row['std']}e-2"),
                    "num_grads": int(row["num_grads"]) if row["num_grads"] else None,
                    "epochs": int(row["epochs"]) if row["epochs"] else None,
                    "source": row["source"],
                }
    return results


def summarize(
    runs: Sequence[Run], published: Mapping[str, Mapping[str, Mapping[str, Any]]]
) -> dict[str, dict[str, Any]]:
    """Returns by optimizer its runs and metrics, and the published metrics."""
    optimizers: dict[str, dict[str, Any]] = {}
    for run in runs:
        summary = optimizers.setdefault(
            run.optim,
            {
                "arguments": arguments_of(run),
                "runs": {},
                "metrics": {},
                "published": published.get(PUBLISHED_OPTIMIZERS.get(run.optim, ""), {}),
            },
        )
        results = json.loads((run.directory / "all_results.json").read_text())
        lines = read_json_lines(run.directory / "metrics.jsonl")
        summary["runs"][str(run.seed)] = {**results, "lines": lines}
        # SQuAD's are in percent.
        whole = 100 if isinstance(run.args, QaArguments) else 1
        for key, value in results.items():
            name = key.removeprefix("eval_")
            if name != key and not name.startswith(NOT_METRICS):
                metric = summary["metrics"].setdefault(name, {"values": {}})
                metric["values"][str(run.seed)] = value / whole
    for summary in optimizers.values():
        for metric in summary["metrics"].values():
            values = list(metric["values"].values())
            metric["mean"] = statistics.mean(values)
            metric["std"] = None
            if len(values) > 1:
                # Of NaN, a correlation without variance, `statistics` fails.
                finite = math.isfinite(metric["mean"])
                metric["std"] = statistics.stdev(values) if finite else math.nan
    return optimizers


def arguments_of(run: Run) -> dict[str, Any]:
    """Returns the arguments that a run has in common with those of other seeds."""
    arguments = dataclasses.asdict(run.args)
    return {k: v for k, v in arguments.items() if k not in ("seed", "output_dir")}


def metric_names(optimizers: Mapping[str, Mapping[str, Any]]) -> list[str]:
    """Returns the metrics of all optimizers, in the order of the results."""
    return list(dict.fromkeys(n for s in optimizers.values() for n in s["metrics"]))


def published_sources(optimizers: Mapping[str, Mapping[str, Any]]) -> dict[str, str]:
    """Returns by published optimizer where its numbers are from, and its setting."""
    sources = {}
    for optim, summary in optimizers.items():
        for result in summary["published"].values():
            details = [result["source"]]
            if result["num_grads"]:
                details.append(f"num_grads {result['num_grads']}")
            if result["epochs"]:
                details.append(f"{result['epochs']} epochs")
            sources[PUBLISHED_OPTIMIZERS[optim]] = ", ".join(details)
    return sources


def make_table(optimizers: Mapping[str, Mapping[str, Any]]) -> str:
    """Makes a Markdown table: optimizers, each above what is published, by metrics."""
    metrics = metric_names(optimizers)
    rows = [["", *metrics]]
    for optim, summary in optimizers.items():
        results = {optim: summary["metrics"]}
        if summary["published"]:
            results[f"{PUBLISHED_OPTIMIZERS[optim]}, published"] = summary["published"]
        for label, by_metric in results.items():
            cells = [
                format_result(name, by_metric[name]) if name in by_metric else ""
                for name in metrics
            ]
            rows.append([label, *cells])
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    lines = [
        [row[0].ljust(widths[0])]
        + [cell.rjust(width) for cell, width in zip(row[1:], widths[1:], strict=True)]
        for row in rows
    ]
    lines.insert(
        1, ["-" * widths[0], *("-" * (width - 1) + ":" for width in widths[1:])]
    )
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def format_result(metric: str, result: Mapping[str, Any]) -> str:
    """Formats mean and deviation, in percent unless it is a loss."""
    scale, digits = (1, 4) if metric.startswith("loss") else (100, 2)
    values = [v for v in (result["mean"], result["std"]) if v is not None]
    return " ± ".join(f"{scale * value:.{digits}f}" for value in values)


if __name__ == "__main__":
    cli.run_script(main, "the same command continues the grid.")
