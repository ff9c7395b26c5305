r"""Steps per second of the trainer with M-FAC, with AdamW and with plain SGD.

    PYTHONPATH=examples python benchmarks/train_throughput.py \
        --model_name_or_path prajjwal1/bert-tiny

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

OPTIMIZERS = {
    "M-FAC": ["--optim", "MFAC", "--optim_args", '{"num_grads": 1024, "damp": 1e-6}'],
    "AdamW": ["--optim", "adamw"],
    "SGD": ["--optim", "sgd"],
}
PADDING = {"short": [], "128": ["--pad_to_max_length"]}
STEPS_PER_TURN = 40


def measure(
    source: tuple[str, str], flags: list[str], turns: int
) -> dict[str, dict[str, float]]:
    """Returns steps per second of the loop, and of its steps alone, by optimizer."""
    num_steps = turns * STEPS_PER_TURN
    steps = {}
    for name, optimizer in OPTIMIZERS.items():
        run = make_run(*source, ["--max_steps", str(2 * num_steps), *optimizer, *flags])
        steps[name] = Steps(run, run.loss_fn)
    for _ in range(turns):
        for taking in steps.values():
            taking.take(STEPS_PER_TURN)
            taking.take_ready(STEPS_PER_TURN)
    return {
        name: {
            "steps_per_second": num_steps / taking.seconds,
            "steps_per_second_alone": num_steps / taking.ready_seconds,
        }
        for name, taking in steps.items()
    }


def main() -> None:
    """Prints a table of optimizers and paddings."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--model_name_or_path", required=True)
    parser.add_argument("--dataset_name", default="nyu-mll/glue")
    parser.add_argument("--turns", type=int, default=6)
    parser.add_argument("--output", type=Path, help="Where to write the JSON.")
    args = parser.parse_args()
    source = args.model_name_or_path, args.dataset_name
    titles = (
        "padded to, optimizer, steps/s, of AdamW's, optimizer's share, host's share"
    )
    print("| " + titles.replace(",", " |") + " |\n| --- | --- |" + " ---: |" * 4)
    results = {}
    for padding, flags in PADDING.items():
        found = results[padding] = measure(source, flags, args.turns)
        rates = {name: rate["steps_per_second"] for name, rate in found.items()}
        for name, rate in rates.items():
            print(
                f"| {padding} | {name} | {rate:.2f} | {rate / rates['AdamW']:.0%} | "
                f"{1 - rate / rates['SGD']:.0%} | "
                f"{1 - rate / found[name]['steps_per_second_alone']:.0%} |",
                flush=True,
            )
    if args.output is not None:
        content = {**environment(), "results": results}
        args.output.write_text(json.dumps(content, indent=2) + "\n")


if __name__ == "__main__":
    main()
