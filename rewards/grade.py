"""What a grader says of one completion."""

import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from enum import StrEnum


class Status(StrEnum):
    """How a grade came about."""

    CORRECT = "correct"
    """The answer was read and it is right."""
    WRONG = "wrong"
    """The answer was read and it is not right."""
    UNPARSABLE = "unparsable"
    """No answer could be read from the completion; counts as wrong."""
    TIMED_OUT = "timed_out"
    """The grader passed its deadline and was killed: no verdict."""
    CRASHED = "crashed"
    """The grader itself failed: no verdict."""
    REFUSED = "refused"
    """The grader would not judge this reference: no verdict."""

    @property
    def is_verdict(self) -> bool:
        """Whether the completion was judged. If not, its rollout leaves the group."""
        return self in (Status.CORRECT, Status.WRONG, Status.UNPARSABLE)


@dataclass(frozen=True, slots=True, kw_only=True)
class Grade:
    """The verdict on one completion.

    Example:
        >>> Grade(reward=1.0, status=Status.CORRECT).status.is_verdict
        True
    """

    reward: float
    """In [0, 1]; 0.0 where there is no verdict, and not to be used there."""
    status: Status
    detail: str = ""
    """One short sentence for a person; never the whole completion."""
    seconds: float = 0.0
    """Wall-clock time of the grading, in seconds."""
    parts: Mapping[str, float] = field(default_factory=dict)
    """Named parts of the reward, where it has any."""


Checker = Callable[[str, str], Grade]
"""A pure grader: (completion text, reference) -> Grade. Deterministic; it never raises on any text."""

CORRECT = Grade(reward=1.0, status=Status.CORRECT)
"""The grade of a right answer."""


def no_reward(status: Status, detail: str, *, seconds: float = 0.0) -> Grade:
    """Return a grade of reward 0.0: a wrong or unreadable answer, or no verdict at all."""
    return Grade(reward=0.0, status=status, detail=detail, seconds=seconds)


def graded(checker: Checker, text: str, reference: str) -> Grade:
    """Return the checker's grade with its wall-clock time; CRASHED if the checker raised.

    This is the boundary where a failure of a grader becomes data, so that one bad rollout never ends a run.
    """
    started = time.perf_counter()
    try:
        grade = checker(text, reference)
    except Exception as error:  # noqa: BLE001 - whatever a grader raises must cost its own rollout only
        reason = str(error).encode("ascii", "backslashreplace").decode("ascii")[:200]
        grade = no_reward(Status.CRASHED, f"the grader raised {type(error).__name__}: {reason}")
    return replace(grade, seconds=time.perf_counter() - started)
