"""Writes a tiny random BERT, and data like GLUE's and SQuAD's to train it on."""

import collections
import io
import json
import pickle
import sys
import types
import zipfile
from pathlib import Path
from unittest import mock

import numpy as np
import pyarrow as pa
import pyarrow.parquet
from bert_finetune.glue import tasks
from bert_finetune.model import bert, pretrained
from safetensors.numpy import save_file
from transformers import BertConfig

WORDS = "good bad film day red blue one two no yes cat dog".split()
VOCABULARY = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", *WORDS]
CONFIG = {
    "hidden_size": 16,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
    "intermediate_size": 32,
    "max_position_embeddings": 32,
    "vocab_size": len(VOCABULARY),
    "type_vocab_size": 2,
    "hidden_act": "gelu",
    "layer_norm_eps": 1e-12,
    "hidden_dropout_prob": 0.1,
    "attention_probs_dropout_prob": 0.1,
    "initializer_range": 0.02,
}
_STORAGES = {"float32": "FloatStorage", "float64": "DoubleStorage"}


def tensors(model_class=bert.BertForSequenceClassification, seed=0, **config):
    """Returns random weights under Hugging Face's names."""
    params = bert.init_params(BertConfig(**CONFIG | config), model_class, seed)
    named = pretrained.tensors_from_params(params)
    rng = np.random.default_rng(seed)
    return {
        name: tensor + rng.normal(0, 0.1, tensor.shape).astype(tensor.dtype)
        for name, tensor in named.items()
    }


def write_model(directory, weights=None, *, as_torch=False, **config):
    """Writes the three files of an old checkpoint; its config has no model_type."""
    directory = Path(directory)
    directory.mkdir(parents=True, exist_ok=True)
    directory.joinpath("config.json").write_text(json.dumps(CONFIG | config))
    directory.joinpath("vocab.txt").write_text("\n".join(VOCABULARY) + "\n")
    weights = tensors(**config) if weights is None else weights
    if as_torch:
        write_torch_checkpoint(directory / "pytorch_model.bin", weights)
    else:
        save_file(weights, directory / "model.safetensors")
    return directory


class _Storage:
    def __init__(self, key, array):
        self.key, self.array = key, array


def write_torch_checkpoint(path, state, extra=None):
    """Writes what `torch.save` would, from arrays and other picklable objects."""
    torch, utils = types.ModuleType("torch"), types.ModuleType("torch._utils")

    def rebuild():
        raise AssertionError("only the name of this function is pickled")

    rebuild.__module__, rebuild.__qualname__ = "torch._utils", "_rebuild_tensor_v2"
    rebuild.__name__ = "_rebuild_tensor_v2"
    utils._rebuild_tensor_v2 = rebuild
    for name in _STORAGES.values():
        setattr(torch, name, type(name, (), {"__module__": "torch"}))
    storages = []

    class Tensor:
        def __init__(self, array):
            self.array = np.ascontiguousarray(array)

        def __reduce__(self):
            storage = _Storage(str(len(storages)), self.array)
            storages.append(storage)
            strides = [s // self.array.itemsize for s in self.array.strides]
            hooks = collections.OrderedDict()
            return rebuild, (storage, 0, self.array.shape, tuple(strides), False, hooks)

    class Pickler(pickle.Pickler):
        def persistent_id(self, obj):
            if not isinstance(obj, _Storage):
                return None
            kind = getattr(torch, _STORAGES[obj.array.dtype.name])
            return ("storage", kind, obj.key, "cpu", obj.array.size)

    entries = collections.OrderedDict(
        (k, Tensor(v) if isinstance(v, np.ndarray) else v) for k, v in state.items()
    )
    buffer = io.BytesIO()
    with mock.patch.dict(sys.modules, {"torch": torch, "torch._utils": utils}):
        Pickler(buffer, protocol=2).dump(entries)
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("archive/data.pkl", buffer.getvalue())
        archive.writestr("archive/byteorder", "little")
        for storage in storages:
            archive.writestr(f"archive/data/{storage.key}", storage.array.tobytes())
        archive.writestr("archive/version", "3\n")


def write_parquet(path, columns):
    """Writes columns, a mapping of lists, to a file."""
    path.parent.mkdir(parents=True, exist_ok=True)
    pyarrow.parquet.write_table(pa.table(columns), path)


def write_task(directory, name, num_train=320, num_eval=37):
    """Writes every split of a task; words of each text give its label away.

    Classes 0, 1, 2 have "bad", "good", "blue"; in a regression the label is the number
    of "good" in each text.
    """
    task, rng = tasks.TASKS[name], np.random.default_rng(0)
    giveaways = ["bad", "good", "blue"]
    others = [word for word in WORDS if word not in giveaways]
    sizes = {"train": num_train}
    sizes |= dict.fromkeys([*task.eval_splits, *task.test_splits], num_eval)
    for split, size in sizes.items():
        labels = rng.integers(
            0, 5 if task.is_regression else len(task.label_names), size
        )
        columns = {}
        for column in task.text_columns:
            texts = [list(rng.choice(others, rng.integers(5, 9))) for _ in labels]
            for text, label in zip(texts, labels, strict=True):
                if task.is_regression:
                    text[:label] = ["good"] * label
                else:
                    text[::2] = [giveaways[label]] * len(text[::2])
            columns[column] = [" ".join(text) for text in texts]
        if task.is_regression:
            labels = labels.astype(np.float32)
        elif split.startswith("test"):
            labels = np.full(size, -1)  # As on the Hub, where they are not public.
        columns |= {"label": labels.tolist(), "idx": list(range(size))}
        write_parquet(Path(directory, name, f"{split}-00000-of-00001.parquet"), columns)
    return Path(directory)


def questions(num, *, with_negative, seed=0):
    """Returns rows as in SQuAD; the answer, if any, is a "Good film" somewhere."""
    rng = np.random.default_rng(seed)
    others = [word for word in WORDS if word not in ("good", "film")]
    rows = []
    for i in range(num):
        words = list(rng.choice(others, rng.integers(4, 40)))
        answers = {"text": [], "answer_start": []}
        if not with_negative or rng.random() < 0.6:
            place = rng.integers(0, len(words))
            words.insert(place, "Good film")
            start = sum(len(word) + 1 for word in words[:place])
            answers = {"text": ["Good film"] * 2, "answer_start": [start] * 2}
        row = {"id": f"q{i:03}", "title": "red", "question": "yes no"}
        rows.append({**row, "context": " ".join(words), "answers": answers})
    return rows


def write_squad(directory, num_train=240, num_eval=37, *, with_negative=True):
    """Writes questions in the layout of the hub's `squad_v2`, or of `squad`."""
    folder = Path(directory, "squad_v2" if with_negative else "plain_text")
    for seed, (split, num) in enumerate(
        {"train": num_train, "validation": num_eval}.items()
    ):
        rows = questions(num, with_negative=with_negative, seed=seed)
        columns = {name: [row[name] for row in rows] for name in rows[0]}
        write_parquet(folder / f"{split}-00000-of-00001.parquet", columns)
    return Path(directory)


def as_squad_file(rows):
    """Returns these rows in the layout of SQuAD's JSON files, one article per row."""
    return {
        "version": "v2.0",
        "data": [
            {
                "title": row.get("title", ""),
                "paragraphs": [
                    {
                        "context": row["context"],
                        "qas": [
                            {
                                "id": row["id"],
                                "question": row["question"],
                                "is_impossible": row.get(
                                    "is_impossible", not row["answers"]["text"]
                                ),
                                "answers": [
                                    {"text": text, "answer_start": start}
                                    for text, start in zip(
                                        *row["answers"].values(), strict=True
                                    )
                                ],
                            }
                        ],
                    }
                ],
            }
            for row in rows
        ],
    }
