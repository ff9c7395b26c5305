"""Fine-tunes BERT for question answering, with M-FAC or an Optax optimizer.

The flags follow Hugging Face's `run_qa.py`; `--help` lists them. Run from the root of
the repository, for example:

    python examples/run_qa.py --seed 42 --model_name_or_path prajjwal1/bert-tiny \
        --dataset_name squad_v2 --version_2_with_negative --do_train --do_eval \
        --per_device_train_batch_size 12 --learning_rate 1e-4 --num_train_epochs 2 \
        --max_seq_length 384 --doc_stride 128 --output_dir out_dir/ --optim MFAC \
        --optim_args '{"lr": 1e-4, "num_grads": 1024, "damp": 1e-6}'
"""

import shlex
import sys
from collections.abc import Sequence

from bert_finetune import cli
from bert_finetune.arguments import QaArguments, parse_arguments


def main(argv: Sequence[str] | None = None) -> dict[str, float]:
    """Runs the script with these flags; returns the evaluation results."""
    argv = list(sys.argv[1:] if argv is None else argv)
    args = parse_arguments(QaArguments, argv)
    # Slow imports come after parsing, so that flag errors show immediately.
    from bert_finetune.finetune import finetune
    from bert_finetune.squad.task import QuestionAnswering

    cli.set_up_jax()
    command = shlex.join(["python", "examples/run_qa.py", *argv])
    return finetune(args, QuestionAnswering, command)


if __name__ == "__main__":
    cli.run_script(main, "there was nothing to save.")
