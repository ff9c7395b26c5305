"""The interface between the training loop and a task."""

from collections.abc import Sequence
from typing import Protocol

from bert_finetune.arguments import Arguments
from bert_finetune.data.batches import batch_lengths
from bert_finetune.data.features import Features
from bert_finetune.errors import UserError
from bert_finetune.model import bert
from bert_finetune.model.pretrained import Pretrained
from bert_finetune.reporting.model_card import Description
from bert_finetune.training import devices
from bert_finetune.training.losses import LossFn


class Task(Protocol):
    """The flags, the initial model and the data of a task, and what to do with them.

    ``evaluate`` returns results prefixed with ``eval_``; ``predict`` writes files.
    """

    @property
    def args(self) -> Arguments: ...
    @property
    def model(self) -> Pretrained: ...
    @property
    def loss(self) -> LossFn: ...
    def train_features(self) -> Features: ...
    def evaluate(self, params: bert.Params) -> dict[str, float]: ...
    def predict(self, params: bert.Params) -> None: ...
    def describe(self) -> Description: ...


def check_flags(args: Arguments, model: Pretrained, results: Sequence[str]) -> None:
    """Validates the flags that depend on the model or on the names of its metrics."""
    best, length = args.metric_for_best_model, args.max_seq_length
    if best.removeprefix("eval_") not in results:
        known = f"one of {', '.join(results)}"
        raise UserError(f"--metric_for_best_model must be {known}, got {best!r}.")
    limit = model.config.max_position_embeddings
    if length > limit:
        what = f"more than the {limit} positions of the model"
        raise UserError(f"--max_seq_length {length} is {what}.")


def padded_lengths(args: Arguments) -> list[int]:
    """Returns the lengths to which batches may be padded."""
    length = args.max_seq_length
    return [length] if args.pad_to_max_length else batch_lengths(length)


def eval_batch_size(args: Arguments) -> int:
    """Returns the evaluation batch size over all devices."""
    return args.per_device_eval_batch_size * devices.count()


def speed(seconds: float, num_examples: int, batch_size: int) -> dict[str, float]:
    """Returns the evaluation times under the names of Hugging Face's scripts."""
    return {
        "samples": num_examples,
        "runtime": seconds,
        "samples_per_second": num_examples / seconds,
        "steps_per_second": -(-num_examples // batch_size) / seconds,
    }
