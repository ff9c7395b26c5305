"""Errors that a user can fix."""


class UserError(ValueError):
    """Reports a flag, a file or data that cannot be used, and what to do about it."""


class Interrupted(UserError):
    """Reports that a run was asked to stop, and how to resume it.

    Attributes:
      exit_code: of the process, as shells count it.
    """

    def __init__(self, message: str, exit_code: int):
        super().__init__(message)
        self.exit_code = exit_code
