"""The mistakes of a user: shown as one line, without a traceback."""


class UserError(ValueError):
    """A flag, a file or data that cannot be used, and what to do about it."""
