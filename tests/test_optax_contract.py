"""Runs Optax's contract suite for contributed optimizers on ours.

The suite is part of the Optax wheel and expands its list of optimizers on import. This
module imports it with our entry in place of the list.
"""

import importlib.util
import types
from unittest import mock

import optax
import pytest
from absl.testing import parameterized

import mfac_jax

pytestmark = pytest.mark.usefixtures("quick_compilation")

# With a small damping a step is bounded by about lr · m / |g|, and near an optimum
# stability wants lr / damp < 2 / L: hence the large damping of these toy problems.
MFAC = {"learning_rate": 0.1, "num_grads": 8, "damp": 100.0}
ADAM_MFAC = {"learning_rate": 0.1}
# RowSparse drops values of matrices, TopK of all leaves.
OPTIMIZERS = {
    "Dense": ("mfac", MFAC | {"window": mfac_jax.DenseWindow()}),
    "Int8": ("mfac", MFAC | {"window": mfac_jax.Int8Window()}),
    "RowSparse": ("mfac", MFAC | {"window": mfac_jax.RowSparseWindow(1)}),
    "TopK": ("mfac", MFAC | {"window": mfac_jax.TopKWindow(0.5)}),
    "AdamMFAC": ("adam_mfac", ADAM_MFAC),
}


def load_contract_suite(name, hyperparams):
    entry = {
        "opt_name": name,
        "opt_kwargs": hyperparams,
        "wrapper_name": None,
        "wrapper_kwargs": None,
    }
    spec = importlib.util.find_spec("optax.contrib._common_test")
    assert spec is not None
    assert spec.origin is not None, "this version of Optax ships no contract suite"
    product = parameterized.product

    def product_with_our_entry(*optimizers, **axes):
        return product(*[(entry,) for _ in optimizers], **axes)

    spec = importlib.util.spec_from_file_location("contract_suite", spec.origin)
    assert spec is not None
    assert spec.loader is not None
    suite = importlib.util.module_from_spec(spec)
    with mock.patch.object(parameterized, "product", product_with_our_entry):
        spec.loader.exec_module(suite)
    suite._get_opt_factory = lambda name: getattr(mfac_jax, name)
    suite._inject = types.SimpleNamespace(
        inject_hyperparams=lambda factory, static_args: optax.inject_hyperparams(
            factory, static_args=("num_grads", "mask", "window", *static_args)
        )
    )
    return suite.ContribTest


for _kind, _optimizer in OPTIMIZERS.items():
    globals()[f"Test{_kind}"] = load_contract_suite(*_optimizer)


@pytest.mark.parametrize("kind", OPTIMIZERS)
def test_the_suite_has_sixteen_tests(kind):
    suite = globals()[f"Test{kind}"]
    assert sum(name.startswith("test_") for name in dir(suite)) == 16
