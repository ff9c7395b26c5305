"""The flags, with the names, meanings and defaults of Hugging Face's scripts."""

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
# Flags of other versions and scripts -> ours.
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
# Flags with a lower bound, which are finite.
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

    model_name_or_path: str = _required("A directory with a BERT, or its hub id.")
    output_dir: str = _required("Where the model, results and curves are written.")
    train_file: str | None = _flag(None, "Training data of your own.")
    validation_file: str | None = _flag(None, "The same for evaluation.")
    test_file: str | None = _flag(None, "The same for prediction.")
    do_train: bool = _flag(False, "Train.")
    do_eval: bool = _flag(False, "Evaluate on the validation split, after training.")
    do_predict: bool = _flag(False, "Write predictions for the test split.")
    max_seq_length: Fixed[Length] = _flag(128, "Tokens to truncate examples to.")
    pad_to_max_length: Fixed[bool] = _flag(
        False, "Pad to --max_seq_length, not just to hold a batch's longest example."
    )
    ignore_mismatched_sizes: bool = _flag(
        False, "Initialize weights of another shape, such as another task's head."
    )
    overwrite_cache: bool = _flag(False, "Tokenize again what is cached.")
    num_devices: Limit = _flag(None, "Devices of each process to use, or all of them.")
    distributed: bool = _flag(
        False, "Train on several processes, started by Slurm, Open MPI or the like."
    )
    coordinator_address: str | None = _flag(
        None, "Host and free port of process 0; implies --distributed."
    )
    num_processes: Limit = _flag(None, "The number of processes; implies the same.")
    process_id: Annotated[int | None, 0] = _flag(
        None, "The number of this process, from 0; implies the same."
    )
    heartbeat_timeout_seconds: Count = _flag(
        100, "Seconds after which a silent process counts as dead, and all end."
    )
    max_train_samples: Fixed[Limit] = _flag(None, "Train on the first examples only.")
    max_eval_samples: Limit = _flag(None, "The same for evaluation.")
    max_predict_samples: Limit = _flag(None, "The same for prediction.")
    per_device_train_batch_size: Count = _flag(
        8, "Examples per forward pass on each device."
    )
    per_device_eval_batch_size: Count = _flag(8, "The same in evaluation.")
    gradient_accumulation_steps: Count = _flag(
        1, "Forward passes whose gradients are averaged for one training step."
    )
    optim: Fixed[str] = _flag(
        "adamw",
        "MFAC, adam_mfac, adamw, or an optimizer of Optax such as contrib.muon.",
    )
    optim_args: str | None = _flag(
        None, 'Its hyper-parameters as JSON: \'{"lr": 1e-4, "damp": 1e-6}\'.'
    )
    learning_rate: Amount = _flag(5e-5, 'The peak; "lr" in --optim_args overrides it.')
    weight_decay: Amount = _flag(0.0, "Not applied to biases and LayerNorm weights.")
    max_grad_norm: Fixed[Amount] = _flag(1.0, "Gradient norm to clip to; 0: none.")
    num_train_epochs: Fixed[float] = _flag(3.0, "Passes over the training data.")
    max_steps: Fixed[int] = _flag(-1, "The number of steps if positive, not epochs.")
    lr_scheduler_type: Fixed[
        Literal["linear", "cosine", "constant", "constant_with_warmup"]
    ] = _flag("linear", "Shape of the learning rate after the warm-up.")
    warmup_ratio: Fixed[float] = _flag(
        0.0, "Share of the steps in which the learning rate rises linearly from 0."
    )
    warmup_steps: Fixed[Annotated[int, 0]] = _flag(0, "Overrides --warmup_ratio.")
    bf16: Fixed[bool] = _flag(
        False, "Compute in bfloat16; parameters, gradients and optimizer stay float32."
    )
    logging_steps: Count = _flag(500, "Steps between lines of metrics.jsonl.")
    eval_strategy: Literal["no", "steps", "epoch"] = _flag(
        "no", "When to evaluate during training; implies --do_eval."
    )
    eval_steps: Limit = _flag(None, "Steps between evaluations, or --logging_steps.")
    save_strategy: Literal["no", "steps", "epoch"] = _flag(
        "epoch", "When to write a checkpoint that training can resume from."
    )
    save_steps: Count = _flag(500, "Steps between two checkpoints.")
    save_total_limit: Count = _flag(1, "Newest checkpoints to keep; also the best one.")
    save_window: bool = _flag(
        True, "Keep M-FAC's gradients in checkpoints; without, it resumes with none."
    )
    load_best_model_at_end: bool = _flag(
        False, "End with the parameters of the best checkpoint, not with the last ones."
    )
    metric_for_best_model: str = _flag("loss", 'What "best" means, such as f1.')
    resume_from_checkpoint: str | None = _flag(
        None,
        'The checkpoint to resume from; "last" or no value: the last in --output_dir.',
        nargs="?",
        const="last",
    )
    report_to: Literal["none", "tensorboard"] = _flag("none", "Where else metrics go.")
    seed: Fixed[Annotated[int, 0]] = _flag(42, "For new weights, order and dropout.")
    overwrite_output_dir: bool = _flag(
        False, "Start over in a directory that is not empty; deletes its checkpoints."
    )

    @classmethod
    def _annotated(cls, kind: type) -> dict[str, Any]:
        """Returns by name of a flag its annotation of this type."""
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
        """The name of the training data, without folders and endings."""
        return Path(self.train_file or "").stem

    def check(self) -> None:
        """Raises a UserError for a flag out of range, or flags that do not fit."""
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
                "there is nothing to do: give --do_train, --do_eval, --do_predict or "
                "more than one of them."
            )
        if self.lr_scheduler_type == "constant" and (self.warmup_steps or ratio):
            flag = "--warmup_steps" if self.warmup_steps else "--warmup_ratio"
            raise UserError(
                f"--lr_scheduler_type constant has no warm-up, which {flag} asks for: "
                "give constant_with_warmup."
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
        """Checks that there are data for everything to do, without ``data_flag``."""
        files = {"train": "train", "eval": "validation", "predict": "test"}
        for action, split in files.items():
            if getattr(self, f"do_{action}") and getattr(self, f"{split}_file") is None:
                raise UserError(f"--do_{action} needs --{data_flag} or --{split}_file.")


@dataclasses.dataclass(frozen=True)
class GlueArguments(Arguments):
    """The flags of `run_glue.py`."""

    task_name: Fixed[str | None] = _flag(
        None,
        "The GLUE task: cola, sst2, mrpc, qqp, stsb, mnli, qnli, rte or wnli. Without "
        "it, the data are the files given: .csv, .tsv, .json, .jsonl or .parquet.",
    )
    dataset_name: str | None = _flag(
        None,
        "A hub id, or a directory with {train,validation}-*.parquet, for a GLUE task "
        "in the folder of its name; by default nyu-mll/glue.",
    )
    dataset_config_name: str | None = _flag(
        None, "The configuration of a data set that is not GLUE's."
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
        "A hub id, or a directory with {train,validation}-*.parquet, itself or one "
        "folder deeper. Without it, the data are the files given: SQuAD's own .json, "
        "or .jsonl or .parquet.",
    )
    dataset_config_name: str | None = _flag(
        None, "The configuration of the data set, where it has several."
    )
    version_2_with_negative: bool = _flag(
        False, "Some questions have no answer, as in SQuAD version 2."
    )
    max_seq_length: Fixed[Length] = _flag(
        384, "Maximum tokens of a question with a chunk of its context."
    )
    doc_stride: Fixed[Annotated[int, 0]] = _flag(
        128, "Tokens that two neighboring chunks of a long context share."
    )
    n_best_size: Count = _flag(20, "Answers to list per question.")
    max_answer_length: Count = _flag(30, "Maximum tokens of an answer.")
    null_score_diff_threshold: float = _flag(
        0.0,
        "With --version_2_with_negative, a question is left unanswered if the score of "
        "no answer exceeds that of the best answer by more than this.",
    )
    metric_for_best_model: str = _flag(
        "f1",
        'What "best" means: f1 or exact_match; with --version_2_with_negative f1 or '
        "exact, or that of a group, such as HasAns_f1.",
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
    """Raises what argparse would print below its usage."""

    def error(self, message: str) -> NoReturn:
        hint = "; give a whole number" if "invalid int value" in message else ""
        raise UserError(f"{message}{hint}. --help lists the flags.")


def _hint(flag: str, known: Sequence[str]) -> str:
    """Returns what was probably meant by an unknown flag."""
    name = flag.partition("=")[0].lstrip("-").replace("-", "_")
    similar = [_OTHER_NAMES[name]] if name in _OTHER_NAMES else []
    similar += difflib.get_close_matches(name, known, n=1, cutoff=0.7)
    return f"; did you mean --{similar[0]}?" if similar else "; --help lists them."


def _flags_in_file(path: str) -> list[str]:
    """Returns the flags that a JSON object holds, as if they had been typed."""
    try:
        flags = json.loads(Path(path).read_text("utf-8-sig"))
        items = [(f"--{name}", value) for name, value in flags.items()]
    except OSError as error:
        raise UserError(f"{path} cannot be read: {error.strerror}.") from error
    except (ValueError, AttributeError, RecursionError) as error:
        raise UserError(f"{path} holds no JSON object of flags: {error}.") from error
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
    """Parses and checks the flags of a script, by default those typed."""
    argv = sys.argv[1:] if argv is None else list(argv)
    if len(argv) == 1 and argv[0].endswith(".json"):
        argv = _flags_in_file(argv[0])
    parser = _Parser(kind, allow_abbrev=False)  # pyright: ignore[reportArgumentType]
    args, unknown = parser.parse_args_into_dataclasses(
        argv, return_remaining_strings=True, look_for_args_file=False
    )
    if unknown:
        known = [field.name for field in dataclasses.fields(kind)]
        raise UserError(f"{unknown[0]} is no flag{_hint(unknown[0], known)}")
    if args.eval_strategy != "no":
        args = dataclasses.replace(args, do_eval=True)
    if isinstance(args, GlueArguments) and args.task_name is not None:
        # GLUE itself writes STS-B.
        name = args.task_name.lower().replace("-", "")
        source = args.dataset_name or "nyu-mll/glue"
        args = dataclasses.replace(args, task_name=name, dataset_name=source)
    args.check()
    return args
