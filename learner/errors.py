"""Errors of the learner; each is picklable, since it crosses processes."""


class LearnerError(RuntimeError):
    """The learner cannot go on; the first line says which rank failed and why."""


class NonFiniteLossError(ArithmeticError):
    """A loss or gradient was not finite: the step was not applied and the weights are as before."""
