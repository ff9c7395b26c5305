"""The mistakes of a user: shown as one line, without a traceback."""


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
