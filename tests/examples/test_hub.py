import socket

import huggingface_hub.constants
import pytest
import toy_bert
from bert_finetune import hub
from bert_finetune.errors import UserError


@pytest.fixture
def no_hub(monkeypatch):
    """A hub whose address refuses connections."""
    with socket.socket() as unused:
        unused.bind(("127.0.0.1", 0))
        port = unused.getsockname()[1]
    monkeypatch.setenv("HF_ENDPOINT", f"http://127.0.0.1:{port}")
    monkeypatch.setenv("HF_HUB_OFFLINE", "0")
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", False)
    hub.hub_is_reachable.cache_clear()
    yield
    hub.hub_is_reachable.cache_clear()


def test_a_directory_needs_no_hub(tmp_path, monkeypatch):
    def fail():
        raise AssertionError("asked for the hub")

    monkeypatch.setattr(hub, "hub_is_reachable", fail)
    assert hub.resolve_model(str(toy_bert.write_model(tmp_path))) == tmp_path


@pytest.mark.usefixtures("no_hub")
def test_without_a_hub_the_error_names_the_way_out():
    with pytest.raises(
        UserError, match=r"'prajjwal1/bert-tiny' .*cannot be reached.*directory"
    ):
        hub.resolve_model("prajjwal1/bert-tiny")
    assert huggingface_hub.constants.HF_HUB_OFFLINE


@pytest.mark.usefixtures("no_hub")
def test_a_hub_that_was_declined_is_not_asked(monkeypatch):
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    monkeypatch.setattr(hub.urllib.request, "urlopen", None)
    assert not hub.hub_is_reachable()


def test_an_answer_of_any_kind_is_an_answer(monkeypatch):
    def refuse(request, timeout):
        raise hub.urllib.error.HTTPError(request.full_url, 405, "no HEAD", {}, None)

    monkeypatch.setenv("HF_HUB_OFFLINE", "0")
    monkeypatch.setattr(hub.urllib.request, "urlopen", refuse)
    hub.hub_is_reachable.cache_clear()
    assert hub.hub_is_reachable()
    hub.hub_is_reachable.cache_clear()
