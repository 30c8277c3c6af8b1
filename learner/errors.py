"""Errors of the learner; each is picklable, since it crosses processes."""


class LearnerError(RuntimeError):
    """The learner cannot go on; the first line says which rank failed and why."""


class NonFiniteLossError(ArithmeticError):
    """A loss or gradient was not finite: the step was not applied and the weights are as before.

    Args:
        message: one sentence.
        rollouts: (prompt_id, sample_index) of those whose loss was not finite; none if only the gradient was not.
    """

    def __init__(self, message: str, rollouts: tuple[tuple[str, int], ...] = ()) -> None:
        super().__init__(message, rollouts)
        self.message = message
        self.rollouts = rollouts

    def __str__(self) -> str:
        return self.message
