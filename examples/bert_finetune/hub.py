"""Downloads models from the Hugging Face Hub."""

from pathlib import Path

from bert_finetune.errors import UserError, first_line

_MODEL_FILES = ["config.json", "vocab.txt", "tokenizer*", "special_tokens_map.json"]


def resolve_model(name_or_path: str) -> Path:
    """Returns the directory of a model; downloads a Hub id unless it is cached."""
    path = Path(name_or_path)
    if path.is_dir():
        return path
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HfHubHTTPError, HFValidationError

    def fetch(*patterns: str) -> Path:
        return Path(snapshot_download(name_or_path, allow_patterns=[*patterns]))

    try:
        # One file, or several with an index.
        directory = fetch(*_MODEL_FILES, "model*.safetensors*")
        if not any(directory.glob("model*.safetensors*")):
            directory = fetch(*_MODEL_FILES, "pytorch_model*.bin*")
    except (OSError, HfHubHTTPError, HFValidationError) as error:
        raise UserError(
            f"model {name_or_path!r} is not a local directory, and the Hugging Face "
            f"Hub could not provide it ({first_line(error)}). Give "
            "--model_name_or_path a directory that holds config.json, vocab.txt and "
            "model.safetensors or pytorch_model.bin."
        ) from error
    return directory
