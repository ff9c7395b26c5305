"""Fine-tunes BERT on a GLUE task or custom files, with M-FAC or an Optax optimizer.

The flags follow Hugging Face's `run_glue.py`; `--help` lists them. Run from the root of
the repository, for example:

    python examples/run_glue.py --seed 1234 --model_name_or_path prajjwal1/bert-tiny \
        --task_name qqp --do_train --do_eval --max_seq_length 128 \
        --per_device_train_batch_size 32 --learning_rate 1e-4 --num_train_epochs 5 \
        --output_dir out_dir/ --optim MFAC \
        --optim_args '{"lr": 1e-4, "num_grads": 1024, "damp": 1e-6}'
"""

import shlex
import sys
from collections.abc import Sequence

from bert_finetune import cli
from bert_finetune.arguments import GlueArguments, parse_arguments


def main(argv: Sequence[str] | None = None) -> dict[str, float]:
    """Runs the script with these flags; returns the evaluation results."""
    argv = list(sys.argv[1:] if argv is None else argv)
    args = parse_arguments(GlueArguments, argv)
    # Slow imports come after parsing, so that flag errors show immediately.
    from bert_finetune.finetune import finetune
    from bert_finetune.glue.task import Classification

    cli.set_up_jax()
    command = shlex.join(["python", "examples/run_glue.py", *argv])
    return finetune(args, Classification, command)


if __name__ == "__main__":
    cli.run_script(main, "there was nothing to save.")
