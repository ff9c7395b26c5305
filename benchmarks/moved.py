r"""Measures how far fine-tuning moved the parameters and the word embeddings.

    python benchmarks/moved.py --from bert-tiny seeds_out/*/seed-0

Prints Euclidean distances from the model in the first directory to the models that
`run_glue.py` wrote: by kind of parameter, and for single rows of the word-embedding
table, ranked by distance.
"""

import argparse
from pathlib import Path

import numpy as np
from bert_finetune.cli import run_script
from bert_finetune.model import pretrained
from tables import append_row

# Kind by the first of these parts that a parameter's name contains.
KINDS = {
    "word_embeddings": "word embeddings",
    "embeddings": "other embeddings",
    ".attention.": "attention",
    ".dense.": "feed-forward",
}
RANKS = (1, 100, 1_000, 5_000, 10_000)


def distances(start: Path, end: Path) -> dict[str, float]:
    """Returns distances by kind of parameter and by rank of word embeddings."""
    before, after = map(pretrained.read_tensors, (start, end))
    squares: dict[str, float] = {}
    rows = np.array([])
    for name, tensor in after.items():
        if not name.startswith(("bert.embeddings.", "bert.encoder.")):
            continue
        kind = next((kind for part, kind in KINDS.items() if part in name), "others")
        difference = tensor.astype(np.float64) - before[name]
        squares[kind] = squares.get(kind, 0.0) + np.sum(difference**2)
        if kind == "word embeddings":
            rows = np.sort(np.linalg.norm(difference, axis=1))[::-1]
    kinds = {kind: float(np.sqrt(squares[kind])) for kind in KINDS.values()}
    return kinds | {f"row {rank:,}": float(rows[rank - 1]) for rank in RANKS}


def main() -> None:
    """Prints the table."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("directories", nargs="+", type=Path, metavar="DIR")
    parser.add_argument("--from", dest="start", type=Path, required=True, metavar="DIR")
    parser.add_argument("--output", type=Path, help="Append rows to this file.")
    args = parser.parse_args()
    results = {str(path): distances(args.start, path) for path in args.directories}
    titles = next(iter(results.values()))
    print("| | " + " | ".join(titles) + " |\n| --- |" + " ---: |" * len(titles))
    for path, moved in results.items():
        cells = [f"{value:.3g}" for value in moved.values()]
        print(f"| {path} | " + " | ".join(cells) + " |")
        append_row(args.output, {"run": path, **moved})


if __name__ == "__main__":
    run_script(main, "nothing was left to save.")
