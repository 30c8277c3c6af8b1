"""What is raised where an actor is lost, and how to find it beneath what Ray wraps around it."""

from ray.exceptions import ObjectLostError, OutOfMemoryError, RayActorError, RayTaskError

from actors.engines.errors import LostSequenceError

_LOST = (RayActorError, ObjectLostError, OutOfMemoryError, LostSequenceError)


def root_cause(error: BaseException) -> BaseException:
    """Follow task errors down to what was raised in the process where it happened."""
    while isinstance(error, RayTaskError) and isinstance(error.cause, BaseException) and error.cause is not error:
        error = error.cause
    return error


def is_loss(error: BaseException) -> bool:
    """Whether an actor died on the way, or was started anew and knows nothing of its sequences."""
    return isinstance(error, _LOST) or isinstance(root_cause(error), _LOST)
