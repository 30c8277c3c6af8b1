"""Errors of engines."""


class EngineError(RuntimeError):
    """An engine cannot start or cannot go on; the message says what was required and what came."""
