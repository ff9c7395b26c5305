"""Compiled programs, kept on disk for the runs to come."""

import os
from pathlib import Path
from typing import Any

import jax

_MAX_BYTES = 2**30


def enable() -> None:
    """Keeps what XLA compiles, unless JAX has been told where, or not to.

    A run that is resumed, or differs in its seed alone, then starts without compiling.
    """
    config: Any = jax.config
    if config.jax_compilation_cache_dir or not config.jax_enable_compilation_cache:
        return
    home = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache")
    config.update("jax_compilation_cache_dir", str(home / "mfac_jax" / "xla"))
    # The programs used longest ago go first.
    config.update("jax_compilation_cache_max_size", _MAX_BYTES)
