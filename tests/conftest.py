"""Settings of every test: implicit rank promotion raises, eight CPU devices."""

import jax

jax.config.update("jax_numpy_rank_promotion", "raise")
jax.config.update("jax_num_cpu_devices", 8)
