"""Settings of every test: implicit rank promotion raises, eight CPU devices."""

import os
import tempfile

from compiled import XLA_FLAGS

# Parallel test processes that each start a BLAS thread per core wait for one another:
# a test of 9 seconds then takes minutes. OpenBLAS reads this when SciPy loads it.
os.environ.setdefault("OPENBLAS_NUM_THREADS", "1")

# Half of the suite's time would be the compilation of programs that another test, or
# another process, has compiled before. One cache, of this run alone: what pytest starts
# inherits it, and it goes with the process that made it.
if "PYTEST_XDIST_WORKER" not in os.environ:
    _caches = tempfile.TemporaryDirectory(prefix="mfac_jax_tests_")
    os.environ["JAX_COMPILATION_CACHE_DIR"] = f"{_caches.name}/jax"
    os.environ["JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS"] = "0"
    os.environ["HF_DATASETS_CACHE"] = f"{_caches.name}/datasets"
    flags = [*os.environ.get("XLA_FLAGS", "").split(), *XLA_FLAGS]
    if flags:  # XLA takes what begins with no dash for the name of a file.
        os.environ["XLA_FLAGS"] = " ".join(flags)
# Programs for one device are other entries of the cache.
os.environ["JAX_NUM_CPU_DEVICES"] = "8"

import jax
import pytest

jax.config.update("jax_numpy_rank_promotion", "raise")


def pytest_runtest_setup(item):
    if item.get_closest_marker("eight_devices") and jax.device_count() < 8:
        pytest.skip(f"needs eight devices, JAX has {jax.device_count()}")


@pytest.fixture(scope="module")
def quick_compilation():
    """Compiles with few optimizations, which takes most of the time of short runs."""
    jax.config.update("jax_disable_most_optimizations", True)
    # Processes that a test starts inherit this.
    os.environ["JAX_DISABLE_MOST_OPTIMIZATIONS"] = "1"
    yield
    del os.environ["JAX_DISABLE_MOST_OPTIMIZATIONS"]
    jax.config.update("jax_disable_most_optimizations", False)
