r"""Steps per second of the trainer with M-FAC, with AdamW and with plain SGD.

    python benchmarks/train_throughput.py \
        --model_name_or_path prajjwal1/bert-tiny

With `--optims 'MFAC={"num_grads": 256}' ...` instead of M-FAC with 1024 gradients.
Takes steps of QQP (batch 32) by turns, in one process, from batches that are made on a
thread as in training: padded to the smallest of a few lengths, and all to 128. A step
of SGD is a forward and a backward pass and little else, so that what another optimizer
takes more is its own. The host's share is what a step of the loop takes beyond one
whose batch waits on the device. Compilation is not counted.
"""

import argparse
import json
from pathlib import Path

from padded_lengths import Steps, make_run
from step_time import environment

MFAC = 'MFAC={"num_grads": 1024, "damp": 1e-6}'
PADDING = {"short": [], "128": ["--pad_to_max_length"]}


def measure(
    source: tuple[str, str],
    optims: list[str],
    flags: list[str],
    turns: int,
    steps_per_turn: int,
) -> dict[str, dict[str, float]]:
    """Returns by optimizer its state's bytes, and steps per second of loop and step."""
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
    """Prints a table of optimizers and paddings."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--model_name_or_path", required=True)
    parser.add_argument("--dataset_name", default="nyu-mll/glue")
    parser.add_argument("--optims", nargs="+", default=[MFAC], metavar="NAME[=JSON]")
    parser.add_argument("--padding", nargs="+", choices=PADDING, default=list(PADDING))
    parser.add_argument("--turns", type=int, default=6)
    parser.add_argument("--steps_per_turn", type=int, default=40)
    parser.add_argument("--output", type=Path, help="Where to write the JSON.")
    args = parser.parse_args()
    source = args.model_name_or_path, args.dataset_name
    titles = (
        "padded to, optimizer, MB, steps/s, of AdamW's, optimizer's share, host's share"
    )
    print("| " + titles.replace(",", " |") + " |\n| --- | --- |" + " ---: |" * 5)
    results = {}
    for padding in args.padding:
        optims = [*args.optims, "adamw", "sgd"]
        found = measure(
            source, optims, PADDING[padding], args.turns, args.steps_per_turn
        )
        results[padding] = found
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
        if args.output is not None:
            content = {**environment(), "results": results}
            args.output.write_text(json.dumps(content, indent=2) + "\n")


if __name__ == "__main__":
    main()
