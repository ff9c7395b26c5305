"""Command-line flags, named and defaulted as in Hugging Face's scripts."""

import dataclasses
import difflib
import json
import math
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Any, Literal, NoReturn, TypeVar, get_type_hints

from transformers import HfArgumentParser

from bert_finetune.errors import UserError

T = TypeVar("T")
# Flags of other versions and scripts -> flags here.
_OTHER_NAMES = {
    "evaluation_strategy": "eval_strategy",
    "fp16": "bf16",
    "per_gpu_train_batch_size": "per_device_train_batch_size",
    "per_gpu_eval_batch_size": "per_device_eval_batch_size",
    "batch_size": "per_device_train_batch_size",
    "max_length": "max_seq_length",
    "epochs": "num_train_epochs",
    "lr": "learning_rate",
}


# A flag whose value a resumed run must share with the run it resumes.
Fixed = Annotated[T, "fixed"]
# Finite values with an inclusive lower bound.
Count = Annotated[int, 1]
Limit = Annotated[int | None, 1]
Amount = Annotated[float, 0]
Length = Annotated[int, 3]


def _flag(default, help_text: str, **metadata):
    return dataclasses.field(default=default, metadata={"help": help_text, **metadata})


def _required(help_text: str):
    return dataclasses.field(metadata={"help": help_text})


@dataclasses.dataclass(frozen=True)
class Arguments:
    """The flags that all tasks share."""

    model_name_or_path: str = _required(
        "Path to a BERT checkpoint directory, or a model id on the Hugging Face Hub."
    )
    output_dir: str = _required(
        "Directory for the trained model, checkpoints, results and plots."
    )
    train_file: str | None = _flag(
        None, "Training data file, used instead of the dataset's training split."
    )
    validation_file: str | None = _flag(
        None, "Validation data file, used instead of the dataset's validation split."
    )
    test_file: str | None = _flag(
        None, "Test data file, used instead of the dataset's test split."
    )
    do_train: bool = _flag(False, "Run training.")
    do_eval: bool = _flag(
        False, "Run evaluation on the validation split (after training)."
    )
    do_predict: bool = _flag(False, "Write predictions for the test split.")
    max_seq_length: Fixed[Length] = _flag(
        128, "Maximum number of tokens per example; longer examples are truncated."
    )
    pad_to_max_length: Fixed[bool] = _flag(
        False,
        "Pad all batches to --max_seq_length. By default each batch is padded to the "
        "smallest of a few fixed lengths that fits.",
    )
    ignore_mismatched_sizes: bool = _flag(
        False,
        "Randomly initialize weights whose shapes differ from the checkpoint's, such "
        "as the head of another task.",
    )
    overwrite_cache: bool = _flag(False, "Overwrite the cached tokenized data.")
    num_devices: Limit = _flag(
        None, "Number of devices to use per process; all if not set."
    )
    distributed: bool = _flag(
        False, "Train in several processes, launched by Slurm, Open MPI or similar."
    )
    coordinator_address: str | None = _flag(
        None, "HOST:PORT of process 0, with a free port; implies --distributed."
    )
    num_processes: Limit = _flag(
        None, "Total number of processes; implies --distributed."
    )
    process_id: Annotated[int | None, 0] = _flag(
        None, "Index of this process, from 0; implies --distributed."
    )
    heartbeat_timeout_seconds: Count = _flag(
        100,
        "Seconds without a heartbeat after which a process counts as dead and all "
        "processes exit.",
    )
    max_train_samples: Fixed[Limit] = _flag(
        None, "Truncate the training data to this many examples."
    )
    max_eval_samples: Limit = _flag(
        None, "Truncate the validation data to this many examples."
    )
    max_predict_samples: Limit = _flag(
        None, "Truncate the test data to this many examples."
    )
    per_device_train_batch_size: Count = _flag(
        8, "Batch size per device for training, per forward pass."
    )
    per_device_eval_batch_size: Count = _flag(
        8, "Batch size per device for evaluation."
    )
    gradient_accumulation_steps: Count = _flag(
        1, "Number of forward passes whose gradients are averaged for one step."
    )
    optim: Fixed[str] = _flag(
        "adamw",
        "Optimizer: MFAC, adam_mfac, adamw, or the name of an Optax optimizer such as "
        "lion or contrib.muon.",
    )
    optim_args: str | None = _flag(
        None,
        "Hyperparameters of --optim as a JSON object, such as "
        '\'{"lr": 1e-4, "damp": 1e-6}\'.',
    )
    learning_rate: Amount = _flag(
        5e-5, 'Peak learning rate; overridden by "lr" in --optim_args.'
    )
    weight_decay: Amount = _flag(
        0.0, "Weight decay for all parameters except biases and LayerNorm weights."
    )
    max_grad_norm: Fixed[Amount] = _flag(
        1.0, "Maximum gradient norm, for clipping; 0 disables clipping."
    )
    num_train_epochs: Fixed[float] = _flag(3.0, "Total number of training epochs.")
    max_steps: Fixed[int] = _flag(
        -1, "Total number of training steps; overrides --num_train_epochs if positive."
    )
    lr_scheduler_type: Fixed[
        Literal["linear", "cosine", "constant", "constant_with_warmup"]
    ] = _flag("linear", "Learning rate schedule after the warm-up.")
    warmup_ratio: Fixed[float] = _flag(
        0.0, "Fraction of all steps used for a linear warm-up from 0."
    )
    warmup_steps: Fixed[Annotated[int, 0]] = _flag(
        0, "Number of warm-up steps; overrides --warmup_ratio if positive."
    )
    bf16: Fixed[bool] = _flag(
        False,
        "Compute in bfloat16; parameters, gradients and optimizer state stay in "
        "float32.",
    )
    logging_steps: Count = _flag(
        500, "Number of steps between two lines of metrics.jsonl."
    )
    eval_strategy: Literal["no", "steps", "epoch"] = _flag(
        "no", "When to evaluate during training; steps and epoch imply --do_eval."
    )
    eval_steps: Limit = _flag(
        None,
        "Number of steps between two evaluations with --eval_strategy steps; "
        "--logging_steps if not set.",
    )
    save_strategy: Literal["no", "steps", "epoch"] = _flag(
        "epoch", "When to save checkpoints during training."
    )
    save_steps: Count = _flag(
        500, "Number of steps between two checkpoints with --save_strategy steps."
    )
    save_total_limit: Count = _flag(
        1,
        "Number of newest checkpoints to keep; with --load_best_model_at_end also the "
        "best one.",
    )
    save_window: bool = _flag(
        True,
        "Whether checkpoints include M-FAC's window; without it, a resumed run starts "
        "with an empty one.",
    )
    load_best_model_at_end: bool = _flag(
        False, "Load the best checkpoint at the end of training."
    )
    metric_for_best_model: str = _flag(
        "loss", "Metric that selects the best checkpoint, such as loss or f1."
    )
    resume_from_checkpoint: str | None = _flag(
        None,
        'Checkpoint directory to resume from; "last" or no value selects the last '
        "checkpoint in --output_dir.",
        nargs="?",
        const="last",
    )
    report_to: Literal["none", "tensorboard"] = _flag(
        "none", "Where to log metrics in addition to metrics.jsonl."
    )
    seed: Fixed[Annotated[int, 0]] = _flag(
        42, "Random seed for new weights, data order and dropout."
    )
    overwrite_output_dir: bool = _flag(
        False, "Start over in a non-empty --output_dir and delete its checkpoints."
    )

    @classmethod
    def _annotated(cls, kind: type) -> dict[str, Any]:
        """Returns the flags' annotations of this type, by flag name."""
        return {
            name: annotation
            for name, hint in get_type_hints(cls, include_extras=True).items()
            for annotation in getattr(hint, "__metadata__", ())
            if isinstance(annotation, kind)
        }

    @property
    def fixed(self) -> dict[str, Any]:
        """The flags that a resumed run must share with the run it resumes."""
        return {f"--{name}": getattr(self, name) for name in self._annotated(str)}

    @property
    def is_distributed(self) -> bool:
        """Whether this is one of several processes of a run."""
        given = (self.coordinator_address, self.num_processes, self.process_id)
        return self.distributed or any(value is not None for value in given)

    @property
    def data_name(self) -> str:
        """The name of the training data, without directories and extensions."""
        return Path(self.train_file or "").stem

    def check(self) -> None:
        """Raises a UserError if a flag is out of range or flags are incompatible."""
        for name, least in self._annotated(int).items():
            value = getattr(self, name)
            if value is not None and not least <= value < math.inf:
                raise UserError(f"--{name} must be at least {least}, got {value}.")
        epochs, steps = self.num_train_epochs, self.max_steps
        if not 0 < epochs < math.inf:
            raise UserError(f"--num_train_epochs must be positive, got {epochs}.")
        if steps == 0 or steps < -1:
            raise UserError(f"--max_steps must be positive, or -1, got {steps}.")
        ratio = self.warmup_ratio
        if not 0 <= ratio <= 1:
            raise UserError(f"--warmup_ratio must be in [0, 1], got {ratio}.")
        if not (self.do_train or self.do_eval or self.do_predict):
            raise UserError(
                "there is nothing to do: give at least one of --do_train, --do_eval "
                "and --do_predict."
            )
        if self.lr_scheduler_type == "constant" and (self.warmup_steps or ratio):
            flag = "--warmup_steps" if self.warmup_steps else "--warmup_ratio"
            raise UserError(
                f"--lr_scheduler_type constant has no warm-up, but {flag} is set: give "
                "constant_with_warmup."
            )
        if self.seed >= 2**32:
            # JAX would drop the higher bits.
            raise UserError(f"--seed must be less than {2**32}, got {self.seed}.")
        if self.load_best_model_at_end:
            self._check_best_model()

    def _check_best_model(self) -> None:
        if self.eval_strategy == "no" or self.eval_strategy != self.save_strategy:
            raise UserError(
                "--load_best_model_at_end needs --eval_strategy and --save_strategy to "
                f"be the same, steps or epoch, got {self.eval_strategy} and "
                f"{self.save_strategy}."
            )
        eval_steps = self.eval_steps or self.logging_steps
        if self.eval_strategy == "steps" and self.save_steps % eval_steps:
            raise UserError(
                f"--load_best_model_at_end needs --save_steps {self.save_steps} to be "
                f"a multiple of --eval_steps {eval_steps}."
            )

    def _check_files(self, data_flag: str) -> None:
        """Raises a UserError if an action has neither ``data_flag`` nor a file."""
        files = {"train": "train", "eval": "validation", "predict": "test"}
        for action, split in files.items():
            if getattr(self, f"do_{action}") and getattr(self, f"{split}_file") is None:
                raise UserError(f"--do_{action} needs --{data_flag} or --{split}_file.")


@dataclasses.dataclass(frozen=True)
class GlueArguments(Arguments):
    """The flags of `run_glue.py`."""

    task_name: Fixed[str | None] = _flag(
        None,
        "GLUE task: cola, sst2, mrpc, qqp, stsb, mnli, qnli, rte or wnli. Without it, "
        "give --dataset_name or .csv, .tsv, .json, .jsonl or .parquet files.",
    )
    dataset_name: str | None = _flag(
        None,
        "Dataset id on the Hub, or a directory with {train,validation}-*.parquet, in a "
        "subdirectory TASK_NAME for a GLUE task; nyu-mll/glue if only --task_name is "
        "set.",
    )
    dataset_config_name: str | None = _flag(
        None, "Configuration name of the dataset; cannot be used with --task_name."
    )

    @property
    def data_name(self) -> str:
        return self.task_name or super().data_name or Path(self.dataset_name or "").name

    def check(self) -> None:
        super().check()
        if self.dataset_name is None:
            self._check_files("task_name, --dataset_name")
        if self.task_name is not None and self.dataset_config_name is not None:
            raise UserError(
                f"--dataset_config_name {self.dataset_config_name} has no effect with "
                f"--task_name {self.task_name}: give one of them."
            )


@dataclasses.dataclass(frozen=True)
class QaArguments(Arguments):
    """The flags of `run_qa.py`."""

    dataset_name: str | None = _flag(
        None,
        "Dataset id on the Hub, or a directory with {train,validation}-*.parquet, at "
        "the top or one level deeper. Without it, give files: .json as published for "
        "SQuAD, .jsonl or .parquet.",
    )
    dataset_config_name: str | None = _flag(
        None, "Configuration name of the dataset, if it has several."
    )
    version_2_with_negative: bool = _flag(
        False, "Some questions have no answer, as in SQuAD v2."
    )
    max_seq_length: Fixed[Length] = _flag(
        384, "Maximum number of tokens of a question with a chunk of its context."
    )
    doc_stride: Fixed[Annotated[int, 0]] = _flag(
        128, "Number of tokens that neighboring chunks of a long context share."
    )
    n_best_size: Count = _flag(20, "Number of answers to list per question.")
    max_answer_length: Count = _flag(30, "Maximum number of tokens of an answer.")
    null_score_diff_threshold: float = _flag(
        0.0,
        "Predict no answer if its score exceeds the best answer's score by more than "
        "this threshold; only used with --version_2_with_negative.",
    )
    metric_for_best_model: str = _flag(
        "f1",
        "Metric that selects the best checkpoint: f1 or exact_match; with "
        "--version_2_with_negative f1 or exact, also of a group, such as HasAns_f1.",
    )

    @property
    def data_name(self) -> str:
        if self.train_file is None and self.dataset_name is not None:
            return Path(self.dataset_name).name
        return super().data_name

    def check(self) -> None:
        super().check()
        if self.dataset_name is None:
            self._check_files("dataset_name")
        value = self.null_score_diff_threshold
        if not math.isfinite(value):
            raise UserError(f"--null_score_diff_threshold must be finite, got {value}.")


class _Parser(HfArgumentParser):
    """Raises argparse errors as UserErrors, without the usage text."""

    def error(self, message: str) -> NoReturn:
        hint = "; give an integer" if "invalid int value" in message else ""
        raise UserError(f"{message}{hint}. --help lists the flags.")


def _hint(flag: str, known: Sequence[str]) -> str:
    """Returns a hint about an unknown flag, for its error message."""
    name = flag.partition("=")[0].lstrip("-").replace("-", "_")
    similar = [_OTHER_NAMES[name]] if name in _OTHER_NAMES else []
    similar += difflib.get_close_matches(name, known, n=1, cutoff=0.7)
    return f"; did you mean --{similar[0]}?" if similar else "; --help lists all flags."


def _flags_in_file(path: str) -> list[str]:
    """Reads flags from a JSON file; returns them as command-line arguments."""
    try:
        flags = json.loads(Path(path).read_text("utf-8-sig"))
        items = [(f"--{name}", value) for name, value in flags.items()]
    except OSError as error:
        raise UserError(f"{path} cannot be read: {error.strerror}.") from error
    except (ValueError, AttributeError, RecursionError) as error:
        raise UserError(f"{path} is not a JSON object of flags: {error}.") from error
    typed = []
    for flag, value in items:
        if value is not None:
            is_plain = isinstance(value, str)
            typed += [flag, value if is_plain else json.dumps(value)]
    return typed


AnyArguments = TypeVar("AnyArguments", bound=Arguments)


def parse_arguments(
    kind: type[AnyArguments], argv: Sequence[str] | None = None
) -> AnyArguments:
    """Parses and validates the flags of a script, by default `sys.argv`."""
    argv = sys.argv[1:] if argv is None else list(argv)
    if len(argv) == 1 and argv[0].endswith(".json"):
        argv = _flags_in_file(argv[0])
    parser = _Parser(kind, allow_abbrev=False)  # pyright: ignore[reportArgumentType]
    args, unknown = parser.parse_args_into_dataclasses(
        argv, return_remaining_strings=True, look_for_args_file=False
    )
    if unknown:
        known = [field.name for field in dataclasses.fields(kind)]
        raise UserError(f"unknown flag {unknown[0]}{_hint(unknown[0], known)}")
    if args.eval_strategy != "no":
        args = dataclasses.replace(args, do_eval=True)
    if isinstance(args, GlueArguments) and args.task_name is not None:
        # GLUE itself writes STS-B.
        name = args.task_name.lower().replace("-", "")
        source = args.dataset_name or "nyu-mll/glue"
        args = dataclasses.replace(args, task_name=name, dataset_name=source)
    args.check()
    return args
