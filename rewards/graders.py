"""Which grader judges which task, and the grading of a batch of mixed tasks."""

import difflib
from collections.abc import Mapping, Sequence

from rewards import addition, countdown
from rewards.config import GradersSection
from rewards.grade import Checker, Grade, Status, graded, no_reward
from rewards.pool import GradingPool, WorkerStartError

EXACT_CHECKERS: Mapping[str, Checker] = {"addition": addition.check, "countdown": countdown.check}
"""Tasks graded in the caller's process: exact, bounded, microseconds."""
POOLED_CHECKERS: Mapping[str, str] = {"math": "rewards.math_answers:check"}
"""Tasks graded in worker processes, by "module:function"."""
TASKS = (*EXACT_CHECKERS, *POOLED_CHECKERS)
"""Every task that can be graded."""


def require_task(task: str) -> None:
    """Raise a ValueError, with the task probably meant, unless some grader judges the task."""
    if task not in TASKS:
        near = difflib.get_close_matches(task, TASKS, n=1)
        hint = f" (did you mean {near[0]!r}?)" if near else ""
        raise ValueError(f"task must be one of {', '.join(TASKS)}, got {task!r}{hint}")


class Graders:
    """The graders of all tasks, with the worker processes that some of them need."""

    def __init__(self, section: GradersSection) -> None:
        self._pools = {
            task: GradingPool(
                checker,
                num_workers=section.num_workers,
                deadline_s=section.deadline_s,
                memory_gib=section.memory_gib,
            )
            for task, checker in POOLED_CHECKERS.items()
        }

    def grade(self, items: Sequence[tuple[str, str, str]]) -> list[Grade]:
        """Return the grades of (completion text, task, reference) items, in their order.

        A right answer has reward 1.0, a wrong or unparsable one 0.0. Where a grader fails, the grade says so and is no
        verdict; no failure of a grader is raised.

        Raises:
            ValueError: if no grader judges an item's task; nothing is graded then.
        """
        for task in {task for _, task, _ in items}:
            require_task(task)
        grades: dict[int, Grade] = {
            row: graded(EXACT_CHECKERS[task], text, reference)
            for row, (text, task, reference) in enumerate(items)
            if task in EXACT_CHECKERS
        }
        for pooled_task, pool in self._pools.items():
            rows = [row for row, (_, task, _) in enumerate(items) if task == pooled_task]
            pooled = [(items[row][0], items[row][2]) for row in rows]
            grades |= dict(zip(rows, _grade_in(pool, pooled), strict=True))
        return [grades[row] for row in range(len(items))]

    def close(self) -> None:
        """End all worker processes."""
        for pool in self._pools.values():
            pool.close()


def _grade_in(pool: GradingPool, items: Sequence[tuple[str, str]]) -> list[Grade]:
    try:
        return pool.grade(items)
    except WorkerStartError as error:
        return [no_reward(Status.CRASHED, str(error))] * len(items)
