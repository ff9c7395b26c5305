r"""How far fine-tuning has moved the parameters, and the rows of the word table.

    python benchmarks/moved.py --from bert-tiny seeds_out/*/seed-0

Euclidean distances from the parameters of the first directory to those of the others,
which `run_glue.py` has written: by kind of parameter, and of the word table also by
row, from the one that has moved most to the 10,000th.
"""

import argparse
import json
from pathlib import Path

import numpy as np
from bert_finetune.cli import run_script
from bert_finetune.model import pretrained

# By the first of these that a name contains; heads, which are new, have none.
KINDS = {
    "word_embeddings": "word table",
    "embeddings": "other embeddings",
    ".attention.": "attention",
    ".dense.": "feed-forward",
}
RANKS = (1, 100, 1_000, 5_000, 10_000)


def distances(start: Path, end: Path) -> dict[str, float]:
    """Returns by kind how far parameters have moved, and rows of the word table."""
    before, after = map(pretrained.read_tensors, (start, end))
    squares: dict[str, float] = {}
    rows = np.array([])
    for name, tensor in after.items():
        if not name.startswith(("bert.embeddings.", "bert.encoder.")):
            continue
        kind = next((kind for part, kind in KINDS.items() if part in name), "others")
        difference = tensor.astype(np.float64) - before[name]
        squares[kind] = squares.get(kind, 0.0) + np.sum(difference**2)
        if kind == "word table":
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
    parser.add_argument("--output", type=Path, help="Where to write the JSON.")
    args = parser.parse_args()
    results = {str(path): distances(args.start, path) for path in args.directories}
    titles = next(iter(results.values()))
    print("| | " + " | ".join(titles) + " |\n| --- |" + " ---: |" * len(titles))
    for path, moved in results.items():
        cells = [f"{value:.3g}" for value in moved.values()]
        print(f"| {path} | " + " | ".join(cells) + " |")
    if args.output is not None:
        args.output.write_text(json.dumps(results, indent=2) + "\n")


if __name__ == "__main__":
    run_script(main, "nothing was left to save.")
