"""Compares optimizers on ten small tasks; only the learning rate is tuned.

    python benchmarks/optimizers.py run          # the rows missing in the table
    python benchmarks/optimizers.py report       # Markdown and performance profiles

`--optimizers adamw mfac` and `--tasks` choose rows. A row is an optimizer on a task.
Three seeds choose the best of five learning rates. Five others are reported, once with
the same number of steps and once with the same time as AdamW. Learning rates decay
linearly to zero. The loss is the held-out loss, or the final training loss of tasks
without held-out data; means over seeds are geometric.
"""

import argparse
import functools
import math
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax import lax
from matplotlib.figure import Figure
from pictures import COLORS, PICTURES, label_ends, save
from tables import RESULTS, append_row, read_rows
from tasks import CHOOSING, CONFIRMING, Task

import mfac_jax

TASKS = CHOOSING | CONFIRMING
CHOOSING_SEEDS, REPORTED_SEEDS = range(3), range(3, 8)
BASELINE = "adamw"
# Number of steps in a timing run.
TIMED_STEPS = 50


class Optimizer(NamedTuple):
    """Constructor of an optimizer from a schedule, and the learning rates to try."""

    make: Callable[[optax.Schedule], optax.GradientTransformation]
    rates: tuple[float, ...]


def rates(smallest: float) -> tuple[float, ...]:
    """Returns five learning rates, each about three times the previous one."""
    return tuple(float(f"{smallest * 10 ** (i / 2):.0e}") for i in range(5))


# Optax's defaults, and AdamW also with the β₂ of `adam_mfac`. M-FAC with 128 gradients
# trains like the published 1024 at the same `learning rate × num_grads`.
OPTIMIZERS = {
    "sgd": Optimizer(functools.partial(optax.sgd, momentum=0.9), rates(3e-3)),
    "adamw": Optimizer(optax.adamw, rates(1e-3)),
    "adamw_b2_0.99": Optimizer(functools.partial(optax.adamw, b2=0.99), rates(1e-3)),
    "lion": Optimizer(optax.lion, rates(1e-4)),
    "muon": Optimizer(optax.contrib.muon, rates(1e-3)),
    "mfac": Optimizer(functools.partial(mfac_jax.mfac, num_grads=128), rates(1e-3)),
    "adam_mfac": Optimizer(mfac_jax.adam_mfac, rates(1e-3)),
}

# Maps rates, seeds and a number of steps to losses.
Program = Callable[[Sequence[float], Sequence[int], int], np.ndarray]


def compile_program(task: Task, optimizer: Optimizer) -> Program:
    """Compiles a program that trains with several rates and seeds in sequence."""

    def train(rate, seed, num_steps):
        opt = optimizer.make(lambda count: rate * (1 - count / num_steps))
        init_key, data_key = jax.random.split(jax.random.key(seed))

        def step(i, carry):
            params, state = carry
            batch = task.batch(jax.random.fold_in(data_key, i))
            updates, state = opt.update(
                jax.grad(task.loss)(params, batch), state, params
            )
            return optax.apply_updates(params, updates), state

        params = task.init(init_key)
        params, _ = lax.fori_loop(0, num_steps, step, (params, opt.init(params)))
        return task.evaluate(params)

    # As fast as `vmap` here, and a step costs the same as in a single run. Under `vmap`
    # both branches of a conditional run.
    @jax.jit
    def run(rates, seeds, num_steps):
        return lax.map(lambda lane: train(lane[0], lane[1], num_steps), (rates, seeds))

    number = len(REPORTED_SEEDS)
    lane = jnp.zeros(number), jnp.zeros(number, jnp.int32), jnp.zeros((), jnp.int32)
    compiled = run.lower(*lane).compile()

    def program(rates, seeds, num_steps):
        losses = compiled(
            jnp.asarray(rates, jnp.float32),
            jnp.asarray(seeds, jnp.int32),
            jnp.asarray(num_steps, jnp.int32),
        )
        return np.nan_to_num(np.asarray(losses, np.float64), nan=np.inf)

    return program


def time_ratio(program: Program, baseline: Program) -> float:
    """Returns the time of a step relative to the baseline's, measured alternately."""

    def seconds(program):
        start = time.perf_counter()
        number = len(REPORTED_SEEDS)
        program([0.0] * number, [0] * number, TIMED_STEPS)
        return time.perf_counter() - start

    ratios = [seconds(program) / seconds(baseline) for _ in range(5)]
    return float(np.median(ratios))


def geometric_mean(losses: Sequence[float]) -> float:
    """Returns the geometric mean, which is infinite if a run diverged."""
    return float(np.exp(np.mean(np.log(losses))))


def measure(task: Task, optimizer: Optimizer, baseline: Program) -> dict[str, Any]:
    """Chooses the learning rate on some seeds and reports others."""
    program = compile_program(task, optimizer)
    pairs = [(rate, seed) for seed in CHOOSING_SEEDS for rate in optimizer.rates]
    number = len(REPORTED_SEEDS)
    chosen: dict[float, list[float]] = {rate: [] for rate in optimizer.rates}
    for start in range(0, len(pairs), number):
        lanes = pairs[start : start + number]
        these_rates, seeds = zip(*lanes, strict=True)
        losses = program(these_rates, seeds, task.num_steps)
        for (rate, _), loss in zip(lanes, losses, strict=True):
            chosen[rate].append(float(loss))
    best = min(chosen, key=lambda rate: geometric_mean(chosen[rate]))
    ratio = time_ratio(program, baseline)
    steps_in_time = max(1, round(task.num_steps / ratio))
    reported = [best] * number, list(REPORTED_SEEDS)
    return {
        "rate": best,
        "choosing": {f"{rate:g}": losses for rate, losses in chosen.items()},
        "losses": program(*reported, task.num_steps).tolist(),
        "time_ratio": ratio,
        "losses_in_time": program(*reported, steps_in_time).tolist(),
    }


def run(tasks: Sequence[str], optimizers: Sequence[str], path: Path) -> None:
    """Measures the rows that are missing in the table and appends them."""
    rows = by_task(read_rows(path))
    for task_name in tasks:
        missing = [name for name in optimizers if (task_name, name) not in rows]
        if not missing:
            continue
        task = TASKS[task_name]()
        baseline = compile_program(task, OPTIMIZERS[BASELINE])
        for name in missing:
            start = time.perf_counter()
            row = {"task": task_name, "optimizer": name, "num_steps": task.num_steps}
            row |= measure(task, OPTIMIZERS[name], baseline)
            row["seconds"] = round(time.perf_counter() - start, 1)
            append_row(path, row)
            print(
                f"{task_name:20} {name:14} rate {row['rate']:<7g} loss "
                f"{geometric_mean(row['losses']):.4g}, in AdamW's time "
                f"{geometric_mean(row['losses_in_time']):.4g} "
                f"({row['time_ratio']:.2f} times AdamW's time per step)",
                flush=True,
            )


Rows = Mapping[tuple[str, str], Mapping[str, Any]]


def by_task(rows: Sequence[Mapping[str, Any]]) -> Rows:
    """Returns rows by task and optimizer; later rows replace earlier ones."""
    return {(row["task"], row["optimizer"]): row for row in rows}


def log_ratio(row: Mapping[str, Any], other: Mapping[str, Any], key: str):
    """Returns mean and standard error of the log ratio over paired seeds."""
    difference = np.log(row[key]) - np.log(other[key])
    return np.mean(difference), np.std(difference, ddof=1) / math.sqrt(len(difference))


def print_table(rows: Rows, names: Sequence[str], key: str) -> None:
    """Prints losses relative to AdamW's in Markdown, with their standard errors."""
    print("| task | | AdamW | " + " | ".join(n for n in names if n != BASELINE) + " |")
    print("| --- | --- | ---: |" + " ---: |" * (len(names) - 1))
    for task in TASKS:
        baseline = rows[task, BASELINE]
        cells = [f"{geometric_mean(baseline[key]):.3g} [{baseline['rate']:g}]"]
        for name in names:
            if name == BASELINE:
                continue
            row = rows[task, name]
            if not np.all(np.isfinite(row[key])):
                cells.append("diverges")
                continue
            mean, error = log_ratio(row, baseline, key)
            cells.append(f"{math.exp(mean):.2f} ± {error:.2f} [{row['rate']:g}]")
        use = "choosing" if task in CHOOSING else "confirming"
        print(f"| `{task}` | {use} | " + " | ".join(cells) + " |")


def plot_profiles(rows: Rows, names: Sequence[str], path: Path) -> None:
    """Draws the share of tasks with a loss within a factor of the best one."""
    figure = Figure(figsize=(11, 4), layout="constrained")
    axes = figure.subplots(1, 2, sharey=True)
    for ax, key, title in zip(
        axes,
        ("losses", "losses_in_time"),
        ("Same number of steps", "Same time as AdamW"),
        strict=True,
    ):
        losses = np.array(
            [[geometric_mean(rows[t, n][key]) for n in names] for t in TASKS]
        )
        ratios = losses / losses.min(axis=1, keepdims=True)
        factors = np.geomspace(1, 100, 400)
        ends = {}
        for i, (name, of_tasks) in enumerate(zip(names, ratios.T, strict=True)):
            share = np.mean(of_tasks[None] <= factors[:, None], axis=1)
            # Slightly apart, because many lines have the same height.
            share += 0.004 * (3 - i)
            width = 2.6 if name == "adam_mfac" else 1.4
            ax.step(factors, share, where="post", color=COLORS[name], lw=width)
            ends[name] = share[-1], COLORS[name]
        ax.set(xscale="log", xlabel="Loss over the best optimizer's", title=title)
        ax.set(xlim=(1, 100), ylim=(-0.05, 1.05))
        ax.set_xticks([1, 10, 100], ["1", "10", "100"])
        label_ends(ax, ends, gap=0.06)
    axes[0].set(ylabel="Share of the ten tasks")
    save(figure, path)


def report(optimizers: Sequence[str], path: Path) -> None:
    """Prints tables and draws profiles of the optimizers with a row for every task."""
    rows = by_task(read_rows(path))
    names = [n for n in optimizers if all((task, n) in rows for task in TASKS)]
    for key, title in (
        ("losses", "Same number of steps"),
        ("losses_in_time", "Same time as AdamW"),
    ):
        print(f"\n{title}:\n")
        print_table(rows, names, key)
    plot_profiles(rows, names, PICTURES / "optimizers.png")


def main() -> None:
    """Runs the benchmark or reports its results."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("command", choices=["run", "report"])
    parser.add_argument("--tasks", nargs="+", choices=TASKS, default=[*TASKS])
    parser.add_argument(
        "--optimizers", nargs="+", choices=OPTIMIZERS, default=[*OPTIMIZERS]
    )
    parser.add_argument("--results", type=Path, default=RESULTS / "optimizers.jsonl")
    args = parser.parse_args()
    if args.command == "run":
        run(args.tasks, args.optimizers, args.results)
    else:
        report(args.optimizers, args.results)


if __name__ == "__main__":
    main()
