"""Helpers shared by the scripts: one-line errors and the JAX configuration."""

import ctypes
import io
import os
import platform
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

from bert_finetune.errors import Interrupted, UserError

_TRACEBACK = "FINETUNE_TRACEBACK"
_MAX_CACHE_BYTES = 2**30
# Parameters of glibc's malloc: M_TRIM_THRESHOLD and M_MMAP_THRESHOLD.
_KEEP_FREED = {-1: 2**31 - 1, -3: 2**30}


def run_script(main: Callable[[], Any], interrupted: str) -> None:
    """Runs a script; prints a user error as one line and sets the exit code.

    ``FINETUNE_TRACEBACK=1`` in the environment keeps the traceback of user errors;
    other errors always keep theirs. ``interrupted`` ends the message after Ctrl-C.
    """
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="backslashreplace")
    try:
        main()
    except UserError as error:
        if os.environ.get(_TRACEBACK, "0") not in ("", "0"):
            raise
        if isinstance(error, Interrupted):
            print(error, file=sys.stderr)
            sys.exit(error.exit_code)
        sys.exit(f"error: {error}")
    except KeyboardInterrupt:
        sys.exit(f"interrupted; {interrupted}")


def set_up_jax() -> None:
    """Caches compiled programs on disk, and on CPU keeps freed memory in the process.

    A resumed run, or one that differs only in its seed, then starts without compiling.
    An existing JAX configuration of the cache takes precedence.

    On CPU, XLA allocates its temporaries again at every step, and glibc returns large
    blocks to the system immediately: 44,000 page faults per step of BERT-tiny at batch
    32, length 128, a quarter of its time. Only the main thread keeps blocks of that
    size, so programs run there.
    """
    import jax

    config: Any = jax.config
    config.update("jax_cpu_enable_async_dispatch", False)
    if platform.libc_ver()[0] == "glibc":
        for parameter, value in _KEEP_FREED.items():
            ctypes.CDLL(None).mallopt(parameter, value)
    if config.jax_compilation_cache_dir or not config.jax_enable_compilation_cache:
        return
    home = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache")
    config.update("jax_compilation_cache_dir", str(home / "mfac_jax" / "xla"))
    # The least recently used programs are evicted first.
    config.update("jax_compilation_cache_max_size", _MAX_CACHE_BYTES)
