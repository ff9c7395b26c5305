r"""Measures steps per second of the trainer with M-FAC, AdamW and SGD.

    python benchmarks/train_throughput.py \
        --model_name_or_path prajjwal1/bert-tiny

`--optims 'MFAC={"num_grads": 256}' ...` replaces M-FAC with 1024 gradients. The
optimizers alternate in one process and take steps of QQP (batch 32). Batches are
prepared on a thread as in training, padded to the smallest of a few lengths or all to
128. A step of SGD is little more than a forward and a backward pass, so the optimizer's
share is the additional time of a step. The host's share is the additional time compared
with batches that are already on the device. Compilation is excluded.
"""

import argparse
from pathlib import Path

from padded_lengths import Steps, make_run
from tables import append_row

MFAC = 'MFAC={"num_grads": 1024, "damp": 1e-6}'
PADDING = {"short": [], "128": ["--pad_to_max_length"]}


def measure(
    source: tuple[str, str],
    optims: list[str],
    flags: list[str],
    turns: int,
    steps_per_turn: int,
) -> dict[str, dict[str, float]]:
    """Returns state bytes and steps per second, of the loop and alone, by optimizer."""
    num_steps = turns * steps_per_turn
    rivals = {}
    for entry in optims:
        optim, given, optim_args = entry.partition("=")
        optimizer = ["--optim", optim, *(["--optim_args", optim_args] if given else [])]
        run = make_run(*source, ["--max_steps", str(2 * num_steps), *optimizer, *flags])
        rivals[entry] = Steps(run)
    for _ in range(turns):
        for taking in rivals.values():
            taking.take(steps_per_turn)
            taking.take_ready(steps_per_turn)
    return {
        entry: {
            "optimizer_state_bytes": taking.optimizer_state_bytes,
            "steps_per_second": num_steps / taking.seconds,
            "steps_per_second_alone": num_steps / taking.ready_seconds,
        }
        for entry, taking in rivals.items()
    }


def main() -> None:
    """Prints a row per padding and optimizer."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--model_name_or_path", required=True)
    parser.add_argument("--dataset_name", default="nyu-mll/glue")
    parser.add_argument("--optims", nargs="+", default=[MFAC], metavar="NAME[=JSON]")
    parser.add_argument("--padding", nargs="+", choices=PADDING, default=list(PADDING))
    parser.add_argument("--turns", type=int, default=6)
    parser.add_argument("--steps_per_turn", type=int, default=40)
    parser.add_argument("--output", type=Path, help="Append rows to this file.")
    args = parser.parse_args()
    source = args.model_name_or_path, args.dataset_name
    titles = (
        "padded to, optimizer, MB, steps/s, of AdamW's, optimizer's share, host's share"
    )
    print("| " + titles.replace(",", " |") + " |\n| --- | --- |" + " ---: |" * 5)
    for padding in args.padding:
        optims = [*args.optims, "adamw", "sgd"]
        found = measure(
            source, optims, PADDING[padding], args.turns, args.steps_per_turn
        )
        rates = {name: rate["steps_per_second"] for name, rate in found.items()}
        for name, rate in rates.items():
            print(
                f"| {padding} | {name} | "
                f"{found[name]['optimizer_state_bytes'] / 1e6:,.0f} | "
                f"{rate:.2f} | {rate / rates['adamw']:.0%} | "
                f"{1 - rate / rates['sgd']:.0%} | "
                f"{1 - rate / found[name]['steps_per_second_alone']:.0%} |",
                flush=True,
            )
            row = {"optimizer": name, "padded_to": padding, **found[name]}
            append_row(args.output, row)


if __name__ == "__main__":
    main()
