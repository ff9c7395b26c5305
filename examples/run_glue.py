"""Fine-tunes a BERT on a GLUE task with M-FAC or AdamW.

The flags are those of Hugging Face's script of this name; `--help` lists them. For
example, from the root of the repository:

    python examples/run_glue.py --seed 1234 --model_name_or_path prajjwal1/bert-tiny \
        --task_name qqp --do_train --do_eval --max_seq_length 128 \
        --per_device_train_batch_size 32 --learning_rate 1e-4 --num_train_epochs 5 \
        --output_dir out_dir/ --optim MFAC \
        --optim_args '{"lr": 1e-4, "num_grads": 1024, "damp": 1e-6}'
"""

import sys
from collections.abc import Sequence

from bert_finetune.arguments import parse_arguments
from bert_finetune.errors import UserError


def main(argv: Sequence[str] | None = None) -> dict[str, float]:
    """Runs the script with these flags; returns the results of the evaluation."""
    args = parse_arguments(argv)
    # Only now the slow imports, so that a mistake in a flag shows at once.
    from bert_finetune import glue

    return glue.run(args)


if __name__ == "__main__":
    try:
        main()
    except UserError as error:
        sys.exit(f"error: {error}")
