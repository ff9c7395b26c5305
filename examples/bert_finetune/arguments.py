"""The flags, with the names, meanings and defaults of Hugging Face's `run_glue.py`."""

import dataclasses
import math
from collections.abc import Sequence
from typing import Literal

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
    output_dir: str = _required("Where the model, results and curves are written.")
    task_name: str | None = _flag(
        None,
        "The GLUE task: cola, sst2, mrpc, qqp, stsb, mnli, qnli, rte or wnli. Without "
        "it, the data are the files given.",
    )
    dataset_name: str = _flag(
        "nyu-mll/glue",
        "A hub id, or a directory that holds TASK/train-*.parquet and "
        "TASK/validation-*.parquet.",
    )
    train_file: str | None = _flag(
        None, "Training data of your own: .csv, .tsv, .json, .jsonl or .parquet."
    )
    validation_file: str | None = _flag(None, "The same for evaluation.")
    test_file: str | None = _flag(None, "The same for prediction.")
    do_train: bool = _flag(False, "Train.")
    do_eval: bool = _flag(False, "Evaluate on the validation split, after training.")
    do_predict: bool = _flag(
        False, "Write predictions for the test split, in the files GLUE takes."
    )
    max_seq_length: int = _flag(
        128, "Tokens per example at most: longer ones are truncated."
    )
    pad_to_max_length: bool = _flag(
        False,
        "Pad every batch to --max_seq_length, instead of to the smallest of a few "
        "lengths that holds its longest example.",
    )
    overwrite_cache: bool = _flag(False, "Tokenise anew what is cached.")
    max_train_samples: int | None = _flag(None, "Train on the first examples only.")
    max_eval_samples: int | None = _flag(None, "Evaluate on the first examples only.")
    max_predict_samples: int | None = _flag(None, "Predict the first examples only.")
    per_device_train_batch_size: int = _flag(8, "Examples per forward pass.")
    per_device_eval_batch_size: int = _flag(8, "Examples per evaluation step.")
    gradient_accumulation_steps: int = _flag(
        1, "Forward passes whose gradients are averaged for one training step."
    )
    optim: str = _flag(
        "adamw",
        "The optimizer: MFAC, adamw, or the name of one of Optax's, such as lion or "
        "contrib.muon.",
    )
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
    lr_scheduler_type: Literal["linear", "cosine", "constant"] = _flag(
        "linear", "How the learning rate goes on after the warm-up."
    )
    warmup_ratio: float = _flag(
        0.0, "Share of the steps in which the learning rate rises linearly from 0."
    )
    warmup_steps: int = _flag(0, "The same in steps; overrides --warmup_ratio.")
    bf16: bool = _flag(
        False, "Compute in bfloat16; parameters, gradients and optimizer stay float32."
    )
    logging_steps: int = _flag(500, "Steps between two lines of metrics.jsonl.")
    eval_strategy: Literal["no", "steps", "epoch"] = _flag(
        "no", "When to evaluate during training; implies --do_eval."
    )
    eval_steps: int | None = _flag(
        None, "Steps between two evaluations; --logging_steps by default."
    )
    save_strategy: Literal["no", "steps", "epoch"] = _flag(
        "epoch", "When to write a checkpoint that training can be resumed from."
    )
    save_steps: int = _flag(500, "Steps between two checkpoints.")
    save_total_limit: int = _flag(
        1, "Checkpoints to keep: the newest, and the best one beside them."
    )
    save_window: bool = _flag(
        True,
        "Keep M-FAC's gradients in checkpoints. Without them a resumed run starts with "
        "an empty window.",
    )
    load_best_model_at_end: bool = _flag(
        False, "End with the parameters of the best checkpoint, not with the last ones."
    )
    metric_for_best_model: str | None = _flag(
        None, 'What "best" means, such as loss (the default) or f1.'
    )
    resume_from_checkpoint: str | None = dataclasses.field(
        default=None,
        metadata={
            "help": "A checkpoint directory to go on from; without a value, or with "
            '"last", the last one in --output_dir.',
            "nargs": "?",
            "const": "last",
        },
    )
    report_to: Literal["none", "tensorboard"] = _flag(
        "none", "Where metrics go beside metrics.jsonl."
    )
    seed: int = _flag(42, "Fixes initialisation, data order and dropout.")
    overwrite_output_dir: bool = _flag(
        False,
        "Train anew into a directory that is not empty; its checkpoints are deleted.",
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
    if args.eval_strategy != "no":
        args = dataclasses.replace(args, do_eval=True)
    if args.task_name is not None:
        args = dataclasses.replace(args, task_name=args.task_name.lower())
    _check(args)
    return args


def _check(args: Arguments) -> None:
    at_least = {
        "max_seq_length": 3,
        "per_device_train_batch_size": 1,
        "per_device_eval_batch_size": 1,
        "gradient_accumulation_steps": 1,
        "max_train_samples": 1,
        "max_eval_samples": 1,
        "max_predict_samples": 1,
        "learning_rate": 0,
        "weight_decay": 0,
        "max_grad_norm": 0,
        "warmup_steps": 0,
        "logging_steps": 1,
        "eval_steps": 1,
        "save_steps": 1,
        "save_total_limit": 1,
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
    if not (args.do_train or args.do_eval or args.do_predict):
        raise UserError(
            "there is nothing to do: give --do_train, --do_eval, --do_predict or more "
            "than one of them."
        )
    _check_data(args)
    _check_best_model(args)


def _check_data(args: Arguments) -> None:
    if args.task_name is not None:
        return
    files = {
        "do_train": "train_file",
        "do_eval": "validation_file",
        "do_predict": "test_file",
    }
    for action, name in files.items():
        if getattr(args, action) and getattr(args, name) is None:
            raise UserError(f"--{action} needs --task_name or --{name}.")


def _check_best_model(args: Arguments) -> None:
    if not args.load_best_model_at_end:
        return
    if args.eval_strategy == "no" or args.eval_strategy != args.save_strategy:
        raise UserError(
            "--load_best_model_at_end needs --eval_strategy and --save_strategy to be "
            f"the same, steps or epoch, got {args.eval_strategy} and "
            f"{args.save_strategy}."
        )
    eval_steps = args.eval_steps or args.logging_steps
    if args.eval_strategy == "steps" and args.save_steps % eval_steps:
        raise UserError(
            f"--load_best_model_at_end needs --save_steps {args.save_steps} to be a "
            f"multiple of --eval_steps {eval_steps}."
        )
