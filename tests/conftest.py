"""Settings of every test: implicit rank promotion raises, eight CPU devices."""

import os

# Parallel test processes that each start a BLAS thread per core wait for one another:
# a test of 9 seconds then takes minutes. OpenBLAS reads this when SciPy loads it.
os.environ.setdefault("OPENBLAS_NUM_THREADS", "1")

import jax

jax.config.update("jax_numpy_rank_promotion", "raise")
jax.config.update("jax_num_cpu_devices", 8)
