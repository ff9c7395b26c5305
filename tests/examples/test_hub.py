import socket

import huggingface_hub.constants
import pytest
import toy_bert
from bert_finetune import hub
from bert_finetune.errors import UserError


def test_a_directory_needs_no_hub(tmp_path):
    assert hub.resolve_model(str(toy_bert.write_model(tmp_path))) == tmp_path


@pytest.mark.parametrize("offline", [False, True])
def test_without_a_hub_the_error_names_the_remedy(monkeypatch, offline):
    """The Hub rejects connections, or HF_HUB_OFFLINE is set."""
    with socket.socket() as unused:
        unused.bind(("127.0.0.1", 0))
        endpoint = f"http://127.0.0.1:{unused.getsockname()[1]}"
    monkeypatch.setattr(huggingface_hub.constants, "ENDPOINT", endpoint)
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", offline)
    with pytest.raises(
        UserError, match=r"'prajjwal1/bert-tiny' .*could not provide it.*directory"
    ):
        hub.resolve_model("prajjwal1/bert-tiny")


def test_an_invalid_hub_id_is_rejected():
    with pytest.raises(UserError, match="'no such/thing/here' is not a local dir"):
        hub.resolve_model("no such/thing/here")
