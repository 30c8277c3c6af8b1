"""From an exception that crossed processes to the sentence that names its cause."""

from ray.exceptions import ObjectStoreFullError, OutOfDiskError, RayActorError

from actors.failures import root_cause
from learner.errors import LearnerError, NonFiniteLossError
from orchestrator.errors import RunError, UserError


def sentence(error: BaseException) -> str:
    """Return one line: the kind of failure and its cause."""
    cause = root_cause(error)
    text = str(cause).strip()
    first_line = text.splitlines()[0] if text else "no message"
    if isinstance(cause, UserError | RunError):
        return text
    if isinstance(cause, LearnerError | NonFiniteLossError):
        return first_line
    if isinstance(cause, ObjectStoreFullError | OutOfDiskError):
        return f"the object store is full: {first_line}; raise cluster.object_store_gib or sample fewer rollouts a step"
    if isinstance(cause, RayActorError):
        return f"an actor died and could not be replaced: {first_line}"
    return f"{type(cause).__name__}: {first_line}"
