"""Errors that end a command with one sentence instead of a traceback."""


class UserError(ValueError):
    """A mistake the user can mend; the message says what was required, what came and where to change it."""


class RunError(RuntimeError):
    """The run cannot go on; the message names the cause, and what was computed so far is kept."""
