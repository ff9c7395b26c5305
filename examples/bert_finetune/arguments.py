"""The flags, with the names, meanings and defaults of Hugging Face's `run_glue.py`."""

import dataclasses
import math
from collections.abc import Sequence

from transformers import HfArgumentParser

from bert_finetune.errors import UserError


def _flag(default, help_text: str):
    return dataclasses.field(default=default, metadata={"help": help_text})


def _required(help_text: str):
    return dataclasses.field(metadata={"help": help_text})


@dataclasses.dataclass(frozen=True)
class Arguments:
    """What one fine-tuning run is made of."""

    model_name_or_path: str = _required(
        "A directory with a BERT, or its id on the hub."
    )
    task_name: str = _required("The GLUE task: mrpc, qqp or sst2.")
    output_dir: str = _required("Where the model, results and curves are written.")
    dataset_name: str = _flag(
        "nyu-mll/glue",
        "A hub id, or a directory that holds TASK/train-*.parquet and "
        "TASK/validation-*.parquet.",
    )
    do_train: bool = _flag(False, "Train.")
    do_eval: bool = _flag(False, "Evaluate on the validation split, after training.")
    max_seq_length: int = _flag(
        128, "Tokens per example: longer ones are truncated, shorter ones padded."
    )
    max_train_samples: int | None = _flag(None, "Train on the first examples only.")
    max_eval_samples: int | None = _flag(None, "Evaluate on the first examples only.")
    per_device_train_batch_size: int = _flag(8, "Examples per training step.")
    per_device_eval_batch_size: int = _flag(8, "Examples per evaluation step.")
    optim: str = _flag("adamw", "The optimizer: MFAC or adamw.")
    optim_args: str | None = _flag(
        None,
        'Its hyper-parameters as JSON, for example \'{"lr": 1e-4, "damp": 1e-6}\'.',
    )
    learning_rate: float = _flag(
        5e-5, 'The peak learning rate; "lr" in --optim_args overrides it.'
    )
    weight_decay: float = _flag(
        0.0, "Weight decay, not applied to biases and LayerNorm weights."
    )
    max_grad_norm: float = _flag(
        1.0, "Gradients are scaled down to this global norm; 0 leaves them as they are."
    )
    num_train_epochs: float = _flag(3.0, "Passes over the training data.")
    max_steps: int = _flag(-1, "If positive, the number of steps, whatever the epochs.")
    warmup_ratio: float = _flag(
        0.0, "Share of the steps in which the learning rate rises linearly from 0."
    )
    logging_steps: int = _flag(500, "Steps between two lines of metrics.jsonl.")
    seed: int = _flag(42, "Fixes initialisation, data order and dropout.")
    overwrite_output_dir: bool = _flag(
        False, "Allow training into a directory that is not empty."
    )


def parse_arguments(argv: Sequence[str] | None = None) -> Arguments:
    """Parses and checks the flags.

    Raises:
      UserError: naming the flag, its value and what it may be.
    """
    parser = HfArgumentParser(Arguments, allow_abbrev=False)  # pyright: ignore[reportArgumentType]
    args, unknown = parser.parse_args_into_dataclasses(
        None if argv is None else list(argv),
        return_remaining_strings=True,
        look_for_args_file=False,
    )
    if unknown:
        parser.error(f"unrecognized arguments: {' '.join(unknown)}")
    _check(args)
    return args


def _check(args: Arguments) -> None:
    at_least = {
        "max_seq_length": 3,
        "per_device_train_batch_size": 1,
        "per_device_eval_batch_size": 1,
        "max_train_samples": 1,
        "max_eval_samples": 1,
        "learning_rate": 0,
        "weight_decay": 0,
        "max_grad_norm": 0,
        "logging_steps": 1,
        "seed": 0,
    }
    for name, minimum in at_least.items():
        value = getattr(args, name)
        if value is not None and not minimum <= value < math.inf:
            raise UserError(f"--{name} must be at least {minimum}, got {value}.")
    if not 0 < args.num_train_epochs < math.inf:
        raise UserError(
            f"--num_train_epochs must be positive, got {args.num_train_epochs}."
        )
    if args.max_steps == 0 or args.max_steps < -1:
        raise UserError(
            "--max_steps must be positive, or -1 to count by epochs, got "
            f"{args.max_steps}."
        )
    if not 0 <= args.warmup_ratio <= 1:
        raise UserError(f"--warmup_ratio must be in [0, 1], got {args.warmup_ratio}.")
    if not (args.do_train or args.do_eval):
        raise UserError("there is nothing to do: give --do_train, --do_eval or both.")
