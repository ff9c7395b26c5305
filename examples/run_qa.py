"""Fine-tunes a BERT to answer questions about texts, as in SQuAD, with any optimizer.

The flags are those of Hugging Face's script of this name; `--help` lists them. For
example, from the root of the repository:

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
    """Runs the script with these flags; returns the results of the evaluation."""
    argv = list(sys.argv[1:] if argv is None else argv)
    args = parse_arguments(QaArguments, argv)
    # Only now the slow imports, so that a mistake in a flag shows at once.
    from bert_finetune.finetune import finetune
    from bert_finetune.squad.task import QuestionAnswering

    cli.set_up_jax()
    command = shlex.join(["python", "examples/run_qa.py", *argv])
    return finetune(args, QuestionAnswering, command)


if __name__ == "__main__":
    cli.run_script(main, "nothing was left to save.")
