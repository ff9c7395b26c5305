"""The mistakes of a user: shown as one line, without a traceback."""

import contextlib
import sys
from collections.abc import Callable, Iterator
from typing import Any


class UserError(ValueError):
    """A flag, a file or data that cannot be used, and what to do about it."""


class Interrupted(UserError):
    """A run was asked to stop; the message says how to continue.

    Attributes:
      exit_code: of the process, as shells count it.
    """

    def __init__(self, message: str, exit_code: int):
        super().__init__(message)
        self.exit_code = exit_code


@contextlib.contextmanager
def explained() -> Iterator[None]:
    """Says what the machine lacks, instead of where it was missed.

    Raises:
      UserError: if a device has not enough memory, or a file cannot be used.
    """
    import jax

    try:
        yield
    except jax.errors.JaxRuntimeError as error:
        if "RESOURCE_EXHAUSTED" not in str(error):
            raise
        raise UserError(
            "the device has not enough memory: lower --per_device_train_batch_size, "
            "and raise --gradient_accumulation_steps for the same steps; for MFAC also "
            "num_grads in --optim_args."
        ) from error
    except OSError as error:
        raise UserError(f"{error.strerror or error}: {error.filename}.") from error


def run_script(main: Callable[[], Any], interrupted: str) -> None:
    """Runs a script, and exits with a line and a code where it cannot go on.

    Args:
      main: the script.
      interrupted: what Ctrl-C means to it.
    """
    try:
        main()
    except Interrupted as error:
        print(error, file=sys.stderr)
        sys.exit(error.exit_code)
    except UserError as error:
        sys.exit(f"error: {error}")
    except KeyboardInterrupt:
        sys.exit(f"interrupted; {interrupted}")
