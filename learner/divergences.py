"""How far a student's law s is from a teacher's law t over the same outcomes, with the gradient in closed form.

With s = softmax(z), a divergence D whose derivative with respect to s_x is f_x (up to a constant, which the softmax
removes) has the gradient

    dD/dz_x = s_x (f_x - E_s f),

so one row of f is all that is needed. Arithmetic is in place, because over a whole vocabulary passes through memory are
most of the cost after the matrix products.
"""

from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor


class Divergence(Protocol):
    """A divergence between two laws."""

    def compare_(self, student: Tensor, probs: Tensor, teacher: Tensor) -> Tensor:
        """Return [n] nats, at least 0 where both laws sum to 1.

        Args:
            student: [n, V] log-probs, all finite; overwritten.
            probs: [n, V] its probabilities; exactly 0 where an outcome is forbidden.
            teacher: [n, V] log-probs, all finite; overwritten with the gradient to the student's scores, [n, V], which
                sums to 0 in each row.
        """


@dataclass(frozen=True, slots=True)
class ReverseKL:
    """KL(s || t) = sum s (log s - log t), of MiniLLM (arXiv 2306.08543): f = log s - log t."""

    def compare_(self, student: Tensor, probs: Tensor, teacher: Tensor) -> Tensor:
        """Return the KL; see `Divergence`."""
        log_ratio = torch.sub(student, teacher, out=teacher)
        value: Tensor = torch.linalg.vecdot(probs, log_ratio)
        log_ratio.sub_(value[:, None]).mul_(probs)
        return value


@dataclass(frozen=True, slots=True)
class ForwardKL:
    """KL(t || s) = sum t (log t - log s), the usual distillation loss: f = -t / s, so the gradient is s - t.

    Infinite where the teacher allows what the student forbids, it is then as large as the student's lowest finite
    log-prob makes it; the gradient does not depend on that.
    """

    def compare_(self, student: Tensor, probs: Tensor, teacher: Tensor) -> Tensor:
        """Return the KL; see `Divergence`."""
        teacher_probs = teacher.exp()
        value: Tensor = torch.linalg.vecdot(teacher_probs, torch.sub(teacher, student, out=student))
        torch.sub(probs, teacher_probs, out=teacher)
        return value


@dataclass(frozen=True, slots=True)
class JensenShannon:
    """The generalised Jensen-Shannon divergence of GKD (arXiv 2306.13649), with b = jsd_beta and m = b t + (1 - b) s:

        JSD = b KL(t || m) + (1 - b) KL(s || m).

    The derivative with respect to s_x is -b (1 - b) t_x / m_x + (1 - b) (log(s_x / m_x) + 1 - (1 - b) s_x / m_x). As
    b t_x + (1 - b) s_x = m_x, all but the logarithm cancels: f = (1 - b) log(s / m). JSD / b goes to KL(t || s) for
    b -> 0, and JSD / (1 - b) to KL(s || t) for b -> 1.
    """

    jsd_beta: float = 0.5

    def compare_(self, student: Tensor, probs: Tensor, teacher: Tensor) -> Tensor:
        """Return the divergence; see `Divergence`."""
        teacher_probs = teacher.exp()
        mixture = torch.lerp(probs, teacher_probs, self.jsd_beta)
        log_mixture = mixture.clamp_(min=torch.finfo(mixture.dtype).tiny).log_()
        from_teacher: Tensor = torch.linalg.vecdot(teacher_probs, teacher.sub_(log_mixture))
        log_ratio = student.sub_(log_mixture)
        from_student: Tensor = torch.linalg.vecdot(probs, log_ratio)
        torch.mul(log_ratio.sub_(from_student[:, None]), probs, out=teacher).mul_(1 - self.jsd_beta)
        return self.jsd_beta * from_teacher + (1 - self.jsd_beta) * from_student
