"""What the scripts share: errors in one line, and compiled programs kept on disk."""

import os
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

from bert_finetune.errors import Interrupted, UserError

_TRACEBACK = "FINETUNE_TRACEBACK"
_MAX_CACHE_BYTES = 2**30


def run_script(main: Callable[[], Any], interrupted: str) -> None:
    """Runs a script; prints user errors as one line and exits with a code.

    With ``FINETUNE_TRACEBACK=1`` in the environment user errors keep their traceback,
    as all other errors always do.

    Args:
      main: the script.
      interrupted: what Ctrl-C means to it.
    """
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


def keep_compiled_programs() -> None:
    """Turns on JAX's compilation cache, unless JAX is configured otherwise.

    A run that is resumed, or differs only in its seed, then starts without compiling.
    """
    import jax

    config: Any = jax.config
    if config.jax_compilation_cache_dir or not config.jax_enable_compilation_cache:
        return
    home = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache")
    config.update("jax_compilation_cache_dir", str(home / "mfac_jax" / "xla"))
    # The least recently used programs are evicted first.
    config.update("jax_compilation_cache_max_size", _MAX_CACHE_BYTES)
