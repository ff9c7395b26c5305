"""Runs the question answering script as a user would, on generated data."""

import json
import re
import shutil

import numpy as np
import pytest
import run_qa
import toy_bert
from bert_finetune.errors import UserError
from bert_finetune.model import bert
from bert_finetune.squad import metrics
from safetensors.numpy import load_file

pytestmark = pytest.mark.usefixtures("quick_compilation")

MFAC = ["--optim=MFAC", '--optim_args={"lr": 1e-2, "num_grads": 32, "damp": 1e-3}']
ADAMW = ["--optim=adamw", "--learning_rate=1e-2"]
TRAINING = [
    *ADAMW,
    *("--do_train", "--do_eval", "--max_steps=60"),
    *("--eval_strategy=steps", "--eval_steps=30", "--save_strategy=steps"),
    *("--save_steps=30", "--save_total_limit=9"),
]


@pytest.fixture(scope="module")
def root(tmp_path_factory):
    root = tmp_path_factory.mktemp("root")
    weights = toy_bert.tensors(bert.BertForQuestionAnswering)
    encoder = {k: v for k, v in weights.items() if k.startswith("bert.")}
    toy_bert.write_model(root / "model", encoder)
    toy_bert.write_squad(root / "squad_v2")
    toy_bert.write_squad(root / "squad", with_negative=False)
    return root


def command(root, output_dir, *flags, dataset="squad_v2"):
    return [
        *("--model_name_or_path", str(root / "model"), "--dataset_name"),
        *(str(root / dataset), "--output_dir", str(output_dir)),
        *("--max_seq_length", "24", "--doc_stride", "6", "--pad_to_max_length"),
        *("--per_device_train_batch_size", "12", "--num_devices", "1", *flags),
        *(["--version_2_with_negative"] if dataset == "squad_v2" else []),
    ]


def read_json(path):
    return json.loads(path.read_text())


def rows_of(with_negative=True):
    """Returns the questions of the validation split, by id."""
    rows = toy_bert.questions(37, with_negative=with_negative, seed=1)
    return {row["id"]: row for row in rows}


def test_trains_evaluates_and_reports(root, tmp_path):
    flags = [*MFAC, "--do_train", "--do_eval", "--max_steps", "120"]
    flags += ["--eval_strategy", "steps", "--eval_steps", "60"]
    results = run_qa.main(command(root, tmp_path, *flags))
    assert read_json(tmp_path / "eval_results.json") == results
    predictions = read_json(tmp_path / "predictions.json")
    null_odds = read_json(tmp_path / "null_odds.json")
    n_best = read_json(tmp_path / "nbest_predictions.json")
    rows = rows_of()
    # Each question of the split once, however many chunks it has.
    assert predictions.keys() == null_odds.keys() == n_best.keys() == rows.keys()
    assert results["eval_total"] == 37
    assert results["eval_samples"] > 37
    golds = [row["answers"]["text"] for row in rows.values()]
    assert results["eval_HasAns_total"] == sum(map(bool, golds))
    best = [next(e["text"] for e in n_best[i] if e["text"]) for i in rows]
    expected = metrics.squad_v2_metrics(
        golds,
        [predictions[i] for i in rows],
        best,
        [null_odds[i] for i in rows],
    )
    for name, value in expected.items():
        assert results[f"eval_{name}"] == pytest.approx(value)
    # It learns: all unanswered would be 40, all answered 60.
    assert results["eval_f1"] > 90
    assert results["eval_HasAns_exact"] > 85
    for id_, text in predictions.items():
        assert (text == "") == (null_odds[id_] > 0)
        assert text in rows[id_]["context"]
        assert sum(entry["probability"] for entry in n_best[id_]) == pytest.approx(1)
    card = (tmp_path / "README.md").read_text()
    assert "pipeline_tag: question-answering" in card
    assert "AutoModelForQuestionAnswering" in card
    assert "doc_stride: `6`" in card
    for name in ("curves.png", "all_results.json", "tokenizer.json"):
        assert (tmp_path / name).exists()
    config = read_json(tmp_path / "config.json")
    assert config["architectures"] == ["BertForQuestionAnswering"]
    names = {f"qa_outputs.{part}" for part in ("weight", "bias")}
    assert names <= load_file(tmp_path / "model.safetensors").keys()


@pytest.fixture(scope="module")
def trained(root):
    output_dir = root / "trained"
    return output_dir, run_qa.main(command(root, output_dir, *TRAINING))


def test_what_was_saved_evaluates_to_the_same(root, tmp_path, trained):
    output_dir, results = trained
    argv = command(root, tmp_path, "--do_eval")
    argv[1] = str(output_dir)
    again = run_qa.main(argv)
    for name, value in results.items():
        if not re.search("epoch|runtime|per_second", name):
            assert again[name] == value
    # Padding to several lengths changes only rounding.
    argv.remove("--pad_to_max_length")
    short = run_qa.main([*argv, "--per_device_eval_batch_size=3"])
    assert short["eval_f1"] == again["eval_f1"]
    odds, expected = (read_json(d / "null_odds.json") for d in (tmp_path, output_dir))
    assert odds == pytest.approx(expected, abs=1e-5)
    again = run_qa.main([*argv, "--null_score_diff_threshold=1e9"])
    assert again["eval_HasAns_f1"] >= results["eval_HasAns_f1"]
    assert (again["eval_NoAns_f1"], again["eval_samples"]) == (
        0,
        results["eval_samples"],
    )
    threshold = f"--null_score_diff_threshold={results['eval_best_f1_thresh']}"
    assert run_qa.main([*argv, threshold])["eval_f1"] == pytest.approx(
        results["eval_best_f1"]
    )


def test_resumed_to_the_bit(root, tmp_path, trained):
    """Resumes from the first of two checkpoints, as after a kill in between."""
    unbroken, results = trained
    output_dir = tmp_path / "out"
    shutil.copytree(unbroken, output_dir)
    shutil.rmtree(output_dir / "checkpoint-60")
    for name in ("model.safetensors", "predictions.json"):
        (output_dir / name).unlink()
    again = run_qa.main(command(root, output_dir, *TRAINING))
    for name, value in results.items():
        if not re.search("runtime|per_second", name):
            assert again[name] == value
    for name in ("model.safetensors", "predictions.json"):
        assert (output_dir / name).read_bytes() == (unbroken / name).read_bytes()


def test_predicts_a_file_without_answers(root, tmp_path, trained):
    output_dir, _ = trained
    rows = [
        {k: row[k] for k in ("id", "question", "context")} for row in rows_of().values()
    ]
    path = tmp_path / "test.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    argv = command(root, tmp_path / "out", "--do_predict", "--test_file", str(path))
    argv[1] = str(output_dir)
    run_qa.main(argv)
    for name in ("predictions", "nbest_predictions", "null_odds"):
        predicted = read_json(tmp_path / "out" / f"predict_{name}.json")
        evaluated = read_json(output_dir / f"{name}.json")
        assert predicted == evaluated


def test_the_length_and_number_of_answers_follow_the_flags(root, tmp_path, trained):
    flags = ["--do_eval", "--max_answer_length=1", "--n_best_size=2"]
    argv = command(root, tmp_path, *flags, "--max_eval_samples=5")
    argv[1] = str(trained[0])
    assert run_qa.main(argv)["eval_total"] == 5
    n_best = read_json(tmp_path / "nbest_predictions.json")
    texts = [entry["text"] for entries in n_best.values() for entry in entries]
    assert all(len(entries) <= 3 for entries in n_best.values())
    assert max(len(text.split()) for text in texts) == 1


def test_version_1(root, tmp_path):
    flags = [*TRAINING, "--load_best_model_at_end"]
    results = run_qa.main(command(root, tmp_path, *flags, dataset="squad"))
    metrics = {"eval_exact_match", "eval_f1", "eval_samples", "epoch"}
    assert metrics <= results.keys()
    assert "eval_exact" not in results
    predictions = read_json(tmp_path / "predictions.json")
    golds = {i: row["answers"]["text"] for i, row in rows_of(False).items()}
    right = [predictions[i] in golds[i] for i in golds]
    assert results["eval_exact_match"] == pytest.approx(100 * np.mean(right))
    assert results["eval_exact_match"] > 90
    assert not (tmp_path / "null_odds.json").exists()


def test_custom_files(root, tmp_path):
    rows = toy_bert.questions(30, with_negative=True, seed=3)
    path = tmp_path / "questions.json"
    path.write_text(json.dumps(toy_bert.as_squad_file(rows)))
    argv = command(root, tmp_path / "out", *ADAMW, "--do_train", "--do_eval")
    argv[2:4] = ["--train_file", str(path), "--validation_file", str(path)]
    results = run_qa.main([*argv, "--max_steps", "60"])
    assert results["eval_total"] == 30
    assert "fine-tuned on `questions.json`" in (tmp_path / "out/README.md").read_text()


def test_short_padding_changes_no_loss(root, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr("bert_finetune.data.batches._LENGTHS", (20,))
    no_dropout = {"hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0}
    toy_bert.write_model(tmp_path / "model", **no_dropout)
    losses = {}
    for name in ("short", "fixed"):
        flags = [*ADAMW, "--do_train", "--max_steps", "30", "--logging_steps", "1"]
        argv = command(root, tmp_path / name, *flags)
        argv[1] = str(tmp_path / "model")
        if name == "short":
            argv.remove("--pad_to_max_length")
        run_qa.main([*argv, "--per_device_train_batch_size", "2"])
        shown = "20, 24" if name == "short" else "24"
        assert f"padded to {shown} tokens" in capsys.readouterr().out
        lines = (tmp_path / name / "metrics.jsonl").read_text().splitlines()
        losses[name] = [json.loads(line)["loss"] for line in lines]
    np.testing.assert_allclose(losses["short"], losses["fixed"], rtol=0, atol=1e-5)


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--max_seq_length", "384"], "384 is more than the 32 positions of the model"),
        (
            ["--doc_stride", "21"],
            "--doc_stride 21 is too large for --max_seq_length 24",
        ),
        (["--doc_stride", "-1"], "--doc_stride must be at least 0, got -1"),
        (["--n_best_size", "0"], "--n_best_size must be at least 1, got 0"),
        (["--max_answer_length", "0"], "--max_answer_length must be at least 1, got 0"),
        (["--null_score_diff_threshold", "nan"], "must be finite, got nan"),
        (
            ["--metric_for_best_model", "loss"],
            "must be one of exact, f1, HasAns_exact, .*, got 'loss'",
        ),
        (["--dataset_name", "nowhere"], "'nowhere' is not a local directory"),
    ],
)
def test_a_bad_flag_writes_nothing(root, tmp_path, monkeypatch, flags, message):
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    argv = command(root, tmp_path / "out", *ADAMW, "--do_train", *flags)
    with pytest.raises(UserError, match=message):
        run_qa.main(argv)
    assert not (tmp_path / "out").exists()


def test_a_group_without_questions_cannot_select_the_best(root, tmp_path):
    argv = command(root, tmp_path / "out", *TRAINING, "--load_best_model_at_end")
    argv += ["--metric_for_best_model=NoAns_f1"]
    argv[3] = str(root / "squad")
    with pytest.raises(UserError, match=r"NoAns_f1 needs questions without answers"):
        run_qa.main(argv)


def test_logits_that_are_not_finite_are_an_error(root, tmp_path):
    weights = toy_bert.tensors(bert.BertForQuestionAnswering)
    weights["qa_outputs.bias"][0] = np.nan
    toy_bert.write_model(tmp_path / "model", weights)
    argv = command(root, tmp_path / "out", "--do_eval")
    argv[1] = str(tmp_path / "model")
    with pytest.raises(UserError, match="the model's logits are not finite"):
        run_qa.main(argv)


def test_without_data_there_is_nothing_to_do(root, tmp_path):
    argv = command(root, tmp_path / "out", "--do_train")
    del argv[2:4]
    with pytest.raises(UserError, match="--do_train needs --dataset_name or --train_"):
        run_qa.main(argv)
