"""Fine-tunes a small BERT with M-FAC and with AdamW on a generated paraphrase set.

    python examples/run_demo.py

Needs no download: `paraphrases.py` generates the questions, and the BERT has the shape
of BERT-tiny, a small vocabulary and random weights. Both runs go through `run_glue.py`.
Prints a table with a bag-of-words logistic regression as baseline and plots the
accuracies. Exits with an error if an optimizer does not beat the baseline.
"""

import argparse
from collections.abc import Sequence
from pathlib import Path

import datasets
import numpy as np
import run_glue
from bert_finetune import cli
from bert_finetune.errors import UserError
from bert_finetune.files import read_json_lines
from bert_finetune.model import bert, pretrained
from matplotlib.figure import Figure
from paraphrases import Pair, generate, vocabulary
from sklearn.feature_extraction.text import CountVectorizer
from sklearn.linear_model import LogisticRegression
from sklearn.metrics import accuracy_score, f1_score
from transformers import BertConfig, BertTokenizer

NUM_TRAIN, NUM_VALIDATION = 8000, 1000
MAX_LENGTH = 17  # Tokens of the longest pair.
BAG_OF_WORDS = "bag of words"
NUM_STEPS = 3000
RUNS = {"M-FAC": "--optim adam_mfac", "AdamW": "--optim adamw"}
# AdamW's learning rate and warm-up are the best in a sweep over 1e-4, 2e-4, 5e-4, 1e-3
# and 2e-3, without warm-up and with 10 %; M-FAC takes them. An epoch has 250 steps.
FLAGS = (
    f"--task_name qqp --do_train --max_steps {NUM_STEPS} --max_seq_length {MAX_LENGTH} "
    "--learning_rate 2e-4 --warmup_ratio 0 "
    "--per_device_train_batch_size 32 --per_device_eval_batch_size 100 --num_devices 1 "
    "--logging_steps 100 --eval_strategy epoch --save_strategy no "
    "--overwrite_output_dir"
)


def main(output_dir: Path) -> None:
    """Trains and prints the table; raises if an optimizer misses the baseline."""
    datasets.disable_progress_bars()
    pairs = generate(NUM_TRAIN + NUM_VALIDATION, seed=0)
    train, validation = pairs[:NUM_TRAIN], pairs[NUM_TRAIN:]
    write_data(output_dir / "data", train=train, validation=validation)
    write_model(output_dir / "model")
    results = {BAG_OF_WORDS: bag_of_words(train, validation)}
    for name in RUNS:
        results[name] = fine_tune(output_dir, name)
    plot_accuracies(output_dir, results[BAG_OF_WORDS]["eval_accuracy"])
    print(f"\n{'':14}{'accuracy':>10}{'F1':>8}")
    for name, values in results.items():
        print(f"{name:14}{values['eval_accuracy']:10.1%}{values['eval_f1']:8.1%}")
    print(f"\nThe curves are in {output_dir / 'curves.png'}.")
    for name in RUNS:
        if results[name]["eval_accuracy"] <= results[BAG_OF_WORDS]["eval_accuracy"]:
            raise UserError(f"{name} does not beat the {BAG_OF_WORDS}.")


def write_data(directory: Path, **splits: Sequence[Pair]) -> None:
    """Writes the pairs in the layout of GLUE's QQP."""
    (directory / "qqp").mkdir(parents=True, exist_ok=True)
    for split, pairs in splits.items():
        rows = datasets.Dataset.from_list([pair._asdict() for pair in pairs])
        rows.to_parquet(directory / "qqp" / f"{split}-00000-of-00001.parquet")


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
        # 1/√hidden_size preserves the scale of activations through random weights.
        # Batches this small need no dropout.
        initializer_range=0.09,
        hidden_dropout_prob=0.0,
        attention_probs_dropout_prob=0.0,
    )
    model_class = bert.BertForSequenceClassification
    params = bert.init_params(config, model_class, seed=0)
    tokenizer = BertTokenizer.from_pretrained(directory)
    model = pretrained.Pretrained(params, config, tokenizer, model_class, [])
    pretrained.save_pretrained(directory, model)


def fine_tune(output_dir: Path, name: str) -> dict[str, float]:
    """Runs `run_glue.py` on the generated set with one optimizer."""
    paths = {
        "--model_name_or_path": output_dir / "model",
        "--dataset_name": output_dir / "data",
        "--output_dir": output_dir / name,
    }
    flags = [f"{flag}={path}" for flag, path in paths.items()]
    return run_glue.main([*flags, *FLAGS.split(), *RUNS[name].split()])


def bag_of_words(train: Sequence[Pair], validation: Sequence[Pair]) -> dict[str, float]:
    """Returns results of a logistic regression on word counts and their differences."""
    counts = CountVectorizer().fit([q for pair in train for q in pair[:2]])

    def features(pairs: Sequence[Pair]) -> np.ndarray:
        questions = list(zip(*pairs, strict=True))[:2]
        first, second = (counts.transform(column).toarray() for column in questions)
        return np.hstack([first, second, abs(first - second)])

    model = LogisticRegression(max_iter=1000)
    model.fit(features(train), [pair.label for pair in train])
    answers = [pair.label for pair in validation], model.predict(features(validation))
    return {"eval_accuracy": accuracy_score(*answers), "eval_f1": f1_score(*answers)}


def plot_accuracies(output_dir: Path, baseline: float) -> None:
    """Plots validation accuracies against the step; labels each curve at its end."""
    curves = {BAG_OF_WORDS: [(0, baseline), (NUM_STEPS, baseline)]}
    for name in RUNS:
        lines = read_json_lines(output_dir / name / "metrics.jsonl")
        evaluations = [line for line in lines if "eval_accuracy" in line]
        curves[name] = [(line["step"], line["eval_accuracy"]) for line in evaluations]
    figure = Figure(figsize=(8, 4.5), layout="constrained")
    axes = figure.subplots()
    axes.set_title("A small BERT learns to recognize paraphrases")
    axes.set(xlabel="training step", ylabel="accuracy on the validation pairs")
    axes.set_xlim(0, NUM_STEPS)
    axes.yaxis.set_major_formatter("{x:.0%}")
    for name, points in curves.items():
        (curve,) = axes.plot(*zip(*points, strict=True))
        label, color = f"  {name}, {points[-1][1]:.1%}", curve.get_color()
        axes.annotate(label, points[-1], color=color, va="center")
    figure.savefig(output_dir / "curves.png", dpi=150)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(
        description="Trains a small BERT with M-FAC and AdamW."
    )
    parser.add_argument("--output_dir", type=Path, default=Path("demo_out"))
    output_dir = parser.parse_args().output_dir
    cli.run_script(lambda: main(output_dir), "the demo starts over next time.")
