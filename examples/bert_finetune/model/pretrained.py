"""Hugging Face model directories, read and written.

They are read as they are on the hub, and written so that `transformers` loads them.
Parameter names are Hugging Face's module names (`bert.py`). What differs is the
last part, and linear layers are stored transposed.
"""

import json
import re
import tempfile
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import safetensors
import safetensors.numpy
from flax import traverse_util
from transformers import BertConfig, BertTokenizer, PreTrainedTokenizerBase

from bert_finetune.errors import UserError
from bert_finetune.model import bert
from bert_finetune.model.torch_checkpoint import read_torch_checkpoint

# Names of TensorFlow, and of an encoder alone -> those of a model with a head.
_RENAMED = {
    r"LayerNorm\.gamma$": "LayerNorm.weight",
    r"LayerNorm\.beta$": "LayerNorm.bias",
    r"^(embeddings|encoder|pooler)\.": r"bert.\1.",
}
# What a fine-tuning model adds to the encoder, and may have to initialize.
_NEW_PARTS = {
    "bert.pooler.": "pooler",
    "classifier.": "classification head",
    "qa_outputs.": "question-answering head",
}
# What else a checkpoint may hold.
_IGNORED = {
    r"(cls|classifier|qa_outputs)\.": "a head of another task",
    r"bert\.pooler\.": "a pooler, which this model does not have",
    r".*\.position_ids$": "position_ids, which follow from the length",
}


class Pretrained(NamedTuple):
    """A model read from a directory."""

    params: bert.Params
    config: BertConfig  # With the labels of the task.
    tokenizer: PreTrainedTokenizerBase
    model_class: bert.ModelClass
    notes: list[str]  # A sentence for each thing ignored or initialized.


def load_pretrained(
    directory: Path,
    model_class: bert.ModelClass,
    *,
    label_names: list[str] | None = None,
    seed: int = 0,
) -> Pretrained:
    """Reads config, tokenizer and weights of a model.

    ``label_names`` replace the labels of the config, in the order of the logits. The
    seed initializes what the checkpoint lacks of the pooler and the head.
    """
    config = read_config(directory)
    if label_names is not None:
        config.id2label = dict(enumerate(label_names))
        config.label2id = {name: i for i, name in enumerate(label_names)}
    tokenizer = read_tokenizer(directory)
    if len(tokenizer) > config.vocab_size:
        raise UserError(
            f"the tokenizer in {directory} has {len(tokenizer)} tokens, more than the "
            f"vocab_size {config.vocab_size} of its config.json."
        )
    new_params = bert.init_params(config, model_class, seed)
    params, notes = params_from_tensors(read_tensors(directory), new_params, directory)
    return Pretrained(params, config, tokenizer, model_class, notes)


def read_config(directory: Path) -> BertConfig:
    """Reads `config.json`; one without ``model_type`` is taken for BERT's."""
    path = directory / "config.json"
    try:
        entries = json.loads(path.read_text())
    except FileNotFoundError as error:
        raise UserError(f"{directory} has no config.json.") from error
    except (OSError, ValueError) as error:
        raise UserError(f"{path} cannot be read: {error}") from error
    if not isinstance(entries, dict):
        raise UserError(f"{path} must hold a JSON object.")
    model_type = entries.pop("model_type", "bert")
    if model_type != "bert":
        what = f"model_type {model_type!r}"
        raise UserError(f"{path} has {what}; only 'bert' is supported.")
    try:
        config = BertConfig.from_dict(entries)
    except Exception as error:
        reason = str(error.__cause__ or error).strip()
        raise UserError(f"{path} cannot be used: {reason}") from error
    bert.check_config(config)
    return config


def read_tokenizer(directory: Path) -> PreTrainedTokenizerBase:
    """Reads the fast tokenizer from its own files or from `vocab.txt` alone."""
    names = ("vocab.txt", "tokenizer.json")
    if not any((directory / name).exists() for name in names):
        raise UserError(f"{directory} has no tokenizer: neither {' nor '.join(names)}.")
    try:
        return BertTokenizer.from_pretrained(directory)
    except Exception as error:
        what = f"the tokenizer in {directory} cannot be read"
        raise UserError(f"{what}: {error}") from error


def read_tensors(directory: Path) -> dict[str, np.ndarray]:
    """Reads the weights under the names of the file."""
    path, torch_path = directory / "model.safetensors", directory / "pytorch_model.bin"
    if path.exists():
        try:
            return safetensors.numpy.load_file(path)
        except (OSError, safetensors.SafetensorError) as error:
            raise UserError(f"{path} cannot be read: {error}") from error
    if torch_path.exists():
        return read_torch_checkpoint(torch_path)
    names = f"{path.name} nor {torch_path.name}"
    raise UserError(f"{directory} has no weights: neither {names}.")


def params_from_tensors(
    tensors: dict[str, np.ndarray], new_params: bert.Params, source: Any
) -> tuple[bert.Params, list[str]]:
    """Fills parameters from the tensors of a checkpoint.

    ``new_params`` give names and shapes, and stay where the checkpoint has no pooler or
    no head. Returns also a sentence for each thing ignored or initialized.
    """
    tensors = {_canonical_name(name): tensor for name, tensor in tensors.items()}
    flat_params: Any = traverse_util.flatten_dict(new_params, sep=".")
    problems, ignored, new = [], set(), set()
    for path, param in flat_params.items():
        name, is_kernel = _tensor_name(path), path.endswith(".kernel")
        shape = param.shape[::-1] if is_kernel else param.shape
        tensor = tensors.pop(name, None)
        if tensor is None:
            part = next((p for s, p in _NEW_PARTS.items() if name.startswith(s)), None)
            if part is None:
                problems.append(f"{name} is missing")
            else:
                new.add(f"The checkpoint has no {part}: initialized from the seed.")
        elif tensor.shape != shape:
            problems.append(f"{name} has shape {tensor.shape}, expected {shape}")
        else:
            tensor = tensor.T if is_kernel else tensor
            flat_params[path] = jnp.asarray(tensor, param.dtype)
    for name in tensors:
        what = next((w for p, w in _IGNORED.items() if re.match(p, name)), None)
        if what is None:
            problems.append(f"{name} is unknown")
        else:
            ignored.add(f"The checkpoint holds {what}: ignored.")
    if problems:
        shown = "; ".join(problems[:5])
        more = f"; and {len(problems) - 5} more" if len(problems) > 5 else ""
        what = f"the weights in {source} do not fit config.json"
        raise UserError(f"{what}: {shown}{more}.")
    params = traverse_util.unflatten_dict(flat_params, sep=".")
    return params, [*sorted(ignored), *sorted(new)]


def tensors_from_params(params: bert.Params) -> dict[str, np.ndarray]:
    """Returns the parameters under Hugging Face's names, in its layout."""
    flat_params: Any = traverse_util.flatten_dict(jax.device_get(params), sep=".")
    return {
        _tensor_name(path): np.ascontiguousarray(x.T if path.endswith(".kernel") else x)
        for path, x in flat_params.items()
    }


def save_pretrained(directory: Path, model: Pretrained) -> None:
    """Writes a directory that `transformers` loads, each file atomically."""
    model.config.architectures = [model.model_class.__name__]
    tensors = tensors_from_params(model.params)
    try:
        directory.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=directory, prefix=".saving-") as staging:
            # Not save_file: it makes the file unreadable for other users.
            weights = safetensors.numpy.save(tensors, metadata={"format": "pt"})
            Path(staging, "model.safetensors").write_bytes(weights)
            model.config.save_pretrained(staging)
            model.tokenizer.save_pretrained(staging)
            for file in sorted(Path(staging).iterdir()):
                file.replace(directory / file.name)
    except OSError as error:
        where = f"the model cannot be written to {directory}"
        raise UserError(f"{where}: {error}") from error


def _canonical_name(name: str) -> str:
    for pattern, new in _RENAMED.items():
        name = re.sub(pattern, new, name)
    return name


def _tensor_name(path: str) -> str:
    return re.sub(r"\.(kernel|embedding|scale)$", ".weight", path)
