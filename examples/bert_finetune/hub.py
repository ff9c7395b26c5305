"""Names on the Hugging Face hub, and what happens where it cannot be reached."""

import functools
import os
import urllib.error
import urllib.request
from pathlib import Path

from bert_finetune.errors import UserError

_TIMEOUT_SECONDS = 5
_MODEL_FILES = ["config.json", "vocab.txt", "tokenizer*", "special_tokens_map.json"]


@functools.cache
def hub_is_reachable() -> bool:
    """Asks the hub once; without an answer the Hugging Face libraries go offline.

    Offline they use what is cached and fail at once on what is not, instead of
    retrying for minutes.
    """
    endpoint = os.environ.get("HF_ENDPOINT", "https://huggingface.co")
    reachable = os.environ.get("HF_HUB_OFFLINE", "0").upper() in (
        "",
        "0",
        "FALSE",
        "NO",
    )
    if reachable:
        try:
            request = urllib.request.Request(endpoint, method="HEAD")
            urllib.request.urlopen(request, timeout=_TIMEOUT_SECONDS).close()
        except urllib.error.HTTPError:
            pass  # An answer of any kind is an answer.
        except OSError:
            reachable = False
    if not reachable:
        os.environ["HF_HUB_OFFLINE"] = "1"
        import huggingface_hub.constants

        # It reads the environment once, when it is imported.
        huggingface_hub.constants.HF_HUB_OFFLINE = True
    return reachable


def resolve_model(name_or_path: str) -> Path:
    """Returns the directory of a model: a local one, or a hub id fetched or cached.

    Raises:
      UserError: if it is neither a directory nor to be had from the hub.
    """
    path = Path(name_or_path)
    if path.is_dir():
        return path
    reachable = hub_is_reachable()
    from huggingface_hub import snapshot_download

    def fetch(*patterns: str) -> Path:
        return Path(snapshot_download(name_or_path, allow_patterns=[*patterns]))

    try:
        directory = fetch(*_MODEL_FILES, "model.safetensors")
        if not (directory / "model.safetensors").exists():
            directory = fetch(*_MODEL_FILES, "pytorch_model.bin")
    except Exception as error:
        raise UserError(
            f"model {name_or_path!r} is not a directory here, and "
            + hub_failure(reachable, error)
            + " Give --model_name_or_path a directory that holds config.json, "
            "vocab.txt and model.safetensors or pytorch_model.bin."
        ) from None
    return directory


def hub_failure(reachable: bool, error: Exception) -> str:
    """Returns a sentence on why something could not be had from the hub."""
    if not reachable:
        return "the Hugging Face hub cannot be reached, nor is a cached copy complete."
    return f"the Hugging Face hub refused it ({str(error).strip().splitlines()[0]})."
