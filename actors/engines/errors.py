"""Errors of engines."""


class EngineError(RuntimeError):
    """An engine cannot start or cannot go on; the message says what was required and what came."""


class LostSequenceError(EngineError):
    """A sequence is not open in this engine: it died and was started again in between. The rollout is to be redone."""
