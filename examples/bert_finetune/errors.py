"""Errors that a user can fix."""


class UserError(ValueError):
    """Reports a flag, a file or data that cannot be used, and what to do about it."""


def first_line(error: Exception) -> str:
    """Returns the first line of an error's message."""
    return str(error).strip().partition("\n")[0] or type(error).__name__


class Interrupted(UserError):
    """Reports that a run was asked to stop, and how to resume it."""

    def __init__(self, message: str, exit_code: int):
        super().__init__(message)
        self.exit_code = exit_code
