"""The cross-check, with float64 NumPy in the place of the authors' code."""

import contextlib

import crosscheck_pytorch
import numpy as np
import oracles
import pytest
from bert_finetune.errors import UserError


def stand_in(monkeypatch, error):
    def directions(module, gradients, num_grads, damp, dtype):
        exact = np.stack([*oracles.newest_directions(gradients, num_grads, damp)])
        return exact * (1 + error)

    monkeypatch.setattr(crosscheck_pytorch, "their_directions", directions)
    monkeypatch.setattr(
        crosscheck_pytorch, "published_code", lambda _: contextlib.nullcontext()
    )


FLAGS = ["--reference", "unused", "--num_grads", "32", "--num_steps", "40"]


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
    with pytest.raises(UserError, match=r"float64 differ by 1\.0e-06"):
        crosscheck_pytorch.main(FLAGS)


def test_what_the_published_code_cannot_do_is_refused():
    with pytest.raises(UserError, match=r"multiple of 32 and at most 1024.*got 33"):
        crosscheck_pytorch.main(["--reference", "unused", "--num_grads", "33"])


def test_a_directory_without_the_code_is_named(tmp_path):
    pytest.importorskip("torch")
    with (
        pytest.raises(UserError, match=r"there is no .*optim\.py.*clone of"),
        crosscheck_pytorch.published_code(tmp_path),
    ):
        pass
