"""Reads and writes Hugging Face model directories.

Directories are read as they are on the Hub, and written so that `transformers` loads
them. Parameter paths are Hugging Face's names (`bert.py`), except that ``kernel``,
``embedding`` and ``scale`` are stored as ``weight``, and linear layers transposed.
"""

import json
import re
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import safetensors
import safetensors.numpy
from flax import traverse_util
from transformers import BertConfig, BertTokenizer, PreTrainedTokenizerBase

from bert_finetune.errors import UserError, first_line
from bert_finetune.model import bert
from bert_finetune.model.torch_checkpoint import read_torch_checkpoint

# Names in TensorFlow and in bare encoders -> names in a model with a head.
_RENAMED = {
    r"LayerNorm\.gamma$": "LayerNorm.weight",
    r"LayerNorm\.beta$": "LayerNorm.bias",
    r"^(embeddings|encoder|pooler)\.": r"bert.\1.",
}
# Parts that a checkpoint may lack; the seed initializes them.
_NEW_PARTS = {
    "bert.pooler.": "pooler",
    "classifier.": "classification head",
    "qa_outputs.": "question-answering head",
}
# Values of `tokenizer_class` for BERT's tokenizer.
_TOKENIZERS = (
    *("BertTokenizer", "BertTokenizerFast"),
    *("PreTrainedTokenizerFast", "TokenizersBackend"),
)
# Parts of a checkpoint that are ignored.
_IGNORED = {
    r"(cls|classifier|qa_outputs)\.": "a head of another task",
    r"bert\.pooler\.": "a pooler, which this model does not have",
    r".*\.position_ids$": "position_ids, which follow from the length",
}


class Pretrained(NamedTuple):
    """A model read from a directory."""

    params: bert.Params  # On the host, as read.
    config: BertConfig  # With the labels of the task.
    tokenizer: PreTrainedTokenizerBase
    model_class: bert.ModelClass
    notes: list[str]  # A sentence per ignored or initialized part.


def load_pretrained(
    directory: Path,
    model_class: bert.ModelClass,
    *,
    label_names: list[str] | None = None,
    seed: int = 0,
    task: str = "config.json",
    ignore_mismatched_sizes: bool = False,
) -> Pretrained:
    """Reads config, tokenizer and weights of a model.

    ``label_names`` replaces the labels of the config, in the order of the logits. The
    seed initializes a missing pooler or head and, with ``ignore_mismatched_sizes``,
    tensors of another shape. ``task`` is for messages.
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
    tensors, notes = read_tensors(directory), []
    if all(name.startswith("module.") for name in tensors):  # torch's DataParallel.
        tensors = {k.removeprefix("module."): v for k, v in tensors.items()}
        notes.append("The prefix module. of the names in the checkpoint is removed.")
    params, more_notes = params_from_tensors(
        tensors,
        bert.init_params(config, model_class, seed),
        directory,
        task=task,
        ignore_mismatched_sizes=ignore_mismatched_sizes,
    )
    params = jax.device_get(params)
    return Pretrained(params, config, tokenizer, model_class, notes + more_notes)


def read_config(directory: Path) -> BertConfig:
    """Reads `config.json`; without ``model_type`` it is taken as BERT."""
    path = directory / "config.json"
    try:
        entries = json.loads(path.read_text())
    except FileNotFoundError as error:
        raise UserError(f"{directory} has no config.json.") from error
    except (OSError, ValueError) as error:
        raise UserError(f"{path} cannot be read: {error}") from error
    if not isinstance(entries, dict):
        raise UserError(f"{path} must contain a JSON object.")
    model_type = entries.pop("model_type", "bert")
    if model_type != "bert":
        what = f"model_type {model_type!r}"
        raise UserError(f"{path} has {what}; only 'bert' is supported.")
    try:
        config = BertConfig.from_dict(entries)
    except Exception as error:
        reason = str(error.__cause__ or error).strip()
        raise UserError(f"{path} is not a valid BERT config: {reason}") from error
    bert.check_config(config, path)
    return config


def check_pairs(config: BertConfig, source: Any) -> None:
    """Raises a UserError if the model cannot tell the texts of a pair apart."""
    if config.type_vocab_size < 2:
        raise UserError(
            f"the model in {source} takes single texts, not pairs: its config.json has "
            f"type_vocab_size {config.type_vocab_size}."
        )


def read_tokenizer(directory: Path) -> PreTrainedTokenizerBase:
    """Reads the fast tokenizer from its files, or from `vocab.txt` alone."""
    names = ("vocab.txt", "tokenizer.json")
    if not any((directory / name).exists() for name in names):
        raise UserError(f"{directory} has no tokenizer: neither {' nor '.join(names)}.")
    what = f"the tokenizer in {directory}"
    try:
        config, model = (
            json.loads(path.read_text("utf-8")) if path.exists() else {}
            for path in map(directory.joinpath, ("tokenizer_config.json", names[1]))
        )
        name = config.get("tokenizer_class") or "BertTokenizer"
        if name not in _TOKENIZERS:
            raise UserError(f"{what} is {name}; only BERT's is supported.")
        kind = model.get("model", {}).get("type") or "WordPiece"
        if kind != "WordPiece":
            raise UserError(f"{what} is a {kind} model; only WordPiece is supported.")
        tokenizer = BertTokenizer.from_pretrained(directory)
    except UserError:
        raise
    except Exception as error:
        raise UserError(f"{what} cannot be read: {first_line(error)}") from error
    _check_special_tokens(tokenizer, directory)
    return tokenizer


def _check_special_tokens(tokenizer: Any, directory: Path) -> None:
    """Rejects a vocabulary that lacks them: adding them would shift the other ids."""
    vocabulary = directory / "vocab.txt"
    if not vocabulary.exists() or (directory / "tokenizer.json").exists():
        return
    tokens = set(vocabulary.read_text("utf-8").splitlines())
    needed = (tokenizer.unk_token, tokenizer.cls_token, tokenizer.sep_token)
    missing = [token for token in (*needed, tokenizer.pad_token) if token not in tokens]
    if missing:
        what = f"{vocabulary} has no token {missing[0]}"
        raise UserError(f"{what}: use the vocab.txt of the checkpoint.")


def read_tensors(directory: Path) -> dict[str, np.ndarray]:
    """Reads the weights, under the names in the file."""
    for name, read in _WEIGHTS.items():
        path, index = directory / name, directory / f"{name}.index.json"
        if path.exists():
            return read(path)
        if index.exists():
            return _read_parts(index, read)
    names = " nor ".join(_WEIGHTS)
    raise UserError(f"{directory} has no weights: neither {names}.")


def _read_safetensors(path: Path) -> dict[str, np.ndarray]:
    try:
        return safetensors.numpy.load_file(path)
    except Exception as error:  # Also raised for dtypes that NumPy lacks.
        what = f"{path} cannot be read: {first_line(error)}"
        raise UserError(f"{what}. Download it again.") from error


def _read_parts(
    index: Path, read: Callable[[Path], dict[str, np.ndarray]]
) -> dict[str, np.ndarray]:
    """Reads each tensor from the file that the index names."""
    try:
        files = {
            k: str(v) for k, v in json.loads(index.read_text())["weight_map"].items()
        }
        parts = {file: read(index.parent / file) for file in sorted({*files.values()})}
        return {name: parts[file][name] for name, file in files.items()}
    except UserError:
        raise
    except (OSError, ValueError, LookupError, TypeError, AttributeError) as error:
        what = f"{index} cannot be used: {error!r}"
        raise UserError(f"{what}. Download it again.") from error


_WEIGHTS: dict[str, Callable[[Path], dict[str, np.ndarray]]] = {
    "model.safetensors": _read_safetensors,
    "pytorch_model.bin": read_torch_checkpoint,
}


def params_from_tensors(
    tensors: dict[str, np.ndarray],
    new_params: bert.Params,
    source: Any,
    *,
    task: str = "config.json",
    ignore_mismatched_sizes: bool = False,
) -> tuple[bert.Params, list[str]]:
    """Fills parameters from the tensors of a checkpoint.

    ``new_params`` gives names and shapes, and the values of a missing pooler or head.
    Also returns a sentence per ignored or initialized part.
    """
    tensors = {_canonical_name(name): tensor for name, tensor in tensors.items()}
    flat_params: Any = traverse_util.flatten_dict(new_params, sep=".")
    problems, mismatched, ignored, new = [], [], set(), set()
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
        elif not jnp.issubdtype(tensor.dtype, jnp.floating):
            problems.append(f"{name} has dtype {tensor.dtype}, expected a float dtype")
        elif tensor.shape != shape:
            mismatched.append(f"{name} has shape {tensor.shape}, expected {shape}")
        else:
            tensor = tensor.T if is_kernel else tensor
            flat_params[path] = jnp.asarray(tensor, param.dtype)
    for name in tensors:
        what = next((w for p, w in _IGNORED.items() if re.match(p, name)), None)
        if what is None:
            problems.append(f"{name} is unknown")
        else:
            ignored.add(f"The checkpoint holds {what}: ignored.")
    if mismatched and ignore_mismatched_sizes:
        new |= {f"{what}: initialized from the seed." for what in mismatched}
    else:
        problems += mismatched
    if problems:
        shown = "; ".join(problems[:5])
        more = f"; and {len(problems) - 5} more" if len(problems) > 5 else ""
        what = f"the weights in {source} do not fit {task}"
        hint = " --ignore_mismatched_sizes initializes tensors of another shape."
        raise UserError(f"{what}: {shown}{more}.{hint if mismatched else ''}")
    params = traverse_util.unflatten_dict(flat_params, sep=".")
    return params, [*sorted(ignored), *sorted(new)]


def tensors_from_params(params: bert.Params) -> dict[str, np.ndarray]:
    """Returns the parameters in Hugging Face's layout, under its names."""
    flat_params: Any = traverse_util.flatten_dict(jax.device_get(params), sep=".")
    return {
        _tensor_name(path): np.ascontiguousarray(x.T if path.endswith(".kernel") else x)
        for path, x in flat_params.items()
    }


def save_pretrained(directory: Path, model: Pretrained) -> None:
    """Writes a directory that `transformers` loads, each file atomically."""
    dtype = jax.tree.leaves(model.params)[0].dtype
    model.config.update(
        {"architectures": [model.model_class.__name__], "dtype": dtype.name}
    )
    tensors = tensors_from_params(model.params)
    try:
        directory.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=directory, prefix=".saving-") as staging:
            # save_file would make the file unreadable for other users.
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
