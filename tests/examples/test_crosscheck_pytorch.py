"""Tests the cross-check with float64 NumPy in place of the authors' code."""

import contextlib

import crosscheck_pytorch
import numpy as np
import oracles
import pytest
from bert_finetune.errors import UserError

pytestmark = pytest.mark.usefixtures("quick_compilation")


def stand_in(monkeypatch, error):
    def directions(module, gradients, dtype):
        exact = oracles.newest_directions(gradients, 32, crosscheck_pytorch.DAMP)
        return np.stack([*exact]) * (1 + error)

    monkeypatch.setattr(crosscheck_pytorch, "NUM_GRADS", 32)
    monkeypatch.setattr(crosscheck_pytorch, "NUM_STEPS", 40)
    monkeypatch.setattr(crosscheck_pytorch, "their_directions", directions)
    monkeypatch.setattr(
        crosscheck_pytorch, "published_code", lambda _: contextlib.nullcontext()
    )


FLAGS = ["--reference", "unused"]


def test_agreement_is_reported(monkeypatch, capsys):
    stand_in(monkeypatch, 0.0)
    crosscheck_pytorch.main(FLAGS)
    rows = capsys.readouterr().out.splitlines()[2:]
    assert [row.split("|")[1].strip() for row in rows] == [
        "mfac_jax, float64",
        "mfac_jax, float32",
        "the authors' code, float32",
    ]
    largest = [float(row.split("|")[2]) for row in rows]
    assert largest[0] < 1e-9
    assert largest[1] < 1e-4


def test_disagreement_is_an_error(monkeypatch):
    stand_in(monkeypatch, 1e-6)
    with pytest.raises(UserError, match=r"float64 by 1\.0e-06"):
        crosscheck_pytorch.main(FLAGS)


def test_a_directory_without_the_code_is_named(tmp_path):
    with (
        pytest.raises(UserError, match=r"there is no .*optim\.py.*clone of"),
        crosscheck_pytorch.published_code(tmp_path),
    ):
        pass


def test_a_missing_torch_is_reported(tmp_path):
    (tmp_path / "optim.py").write_text("import a_torch_that_is_not_there\n")
    with (
        pytest.raises(UserError, match="pip install torch"),
        crosscheck_pytorch.published_code(tmp_path),
    ):
        pass
