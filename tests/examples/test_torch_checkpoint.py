import os
import pickle
import zipfile

import numpy as np
import pytest
import toy_bert
from bert_finetune.errors import UserError
from bert_finetune.model.torch_checkpoint import read_torch_checkpoint


@pytest.fixture
def path(tmp_path):
    return tmp_path / "pytorch_model.bin"


def test_reads_what_was_written(path):
    rng = np.random.default_rng(0)
    state = {
        "matrix": rng.standard_normal((3, 4)).astype(np.float32),
        "vector": rng.standard_normal(5),
        "scalar": np.array(2.5, np.float32),
        "empty": np.zeros((0, 7), np.float32),
    }
    toy_bert.write_torch_checkpoint(path, state)
    read = read_torch_checkpoint(path)
    assert list(read) == list(state)
    for name, array in state.items():
        assert read[name].dtype == array.dtype
        np.testing.assert_array_equal(read[name], array)


class Command:
    def __reduce__(self):
        return os.system, ("touch executed",)


def test_nothing_but_tensors_is_unpickled(path, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    toy_bert.write_torch_checkpoint(path, {"weight": np.ones(2), "evil": Command()})
    with pytest.raises(UserError, match=r"refers to (posix|nt)\.system.*nothing was"):
        read_torch_checkpoint(path)
    assert not (tmp_path / "executed").exists()


def rewrite(path, change):
    """Passes the entries of the archive, a dict of bytes, through ``change``."""
    with zipfile.ZipFile(path) as archive:
        entries = {name: archive.read(name) for name in archive.namelist()}
    change(entries)
    with zipfile.ZipFile(path, "w") as archive:
        for name, content in entries.items():
            archive.writestr(name, content)


def test_reads_a_tensor_without_dimensions(path):
    toy_bert.write_torch_checkpoint(path, {"scalar": np.array([2.5])})

    def drop_the_dimension(entries):
        one, none = b"K\x01\x85", b")"  # The tuples (1,) and () of shape and strides.
        entries["archive/data.pkl"] = entries["archive/data.pkl"].replace(one, none)

    rewrite(path, drop_the_dimension)
    scalar = read_torch_checkpoint(path)["scalar"]
    assert (scalar.shape, scalar) == ((), 2.5)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda e: e.pop("archive/data.pkl"), "not written by torch.save"),
        (lambda e: e.pop("archive/data/0"), "damaged"),
        (lambda e: e.update({"archive/data/0": b"\0" * 8}), "weight reaches outside"),
        (lambda e: e.update({"archive/data.pkl": b"\x80\x02K"}), "damaged"),
        (lambda e: e.update({"archive/byteorder": b"big"}), "big-endian"),
        (lambda e: e.update({"archive/data.pkl": pickle.dumps([1])}), "state dict"),
        (lambda e: e.update({"archive/data.pkl": pickle.dumps({"epoch": 3})}), "epoch"),
    ],
)
def test_a_damaged_archive_is_rejected(path, change, message):
    toy_bert.write_torch_checkpoint(path, {"weight": np.ones((2, 3))})
    rewrite(path, change)
    with pytest.raises(UserError, match=message) as caught:
        read_torch_checkpoint(path)
    assert str(path) in str(caught.value)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (pickle.dumps({"weight": 1.0}), r"legacy format .*torch\.save"),
        (b"<html>", "damaged or not a torch checkpoint"),
        (b"", "damaged or not a torch checkpoint"),
    ],
)
def test_another_format_is_rejected(path, content, message):
    path.write_bytes(content)
    with pytest.raises(UserError, match=message):
        read_torch_checkpoint(path)


def test_a_truncated_download_is_rejected(path):
    toy_bert.write_torch_checkpoint(path, toy_bert.tensors())
    path.write_bytes(path.read_bytes()[:-100])
    with pytest.raises(UserError, match="damaged"):
        read_torch_checkpoint(path)


def test_reads_what_torch_saves(path):
    torch = pytest.importorskip("torch")
    table = torch.arange(24, dtype=torch.float32).reshape(4, 6)
    state = {
        "parameter": torch.nn.Parameter(torch.randn(3, 2)),
        "transposed": table.T,
        "part": table[1:3, ::2],
        "tied": table,
        "half": torch.tensor([1.0, 1e-3], dtype=torch.float16),
        "bfloat16": torch.tensor([1.0, 3e38], dtype=torch.bfloat16),
        "ids": torch.arange(5)[None],
        "scalar": torch.tensor(1.5, dtype=torch.float64),
    }
    torch.save(state, path)
    read = read_torch_checkpoint(path)
    assert list(read) == list(state)
    for name, tensor in state.items():
        np.testing.assert_array_equal(
            read[name].astype(np.float64), tensor.detach().double().numpy()
        )
    torch.save(state, path, _use_new_zipfile_serialization=False)
    with pytest.raises(UserError, match="legacy format"):
        read_torch_checkpoint(path)
    torch.save(torch.nn.Linear(2, 2), path)
    with pytest.raises(UserError, match="refers to torch"):
        read_torch_checkpoint(path)
