"""The flags, with the names, meanings and defaults of Hugging Face's scripts."""

import dataclasses
import math
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Any, Literal, TypeVar, get_origin, get_type_hints

from transformers import HfArgumentParser

from bert_finetune.errors import UserError

T = TypeVar("T")


def _flag(default, help_text: str, **metadata):
    return dataclasses.field(default=default, metadata={"help": help_text, **metadata})


# A flag whose value a resumed run must share with the run it resumes.
Fixed = Annotated[T, "fixed"]


def _required(help_text: str):
    return dataclasses.field(metadata={"help": help_text})


@dataclasses.dataclass(frozen=True)
class Arguments:
    """What one fine-tuning run is made of, whatever its task."""

    model_name_or_path: str = _required(
        "A directory with a BERT, or its id on the hub."
    )
    output_dir: str = _required("Where the model, results and curves are written.")
    train_file: str | None = _flag(None, "Training data of your own.")
    validation_file: str | None = _flag(None, "The same for evaluation.")
    test_file: str | None = _flag(None, "The same for prediction.")
    do_train: bool = _flag(False, "Train.")
    do_eval: bool = _flag(False, "Evaluate on the validation split, after training.")
    do_predict: bool = _flag(False, "Write predictions for the test split.")
    max_seq_length: Fixed[int] = _flag(
        128, "Tokens per example at most: longer ones are truncated."
    )
    pad_to_max_length: Fixed[bool] = _flag(
        False,
        "Pad every batch to --max_seq_length, instead of to the smallest of a few "
        "lengths that holds its longest example.",
    )
    overwrite_cache: bool = _flag(False, "Tokenize again what is cached.")
    max_train_samples: Fixed[int | None] = _flag(
        None, "Train on the first examples only."
    )
    max_eval_samples: int | None = _flag(None, "Evaluate on the first examples only.")
    max_predict_samples: int | None = _flag(None, "Predict the first examples only.")
    per_device_train_batch_size: Fixed[int] = _flag(8, "Examples per forward pass.")
    per_device_eval_batch_size: int = _flag(8, "Examples per evaluation step.")
    gradient_accumulation_steps: Fixed[int] = _flag(
        1, "Forward passes whose gradients are averaged for one training step."
    )
    optim: Fixed[str] = _flag(
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
    max_grad_norm: Fixed[float] = _flag(
        1.0, "Gradients are scaled down to this global norm; 0 leaves them as they are."
    )
    num_train_epochs: Fixed[float] = _flag(3.0, "Passes over the training data.")
    max_steps: Fixed[int] = _flag(
        -1, "The number of steps if positive, whatever the epochs."
    )
    lr_scheduler_type: Fixed[Literal["linear", "cosine", "constant"]] = _flag(
        "linear", "How the learning rate goes on after the warm-up."
    )
    warmup_ratio: Fixed[float] = _flag(
        0.0, "Share of the steps in which the learning rate rises linearly from 0."
    )
    warmup_steps: Fixed[int] = _flag(0, "The same in steps; overrides --warmup_ratio.")
    bf16: Fixed[bool] = _flag(
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
    metric_for_best_model: str = _flag("loss", 'What "best" means, such as f1.')
    resume_from_checkpoint: str | None = _flag(
        None,
        "A checkpoint directory to resume from; without a value, or with "
        '"last", the last one in --output_dir.',
        nargs="?",
        const="last",
    )
    report_to: Literal["none", "tensorboard"] = _flag(
        "none", "Where metrics go beside metrics.jsonl."
    )
    seed: Fixed[int] = _flag(42, "Fixes initialization, data order and dropout.")
    overwrite_output_dir: bool = _flag(
        False,
        "Train anew into a directory that is not empty; its checkpoints are deleted.",
    )

    @property
    def fixed(self) -> dict[str, Any]:
        """The flags that a resumed run must share with the run it resumes."""
        return {
            f"--{name}": getattr(self, name)
            for name, hint in get_type_hints(type(self), include_extras=True).items()
            if get_origin(hint) is Annotated
        }

    @property
    def data_name(self) -> str:
        """What the training data are called, without folders and endings."""
        return Path(self.train_file or "").stem

    def check(self) -> None:
        """Checks each flag, and that they go together.

        Raises:
          UserError: naming the flag, its value and what it may be.
        """
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
            self._check_at_least(name, minimum)
        if not 0 < self.num_train_epochs < math.inf:
            raise UserError(
                f"--num_train_epochs must be positive, got {self.num_train_epochs}."
            )
        if self.max_steps == 0 or self.max_steps < -1:
            raise UserError(
                "--max_steps must be positive, or -1 to count by epochs, got "
                f"{self.max_steps}."
            )
        if not 0 <= self.warmup_ratio <= 1:
            raise UserError(
                f"--warmup_ratio must be in [0, 1], got {self.warmup_ratio}."
            )
        if not (self.do_train or self.do_eval or self.do_predict):
            raise UserError(
                "there is nothing to do: give --do_train, --do_eval, --do_predict or "
                "more than one of them."
            )
        self._check_best_model()

    def _check_at_least(self, name: str, minimum: float) -> None:
        value = getattr(self, name)
        if value is not None and not minimum <= value < math.inf:
            raise UserError(f"--{name} must be at least {minimum}, got {value}.")

    def _check_files(self, data_flag: str) -> None:
        """Checks that there are data for everything to do, without ``data_flag``."""
        files = {
            "do_train": "train_file",
            "do_eval": "validation_file",
            "do_predict": "test_file",
        }
        for action, name in files.items():
            if getattr(self, action) and getattr(self, name) is None:
                raise UserError(f"--{action} needs --{data_flag} or --{name}.")

    def _check_best_model(self) -> None:
        if not self.load_best_model_at_end:
            return
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


@dataclasses.dataclass(frozen=True)
class GlueArguments(Arguments):
    """The flags of `run_glue.py`; its files are .csv, .tsv, .json(l) or .parquet."""

    task_name: Fixed[str | None] = _flag(
        None,
        "The GLUE task: cola, sst2, mrpc, qqp, stsb, mnli, qnli, rte or wnli. Without "
        "it, the data are the files given: .csv, .tsv, .json, .jsonl or .parquet.",
    )
    dataset_name: str = _flag(
        "nyu-mll/glue",
        "A hub id, or a directory that holds TASK/train-*.parquet and "
        "TASK/validation-*.parquet.",
    )

    @property
    def data_name(self) -> str:
        return self.task_name or super().data_name

    def check(self) -> None:
        super().check()
        if self.task_name is None:
            self._check_files("task_name")


@dataclasses.dataclass(frozen=True)
class QaArguments(Arguments):
    """The flags of `run_qa.py`."""

    dataset_name: str | None = _flag(
        None,
        "A hub id (squad and squad_v2 are short for rajpurkar/squad and "
        "rajpurkar/squad_v2), or a directory that holds train-*.parquet and "
        "validation-*.parquet, itself or one folder deeper. Without it, the data are "
        "the files given: SQuAD's own .json, or .jsonl or .parquet.",
    )
    dataset_config_name: str | None = _flag(
        None, "The configuration of the data set, where it has several."
    )
    version_2_with_negative: bool = _flag(
        False, "Some questions have no answer, as in SQuAD version 2."
    )
    max_seq_length: Fixed[int] = _flag(
        384, "Tokens of a question with a chunk of its context at most."
    )
    doc_stride: Fixed[int] = _flag(
        128, "Tokens that two neighbouring chunks of a long context share."
    )
    n_best_size: int = _flag(
        20, "Answers to list per question, and start and end positions to combine."
    )
    max_answer_length: int = _flag(30, "Tokens of an answer at most.")
    null_score_diff_threshold: float = _flag(
        0.0,
        "A question is left unanswered if the score of no answer exceeds that of the "
        "best answer by more than this; with --version_2_with_negative.",
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
        for name in ("n_best_size", "max_answer_length"):
            self._check_at_least(name, 1)
        self._check_at_least("doc_stride", 0)
        if not math.isfinite(self.null_score_diff_threshold):
            raise UserError(
                "--null_score_diff_threshold must be a number, got "
                f"{self.null_score_diff_threshold}."
            )


AnyArguments = TypeVar("AnyArguments", bound=Arguments)


def parse_arguments(
    kind: type[AnyArguments], argv: Sequence[str] | None = None
) -> AnyArguments:
    """Parses and checks the flags of a script.

    Args:
      kind: the flags it has.
      argv: what was typed, by default on the command line.

    Raises:
      UserError: naming the flag, its value and what it may be.
    """
    parser = HfArgumentParser(kind, allow_abbrev=False)  # pyright: ignore[reportArgumentType]
    args, unknown = parser.parse_args_into_dataclasses(
        None if argv is None else list(argv),
        return_remaining_strings=True,
        look_for_args_file=False,
    )
    if unknown:
        parser.error(f"unrecognized arguments: {' '.join(unknown)}")
    if args.eval_strategy != "no":
        args = dataclasses.replace(args, do_eval=True)
    if isinstance(args, GlueArguments) and args.task_name is not None:
        args = dataclasses.replace(args, task_name=args.task_name.lower())
    args.check()
    return args
