import ast
import json
import math

import pytest
from bert_finetune.arguments import GlueArguments
from bert_finetune.reporting import model_card
from bert_finetune.reporting.model_card import Description
from huggingface_hub import ModelCard

TASK = Description(
    title="mrpc",
    dataset="nyu-mll/glue",
    config="mrpc",
    metrics=["accuracy", "f1"],
    pipeline_tag="text-classification",
)
RESULTS = {"eval_loss": 0.625, "eval_accuracy": 0.75, "eval_f1": 0.8}
HYPERPARAMS = {"lr": 1e-4, "damp": 1e-6}
LINES = [
    {"step": 5, "epoch": 0.5, "eval_loss": 0.7, "eval_accuracy": 0.5},
    {"step": 10, "epoch": 1.0, "loss": 0.65, "accuracy": 0.6, "learning_rate": 1e-4},
    {"step": 10, "epoch": 1.0, "eval_loss": 0.625, "eval_accuracy": 0.75},
]


def write(
    directory,
    *,
    results=RESULTS,
    lines=LINES,
    command="python examples/run_glue.py --optim MFAC",
    hyperparams=HYPERPARAMS,
    model_name="prajjwal1/bert-tiny",
    optimizer="MFAC",
    flags=None,
    **changes,
):
    """Returns the text of a card, and the card as `huggingface_hub` reads it."""
    directory.mkdir(exist_ok=True)
    path = directory / "README.md"
    model_card.write_model_card(
        path,
        GlueArguments(model_name, "out", optim=optimizer, **flags or {}),
        TASK._replace(**changes),
        hyperparams,
        results,
        lines,
        command,
    )
    assert list(directory.glob("*.partial")) == []
    text = path.read_text("utf-8")
    return text, ModelCard(text)


def rows(text):
    return [line for line in text.splitlines() if line.startswith("|")]


def test_front_matter_is_what_the_hub_reads(tmp_path):
    _, card = write(tmp_path / "my-model")
    data = card.data.to_dict()
    index = data.pop("model-index")
    assert data == {
        "base_model": "prajjwal1/bert-tiny",
        "datasets": ["nyu-mll/glue"],
        "library_name": "transformers",
        "metrics": ["accuracy", "f1"],
        "pipeline_tag": "text-classification",
        "tags": ["jax", "flax", "optax", "mfac"],
    }
    assert index[0]["name"] == "my-model"
    assert {r.metric_type: r.metric_value for r in card.data.eval_results} == {
        "accuracy": 0.75,
        "f1": 0.8,
    }
    result = card.data.eval_results[0]
    assert (result.dataset_type, result.dataset_config) == ("nyu-mll/glue", "mrpc")
    json.dumps(index, allow_nan=False)


def test_text_says_how_the_model_was_trained(tmp_path):
    text, _ = write(tmp_path / "my-model")
    for part in (
        "# my-model\n",
        "[prajjwal1/bert-tiny](https://huggingface.co/prajjwal1/bert-tiny)",
        "`mrpc` of [nyu-mll/glue](https://huggingface.co/datasets/nyu-mll/glue)",
        "- Loss: `0.625`\n- Accuracy: `0.75`\n- F1: `0.8`\n",
        "```bash\npython examples/run_glue.py --optim MFAC\n```",
        "- seed: `42`\n- MFAC: `lr = 0.0001, damp = 1e-06`\n",
        "- jax: `",
        "- mfac_jax: `",
    ):
        assert part in text


def test_table_has_the_training_loss_logged_last(tmp_path):
    text, _ = write(tmp_path, metrics=["accuracy"])
    assert rows(text) == [
        "| Step | Epoch | Training loss | Validation loss | Accuracy |",
        "| ---: | ---: | ---: | ---: | ---: |",
        "| 5 | 0.5 |  | 0.7 | 0.5 |",
        "| 10 | 1 | 0.65 | 0.625 | 0.75 |",
    ]


@pytest.mark.parametrize(("number", "shown"), [(0, 0), (1, 1), (30, 30), (1000, 30)])
def test_table_is_short(tmp_path, number, shown):
    lines = [
        {"step": step, "epoch": 1.0, "eval_loss": 1.0} for step in range(1, number + 1)
    ]
    _, *table = rows(write(tmp_path, lines=lines)[0]) or [None]
    assert len(table) == shown + (shown > 0)
    if shown:
        assert table[1].startswith("| 1 |")
        assert table[-1].startswith(f"| {number} |")


@pytest.mark.parametrize("name", ["bert-tiny", "./bert-tiny", "runs/bert-tiny", None])
def test_directories_are_not_hub_ids(tmp_path, monkeypatch, name):
    monkeypatch.chdir(tmp_path)
    directory = tmp_path / (name or "bert-tiny")
    directory.mkdir(parents=True)
    name = name or str(directory)
    text, card = write(tmp_path / "out", model_name=name, dataset=name)
    assert "This is `bert-tiny`, fine-tuned on `mrpc` of `bert-tiny` with" in text
    assert str(tmp_path) not in text
    for key in ("base_model", "datasets", "model-index", "model_name"):
        assert key not in card.data.to_dict()


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
def test_odd_results_are_shown_but_not_indexed(tmp_path, value):
    results = {"eval_loss": value, "eval_accuracy": value, "eval_f1": 0.5}
    lines = [
        {"step": 1, "epoch": 1.0, "loss": value},
        {"step": 1, "epoch": 1.0, "eval_loss": value},
    ]
    text, card = write(tmp_path, results=results, lines=lines)
    assert f"- Accuracy: `{value}`" in text
    assert f"| 1 | 1 | {value} | {value} |  |  |" in text
    assert [r.metric_type for r in card.data.eval_results] == ["f1"]


def test_a_run_without_evaluations_has_a_card(tmp_path):
    text, card = write(tmp_path, results={}, lines=LINES[1:2], config=None)
    assert "It was not evaluated." in text
    assert rows(text) == []
    assert "metrics" not in card.data.to_dict()


@pytest.mark.parametrize(
    ("tag", "auto_class"),
    [
        ("text-classification", "AutoModelForSequenceClassification"),
        ("question-answering", "AutoModelForQuestionAnswering"),
    ],
)
def test_the_loading_code_fits_the_kind_of_model(tmp_path, tag, auto_class):
    results = {"eval_exact_match": 80.5, "eval_f1": 88.25}
    text, card = write(
        tmp_path / "it's",
        dataset="rajpurkar/squad",
        config=None,
        metrics=["exact_match", "f1"],
        results=results,
        pipeline_tag=tag,
    )
    code = text.split("```python\n")[1].split("\n```")[0]
    ast.parse(code)
    assert f"{auto_class}.from_pretrained(name)" in code
    assert card.data.pipeline_tag == tag
    assert "- Exact match: `80.5`" in text
    found = {f"eval_{r.metric_type}": r.metric_value for r in card.data.eval_results}
    assert found == results


@pytest.mark.parametrize("odd", ["a ``` b\n---\n", "null: {x", "\udcff", "ü|$<b>"])
def test_odd_texts_break_nothing(tmp_path, odd):
    text, card = write(
        tmp_path,
        model_name=odd,
        dataset=odd,
        config=odd,
        optimizer=odd,
        command=odd,
        hyperparams={"lr": odd},
    )
    assert card.data.tags[-1] == odd.lower()
    assert text.count("## Versions") == 1
    shown = odd.encode("utf-8", "replace").decode()
    assert f"```bash\n{shown}\n```" in text


def test_only_informative_flags_are_listed(tmp_path):
    text, _ = write(tmp_path, flags={"warmup_ratio": 0.1, "task_name": "mrpc"})
    listed = text.split("```\n\n- ")[1].split("\n\n")[0].split("\n- ")
    assert listed == [
        "max_seq_length: `128`",
        "per_device_train_batch_size: `8`",
        "per_device_eval_batch_size: `8`",
        "optim: `MFAC`",
        "learning_rate: `0.0001`",
        "num_train_epochs: `3.0`",
        "lr_scheduler_type: `linear`",
        "warmup_ratio: `0.1`",
        "seed: `42`",
        "task_name: `mrpc`",
        "MFAC: `lr = 0.0001, damp = 1e-06`",
    ]
