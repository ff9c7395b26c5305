"""What a training run has to know of its task."""

from collections.abc import Sequence
from typing import Protocol

from bert_finetune.arguments import Arguments
from bert_finetune.data.batches import batch_lengths
from bert_finetune.data.features import Features
from bert_finetune.errors import UserError
from bert_finetune.model import bert
from bert_finetune.model.pretrained import Pretrained
from bert_finetune.reporting.model_card import Description
from bert_finetune.training.losses import LossFn


class Task(Protocol):
    """A model, the data that the flags name, and what to do with both."""

    @property
    def args(self) -> Arguments:
        """The flags."""
        ...

    @property
    def model(self) -> Pretrained:
        """The model to start from."""
        ...

    @property
    def loss(self) -> LossFn:
        """The loss to minimize."""
        ...

    def train_features(self) -> Features:
        """Returns the tokenized training data."""
        ...

    def evaluate(self, params: bert.Params) -> dict[str, float]:
        """Returns the results of an evaluation, under names that start with eval_."""
        ...

    def predict(self, params: bert.Params) -> None:
        """Writes predictions for the test data."""
        ...

    def describe(self) -> Description:
        """Returns what to call the run in its reports."""
        ...


def check_flags(args: Arguments, model: Pretrained, results: Sequence[str]) -> None:
    """Checks the flags that depend on the model and the task.

    Args:
      args: the flags.
      model: that they name.
      results: what ``--metric_for_best_model`` may be.

    Raises:
      UserError: naming the flag.
    """
    name = args.metric_for_best_model
    if name.removeprefix("eval_") not in results:
        raise UserError(
            "--metric_for_best_model must be one of "
            f"{', '.join(results)}, got {name!r}."
        )
    if args.max_seq_length > model.config.max_position_embeddings:
        raise UserError(
            f"--max_seq_length {args.max_seq_length} is more than the "
            f"{model.config.max_position_embeddings} positions of the model."
        )


def padded_lengths(args: Arguments) -> list[int]:
    """Returns the lengths to which batches may be padded."""
    if args.pad_to_max_length:
        return [args.max_seq_length]
    return batch_lengths(args.max_seq_length)


def speed(seconds: float, num_examples: int, batch_size: int) -> dict[str, float]:
    """Returns what Hugging Face's scripts report of the time of an evaluation."""
    return {
        "samples": num_examples,
        "runtime": seconds,
        "samples_per_second": num_examples / seconds,
        "steps_per_second": -(-num_examples // batch_size) / seconds,
    }
