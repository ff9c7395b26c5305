"""Settings of all tests: eight CPU devices, implicit rank promotion raises."""

import os
import tempfile

from compiled import XLA_FLAGS

# With a BLAS thread per core in every test process, the processes wait for each other:
# a test of 9 seconds takes minutes. OpenBLAS reads this when SciPy loads it.
os.environ.setdefault("OPENBLAS_NUM_THREADS", "1")

# Half of the suite's time would go to recompiling programs that another test or process
# has compiled. All processes of a run share one cache, which the first one deletes.
if "PYTEST_XDIST_WORKER" not in os.environ:
    _caches = tempfile.TemporaryDirectory(prefix="mfac_jax_tests_")
    os.environ["JAX_COMPILATION_CACHE_DIR"] = f"{_caches.name}/jax"
    os.environ["JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS"] = "0"
    os.environ["HF_DATASETS_CACHE"] = f"{_caches.name}/datasets"
    flags = [*os.environ.get("XLA_FLAGS", "").split(), *XLA_FLAGS]
    if flags:  # XLA reads a value without a leading dash as a file name.
        os.environ["XLA_FLAGS"] = " ".join(flags)
# Also for subprocesses: programs for one device would be other cache entries.
os.environ["JAX_NUM_CPU_DEVICES"] = "8"

import jax
import pytest

jax.config.update("jax_numpy_rank_promotion", "raise")


def pytest_runtest_setup(item):
    if item.get_closest_marker("eight_devices") and jax.device_count() < 8:
        pytest.skip(f"needs eight devices, JAX has {jax.device_count()}")


@pytest.fixture(scope="module")
def quick_compilation():
    """Disables most of XLA's optimizations: compilation dominates short runs."""
    jax.config.update("jax_disable_most_optimizations", True)
    # Subprocesses inherit this.
    os.environ["JAX_DISABLE_MOST_OPTIMIZATIONS"] = "1"
    yield
    del os.environ["JAX_DISABLE_MOST_OPTIMIZATIONS"]
    jax.config.update("jax_disable_most_optimizations", False)
