import json

import pytest
from bert_finetune.arguments import GlueArguments, QaArguments, parse_arguments
from bert_finetune.errors import UserError

REQUIRED = (
    "--model_name_or_path somewhere --task_name qqp --output_dir out --do_train"
).split()


def test_the_published_command():
    args = parse_arguments(
        GlueArguments,
        [
            *"--seed 1234 --model_name_or_path prajjwal1/bert-tiny".split(),
            *"--task_name qqp --do_train --do_eval --max_seq_length 128".split(),
            *"--per_device_train_batch_size 32 --learning_rate 1e-4".split(),
            *"--num_train_epochs 5 --output_dir out_dir/ --optim MFAC".split(),
            *["--optim_args", '{"lr": 1e-4, "num_grads": 1024, "damp": 1e-6}'],
        ],
    )
    assert args.model_name_or_path == "prajjwal1/bert-tiny"
    assert args.dataset_name == "nyu-mll/glue"
    assert args.do_train
    assert args.do_eval
    assert (args.seed, args.max_seq_length, args.num_train_epochs) == (1234, 128, 5.0)
    assert args.optim_args == '{"lr": 1e-4, "num_grads": 1024, "damp": 1e-6}'


def test_the_published_command_of_squad():
    args = parse_arguments(
        QaArguments,
        [
            *"--seed 42 --model_name_or_path prajjwal1/bert-tiny".split(),
            *"--dataset_name squad_v2 --version_2_with_negative --do_train".split(),
            *"--do_eval --per_device_train_batch_size 12 --learning_rate 1e-4".split(),
            *"--num_train_epochs 2 --max_seq_length 384 --doc_stride 128".split(),
            *"--output_dir out_dir/ --optim MFAC".split(),
            *["--optim_args", '{"lr": 1e-4, "num_grads": 1024, "damp": 1e-6}'],
        ],
    )
    assert (args.dataset_name, args.version_2_with_negative) == ("squad_v2", True)
    assert (args.max_seq_length, args.doc_stride) == (384, 128)
    # Left at the defaults of transformers 4.
    assert (args.n_best_size, args.max_answer_length) == (20, 30)
    assert args.null_score_diff_threshold == 0


def test_defaults_are_those_of_transformers_4():
    args = parse_arguments(GlueArguments, REQUIRED)
    assert (args.learning_rate, args.weight_decay, args.max_grad_norm) == (5e-5, 0, 1)
    assert (args.num_train_epochs, args.max_steps, args.warmup_ratio) == (3, -1, 0)
    assert args.per_device_train_batch_size == args.per_device_eval_batch_size == 8
    assert (args.logging_steps, args.seed, args.max_seq_length) == (500, 42, 128)
    assert args.max_train_samples is args.max_eval_samples is None
    assert not args.do_eval
    assert not args.overwrite_output_dir


@pytest.mark.parametrize(
    "flags",
    [
        "--max_seq_length 2",
        "--per_device_train_batch_size 0",
        "--per_device_eval_batch_size -1",
        "--max_train_samples 0",
        "--max_eval_samples 0",
        "--learning_rate -0.1",
        "--learning_rate inf",
        "--weight_decay -1",
        "--max_grad_norm nan",
        "--logging_steps 0",
        "--seed -1",
        "--num_train_epochs 0",
        "--max_steps 0",
        "--max_steps -2",
        "--warmup_ratio 1.5",
    ],
)
def test_a_value_out_of_range_is_named(flags):
    flag, value = flags.split()
    with pytest.raises(UserError, match=rf"{flag} must be .*got {float(value):g}"):
        parse_arguments(GlueArguments, [*REQUIRED, flag, value])


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        (REQUIRED[:4], "the following arguments are required: --output_dir"),
        ([*REQUIRED, "--adafactor"], "unknown flag --adafactor; --help lists all"),
        ([*REQUIRED, "--evaluation_strategy=no"], r"did you mean --eval_strategy\?"),
        ([*REQUIRED, "--fp16"], r"unknown flag --fp16; did you mean --bf16\?"),
        ([*REQUIRED, "--learning_rates", "1"], "did you mean --learning_rate"),
        (
            [*REQUIRED, "--seed", "one"],
            "--seed: invalid int value: 'one'; give an int",
        ),
        ([*REQUIRED, "--logging_steps", "0.1"], "value: '0.1'; give an integer"),
        ([*REQUIRED, "--seed", "99999999999999999999"], "must be less than 4294967296"),
        (
            [*REQUIRED, "--lr_scheduler_type=constant", "--warmup_steps=3"],
            "no warm-up, but --warmup_steps is set: give constant_with_warmup",
        ),
        ([*REQUIRED, "--lr_scheduler_type=polynomial"], "choose from 'linear', 'cos"),
    ],
)
def test_unknown_and_invalid_flags_are_one_line_errors(argv, message):
    with pytest.raises(UserError, match=message) as caught:
        parse_arguments(GlueArguments, argv)
    assert "\n" not in str(caught.value)


def test_flags_can_come_from_a_json_file(tmp_path):
    """As with Hugging Face's script."""
    path = tmp_path / "args.json"
    flags = {
        "model_name_or_path": "m",
        "task_name": "STS-B",
        "output_dir": str(tmp_path),
        "do_train": True,
        "do_eval": False,
        "learning_rate": 1e-3,
        "max_train_samples": None,
        "optim_args": {"damp": 1e-6},
        "lr_scheduler_type": "constant_with_warmup",
        "warmup_steps": 2,
    }
    path.write_text(json.dumps(flags))
    args = parse_arguments(GlueArguments, [str(path)])
    assert (args.task_name, args.dataset_name) == ("stsb", "nyu-mll/glue")
    assert (args.do_train, args.do_eval, args.max_train_samples) == (True, False, None)
    assert (args.learning_rate, args.optim_args) == (1e-3, '{"damp": 1e-06}')
    for content, message in (
        ([1], "not a JSON object"),
        ({**flags, "sead": 1}, "--sead"),
    ):
        path.write_text(json.dumps(content))
        with pytest.raises(UserError, match=message):
            parse_arguments(GlueArguments, [str(path)])


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (
            "--train_file a.csv --do_eval",
            "--do_eval needs --task_name, --dataset_name or --validation_file",
        ),
        ("--train_file a.csv --eval_strategy epoch", "--do_eval needs --task_name, "),
        ("--task_name qqp --dataset_config_name a", "a has no effect with --task_name"),
        (
            "--train_file a.csv --do_predict",
            "--do_predict needs --task_name, --dataset_name or --test_file",
        ),
        (
            "--task_name qqp --load_best_model_at_end --eval_strategy steps",
            "to be the same, steps or epoch, got steps and epoch",
        ),
        (
            "--task_name qqp --load_best_model_at_end --eval_strategy steps "
            "--save_strategy steps --eval_steps 7 --save_steps 10",
            "--save_steps 10 to be a multiple of --eval_steps 7",
        ),
    ],
)
def test_incompatible_flags_are_rejected(flags, message):
    required = "--model_name_or_path somewhere --output_dir out --do_train"
    with pytest.raises(UserError, match=message):
        parse_arguments(GlueArguments, [*required.split(), *flags.split()])


def test_flags_that_imply_others():
    args = parse_arguments(
        GlueArguments, [*REQUIRED, "--eval_strategy", "steps", "--task_name=QQP"]
    )
    assert args.do_eval
    assert args.task_name == "qqp"


def test_nothing_to_do_is_an_error():
    with pytest.raises(UserError, match="at least one of --do_train, --do_eval and"):
        parse_arguments(GlueArguments, REQUIRED[:-1])
