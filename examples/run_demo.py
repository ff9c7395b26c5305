"""Fine-tunes a small BERT with M-FAC and with AdamW on a generated paraphrase set.

    python examples/run_demo.py

Needs no download: the questions come from `paraphrases.py`, and the BERT has the shape
of BERT-tiny, a vocabulary of its own and random weights. Both runs go through
`run_glue.py`. The result is a table beside a bag-of-words logistic regression, and a
plot of the curves; the exit code says whether both optimizers beat the baseline.
"""

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

import datasets
import numpy as np
import run_glue
from bert_finetune.errors import Interrupted, UserError
from bert_finetune.files import read_json_lines
from bert_finetune.glue import metrics
from bert_finetune.model import bert, pretrained
from bert_finetune.reporting.plots import plot_curves
from paraphrases import Pair, generate, vocabulary
from sklearn.feature_extraction.text import CountVectorizer
from sklearn.linear_model import LogisticRegression
from transformers import BertConfig, BertTokenizer

NUM_TRAIN, NUM_VALIDATION = 8000, 1000
MAX_LENGTH = 17  # Of the longest pair.
# The flags that suit this set; a step of M-FAC takes twice the time of one of AdamW.
RUNS = {
    "MFAC": [
        *("--max_steps", "1500", "--warmup_ratio", "0.1"),
        *("--optim_args", '{"lr": 3e-4, "num_grads": 128, "damp": 1e-4}'),
    ],
    "adamw": ["--max_steps", "3000", "--optim_args", '{"lr": 2e-4, "b2": 0.98}'],
}


def main(argv: Sequence[str] | None = None) -> None:
    """Trains, prints the table and says where the plot is.

    Raises:
      UserError: if an optimizer does not beat the baseline.
    """
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])  # pyright: ignore[reportOptionalMemberAccess]
    parser.add_argument("--output_dir", type=Path, default=Path("demo_out"))
    output_dir = parser.parse_args(argv).output_dir
    datasets.disable_progress_bars()
    pairs = generate(NUM_TRAIN + NUM_VALIDATION, seed=0)
    train, validation = pairs[:NUM_TRAIN], pairs[NUM_TRAIN:]
    write_data(output_dir / "data", train, validation)
    write_model(output_dir / "model")
    results = {"bag of words": bag_of_words(train, validation)}
    histories = {}
    for optim in RUNS:
        results[optim] = fine_tune(output_dir, optim)
        metrics_file = output_dir / optim / "metrics.jsonl"
        histories[optim] = read_json_lines(metrics_file)
    plot = output_dir / "curves.png"
    plot_curves(plot, "Generated paraphrases", histories, ["accuracy"])
    print(f"\n{'':14}{'accuracy':>10}{'F1':>8}")
    for name, values in results.items():
        print(f"{name:14}{values['eval_accuracy']:10.1%}{values['eval_f1']:8.1%}")
    print(f"\nThe curves are in {plot}.")
    baseline = results["bag of words"]["eval_accuracy"]
    for optim in RUNS:
        if results[optim]["eval_accuracy"] <= baseline:
            raise UserError(f"{optim} does not beat the bag of words.")


def write_data(
    directory: Path, train: Sequence[Pair], validation: Sequence[Pair]
) -> None:
    """Writes the pairs in the layout of GLUE's QQP."""
    for split, pairs in {"train": train, "validation": validation}.items():
        columns = dict(
            zip(Pair._fields, map(list, zip(*pairs, strict=True)), strict=True)
        )
        path = directory / "qqp" / f"{split}-00000-of-00001.parquet"
        path.parent.mkdir(parents=True, exist_ok=True)
        datasets.Dataset.from_dict(columns).to_parquet(path)


def write_model(directory: Path) -> None:
    """Writes a random BERT of BERT-tiny's shape."""
    directory.mkdir(parents=True, exist_ok=True)
    tokens = vocabulary()
    (directory / "vocab.txt").write_text("\n".join(tokens) + "\n")
    config = BertConfig(
        vocab_size=len(tokens),
        hidden_size=128,
        num_hidden_layers=2,
        num_attention_heads=2,
        intermediate_size=512,
        max_position_embeddings=64,
        # Random weights want the scale that keeps a signal's size, 1/√hidden_size;
        # so few examples at a time want no dropout.
        initializer_range=0.09,
        hidden_dropout_prob=0.0,
        attention_probs_dropout_prob=0.0,
    )
    model_class = bert.BertForSequenceClassification
    params = bert.init_params(config, model_class, seed=0)
    tokenizer = BertTokenizer.from_pretrained(directory)
    model = pretrained.Pretrained(params, config, tokenizer, model_class, [])
    pretrained.save_pretrained(directory, model)


def fine_tune(output_dir: Path, optim: str) -> dict[str, float]:
    """Runs `run_glue.py` on the generated set with one optimizer."""
    return run_glue.main(
        [
            *("--model_name_or_path", str(output_dir / "model")),
            *("--dataset_name", str(output_dir / "data"), "--task_name", "qqp"),
            *("--output_dir", str(output_dir / optim), "--overwrite_output_dir"),
            *("--do_train", "--do_eval", "--max_seq_length", str(MAX_LENGTH)),
            *("--per_device_train_batch_size", "32", "--logging_steps", "1"),
            *("--per_device_eval_batch_size", "100"),
            *("--optim", optim, *RUNS[optim]),
        ]
    )


def bag_of_words(train: Sequence[Pair], validation: Sequence[Pair]) -> dict[str, float]:
    """Logistic regression on both questions' word counts and their differences."""
    counts = CountVectorizer().fit([q for pair in train for q in pair[:2]])

    def features(pairs):
        first, second = (
            counts.transform([pair[i] for pair in pairs]).toarray() for i in (0, 1)
        )
        return np.hstack([first, second, abs(first - second)])

    labels, expected = (
        np.array([pair.label for pair in pairs]) for pairs in (train, validation)
    )
    model = LogisticRegression(max_iter=1000).fit(features(train), labels)
    values = metrics.glue_metrics(
        ["accuracy", "f1"], expected, model.predict(features(validation))
    )
    return {f"eval_{name}": value for name, value in values.items()}


if __name__ == "__main__":
    try:
        main()
    except (Interrupted, KeyboardInterrupt):
        sys.exit("interrupted.")
    except UserError as error:
        sys.exit(f"error: {error}")
