"""Losses that bring the student to the teacher's law at every prefix that was visited, whoever visited it.

s is the current student's law and t the teacher's. No importance weight enters where both are compared as laws: the law
that drew the tokens only decided which prefixes are visited, so older weights and blends need no correction.

With Veto (arXiv 2601.07155) the target is not t but Q, proportional to t s^b with b = `veto_beta` and s held constant,
over the same outcomes: all tokens, a support and its tail, or a support alone. Q is scaled to the mass that t has there
(1 for the first two), so b = 0 is the teacher itself.
"""

import math
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from learner.config import DistillationSection
from learner.divergences import Divergence, ForwardKL, JensenShannon, ReverseKL
from learner.laws import Laws, row_blocks
from learner.losses import Loss, LossOutputs, Tokens
from learner.tiles import OutputHead


@dataclass(frozen=True, slots=True, kw_only=True)
class SupportDistillation:
    """A divergence on the K ids of a stored support S.

    With `tail`, all that lies outside S is one outcome more, with the mass that each law has there: the loss is the
    divergence of two laws that sum to 1, exact where S is the whole vocabulary.

    Without it, w = s / sum_S s and u = t / sum_S t are the laws renormalised over S, and

    - reverse KL has the value sum_S w (log s - log t) and the gradient sum_S w (log s - log t) grad log s, with w and
      the bracket held constant: the normalised surrogate of arXiv 2604.13016, which TRB follows. It lacks the "+1" of
      the derivative of the truncated sum, and so does not reward moving mass out of S; each position does push mass out
      of S in proportion to its KL, harmless where S has nearly all of it.
    - forward KL has the value sum_S u (log u - log s) and the gradient -sum_S u grad log s. Even where s = t it still
      moves mass into S, by 1 - sum_S s.
    - Jensen-Shannon is that of w and u (arXiv 2306.13649) and moves no mass into S or out of it.

    In reverse KL a log-prob of the teacher below the floor (-inf included, where the KL would be infinite) counts as
    the floor. An id that the student itself forbids (-inf) has no gradient.

    Metrics: `divergence`, the value; `kl_to_teacher` = sum_S s (log s - log t), the tail included, with the floor and
    without Veto; `support_mass` = sum_S s; `teacher_mass` = sum_S t; `teacher_floored`, log-probs below the floor per
    token.
    """

    divergence: Divergence
    tail: bool = False
    teacher_logprob_floor: float = -30.0
    veto_beta: float = 0.0
    needs_sequence_ratios: ClassVar[bool] = False

    def __call__(self, laws: Laws, tokens: Tokens) -> LossOutputs:
        """Return the loss of each token; see `Loss`."""
        ids, teacher = _support(tokens, laws)
        size = ids.shape[-1]
        logprobs = laws.logprobs_and_outside(ids) if self.tail else laws.logprobs(ids)
        student = logprobs.detach()
        if self.tail:
            teacher = torch.cat([teacher, _tails(tokens, laws)[:, None]], -1)
        probs = student.exp()
        floored = _num_floored(student, teacher, self.teacher_logprob_floor)
        kl_to_teacher = probs * (_finite(student) - teacher.clamp(min=self.teacher_logprob_floor))
        target = _veto(teacher, student, self.veto_beta) if self.veto_beta else teacher
        value, gradient = self._compare(student, probs, target)
        # The gradient is 0 wherever the log-prob is -inf, which times 0 would be no number.
        surrogate = (gradient * logprobs.masked_fill(student == -torch.inf, 0)).sum(-1)
        metrics = {
            "kl_to_teacher": kl_to_teacher.sum(),
            "support_mass": probs[:, :size].sum(),
            "teacher_mass": teacher[:, :size].exp().sum(),
            "teacher_floored": floored.sum(),
            "divergence": value.sum(),
        }
        return LossOutputs(per_token=value + (surrogate - surrogate.detach()), metrics=metrics)

    def _compare(self, student: Tensor, probs: Tensor, teacher: Tensor) -> tuple[Tensor, Tensor]:
        """Return the value [n], and what the gradient of each log-prob is multiplied by, [n, K] or [n, K + 1]."""
        if self.tail:
            student, teacher = _finite(student), _target(teacher, self.divergence, self.teacher_logprob_floor)
            return self.divergence.compare_(student, probs, teacher), teacher
        tiny = torch.finfo(probs.dtype).tiny
        if isinstance(self.divergence, ReverseKL):
            log_ratio = _finite(student) - _target(teacher, self.divergence, self.teacher_logprob_floor)
            weighted = probs / probs.sum(-1, keepdim=True).clamp(min=tiny) * log_ratio
            return weighted.sum(-1), weighted
        teacher = teacher.log_softmax(-1)
        if isinstance(self.divergence, ForwardKL):
            teacher_probs = teacher.exp()
            return (teacher_probs * (_finite(teacher) - _finite(student))).sum(-1), -teacher_probs
        student = student.log_softmax(-1)
        teacher = _finite(teacher)
        return self.divergence.compare_(_finite(student), student.exp(), teacher), teacher


@dataclass(frozen=True, slots=True, kw_only=True)
class FullDistillation:
    """A divergence on the whole vocabulary, of the teacher's last hidden states or of its stored log-probs.

    Metrics: `divergence`, the value; `kl_to_teacher` = sum s (log s - log t) with the floor and without Veto;
    `support_mass` and `teacher_mass`, 1 per token; `teacher_floored` log-probs per token.
    """

    divergence: Divergence
    teacher: OutputHead | None = None
    """Makes the teacher's law of tokens.teacher_hidden; None: the stored support is the whole vocabulary."""
    teacher_logprob_floor: float = -30.0
    veto_beta: float = 0.0
    needs_sequence_ratios: ClassVar[bool] = False

    def __call__(self, laws: Laws, tokens: Tokens) -> LossOutputs:
        """Return the loss of each token; see `Loss`."""
        teacher = self._teacher_scores(laws, tokens)
        value, kl_to_teacher, floored = _FullDivergence.apply(  # type: ignore[no-untyped-call]
            laws.scores, laws.log_normaliser, teacher, self
        )
        mass = value.new_tensor(len(value))
        metrics = {
            "kl_to_teacher": kl_to_teacher.sum(),
            "support_mass": mass,
            "teacher_mass": mass,
            "teacher_floored": floored.sum(),
            "divergence": value.detach().sum(),
        }
        return LossOutputs(per_token=value, metrics=metrics)

    @torch.no_grad()
    def _teacher_scores(self, laws: Laws, tokens: Tokens) -> Tensor:
        """Return [n, V] in memory of its own."""
        vocab_size = laws.scores.shape[-1]
        if len(tokens) == 0:
            return torch.empty_like(laws.scores)
        if self.teacher is None:
            logprobs = _stored(tokens, laws)
            if logprobs.shape[-1] != vocab_size:
                raise ValueError(
                    f"distillation on the full vocabulary needs a stored support of {vocab_size} ids, got "
                    f"{logprobs.shape[-1]}; set signal to support, or have the teacher send the whole vocabulary"
                )
            teacher = torch.empty_like(laws.scores)
            ids = tokens.support_ids
            return teacher.copy_(logprobs) if ids is None else teacher.scatter_(-1, ids, logprobs)
        if tokens.teacher_hidden is None:
            raise ValueError(
                "distillation of hidden states needs the teacher's last hidden state of every token, got rollouts "
                "without them; set signal to support, or have the teacher send them"
            )
        if self.teacher.vocab_size != vocab_size:
            raise ValueError(
                f"distillation of hidden states needs a teacher's head of the student's {vocab_size} tokens, got "
                f"{self.teacher.vocab_size}; cut both to the shared vocabulary"
            )
        hidden = tokens.teacher_hidden.to(self.teacher.weight.dtype)
        return self.teacher.scores(hidden).to(laws.scores.dtype)


class _FullDivergence(torch.autograd.Function):
    """Student's scores [n, V], their normalisers [n], teacher's scores [n, V] -> [n] value, kl_to_teacher and floored.

    The gradient is there after the forward pass, in the memory of the teacher's scores.
    """

    @staticmethod
    def forward(
        ctx: Any, scores: Tensor, log_normaliser: Tensor, teacher: Tensor, loss: FullDistillation
    ) -> tuple[Tensor, Tensor, Tensor]:
        value, kl_to_teacher, floored = (torch.empty_like(log_normaliser) for _ in range(3))
        divergence, floor, veto_beta = loss.divergence, loss.teacher_logprob_floor, loss.veto_beta
        value_is_kl = isinstance(divergence, ReverseKL) and not veto_beta
        for rows in row_blocks(scores):
            target = teacher[rows]
            target.sub_(target.logsumexp(-1, keepdim=True))
            student = scores[rows] - log_normaliser[rows, None]
            probs = student.exp()
            floored[rows] = _num_floored(student, target, floor)
            student.clamp_(min=_lowest(student))
            if not value_is_kl:
                kl_to_teacher[rows] = torch.linalg.vecdot(probs, student - target.clamp(min=floor))
            if veto_beta:
                target.copy_(_veto(target, student, veto_beta))
            target.clamp_(min=floor if isinstance(divergence, ReverseKL) else _lowest(target))
            value[rows] = divergence.compare_(student, probs, target)
        if value_is_kl:
            kl_to_teacher.copy_(value)
        ctx.gradient = teacher
        ctx.mark_non_differentiable(kl_to_teacher, floored)
        return value, kl_to_teacher, floored

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, scale: Tensor, *_: Tensor) -> tuple[Tensor | None, ...]:
        # Given away, so that the gradient of another part of the loss can be added to it in place.
        gradient, ctx.gradient = ctx.gradient, None
        return gradient.mul_(scale[:, None]), None, None, None


@dataclass(frozen=True, slots=True, kw_only=True)
class SampledReverseKL:
    """The estimate of KL(s || t) from the one token y that was drawn.

    The value is log s(y) - log t(y). The gradient is that of REINFORCE with its negative as the reward of each token,

        r (log s(y) - log t(y)) grad log s(y),    r = s(y) / mu(y),

    with all but the last factor held constant and mu the law that y was drawn from: a blend, or older weights. Its mean
    over y ~ mu is sum s (log s - log t) grad log s, the gradient of the exact KL. The teacher's log-prob is stored as a
    support of y alone; below the floor it counts as that.

    Metrics: `divergence`, the value; `kl_to_teacher`, r times the value, whose mean is the KL; `teacher_floored`.
    """

    teacher_logprob_floor: float = -30.0
    needs_sequence_ratios: ClassVar[bool] = False

    def __call__(self, laws: Laws, tokens: Tokens) -> LossOutputs:
        """Return the loss of each token; see `Loss`."""
        ids, teacher = _support(tokens, laws)
        if ids.shape[-1] != 1:
            raise ValueError(
                f"distillation of the sampled token needs a stored support of that token alone, got {ids.shape[-1]} "
                "ids per token; set signal to support, or have the teacher send the sampled token's log-prob"
            )
        logprobs = laws.token_logprobs(tokens.token_ids)
        constant, teacher = logprobs.detach(), teacher[:, 0]
        value = constant - teacher.clamp(min=self.teacher_logprob_floor)
        reward = value * (constant - tokens.behaviour_logprobs.to(constant.dtype)).exp()
        metrics = {
            "kl_to_teacher": reward.sum(),
            "teacher_floored": (teacher < self.teacher_logprob_floor).sum(),
            "divergence": value.sum(),
        }
        return LossOutputs(per_token=value + reward * (logprobs - constant), metrics=metrics)


@dataclass(frozen=True, slots=True, kw_only=True)
class SupervisedFineTuning:
    """-log s(y) of each token y that was drawn: on a teacher's samples, sequence-level distillation (arXiv 1606.07947).

    Metric: `negative_log_likelihood`.
    """

    needs_sequence_ratios: ClassVar[bool] = False

    def __call__(self, laws: Laws, tokens: Tokens) -> LossOutputs:
        """Return the loss of each token; see `Loss`."""
        per_token = -laws.token_logprobs(tokens.token_ids)
        return LossOutputs(per_token=per_token, metrics={"negative_log_likelihood": per_token.detach().sum()})


def build_distillation(
    section: DistillationSection, *, signal: str, veto_beta: float, teacher_head: OutputHead | None, vocab_size: int
) -> Loss:
    """Return the loss of a recipe's section.

    Args:
        section: the recipe's.
        signal: what the learner is told of the teacher; the section's, or what `auto` came to.
        veto_beta: the power of Veto at this step; 0 for the teacher itself.
        teacher_head: the teacher's output head; needed for the signal `hidden` alone.
        vocab_size: V, of student and teacher.

    Raises:
        ValueError: if the signal is unknown, or `hidden` without an output head.
    """
    divergence = _divergence(section)
    floor = section.teacher_logprob_floor
    if signal == "sampled":
        return SampledReverseKL(teacher_logprob_floor=floor)
    if signal == "support" and section.support_size < vocab_size:
        return SupportDistillation(
            divergence=divergence, tail=section.tail, teacher_logprob_floor=floor, veto_beta=veto_beta
        )
    if signal not in ("support", "full", "hidden"):
        raise ValueError(f"signal must be support, sampled, full or hidden, got {signal}; set it in the recipe")
    if signal == "hidden" and teacher_head is None:
        raise ValueError("signal hidden needs the teacher's output head, got none; set signal to support or full")
    return FullDistillation(
        divergence=divergence, teacher=teacher_head if signal == "hidden" else None, teacher_logprob_floor=floor,
        veto_beta=veto_beta,
    )  # fmt: skip


def _divergence(section: DistillationSection) -> Divergence:
    match section.divergence:
        case "reverse_kl":
            return ReverseKL()
        case "forward_kl":
            return ForwardKL()
        case "jsd":
            return JensenShannon(jsd_beta=section.jsd_beta)


def _support(tokens: Tokens, laws: Laws) -> tuple[Tensor, Tensor]:
    """Return the stored ids [n, K] and the teacher's log-probs [n, K] in the laws' type."""
    if len(tokens) == 0:
        return tokens.token_ids[:, None], laws.scores.new_empty(0, 1)
    logprobs = _stored(tokens, laws)
    if tokens.support_ids is None:
        raise ValueError(
            "distillation on a support needs its ids, got the teacher's log-probs of the whole vocabulary without ids; "
            "set signal to full"
        )
    return tokens.support_ids, logprobs


def _stored(tokens: Tokens, laws: Laws) -> Tensor:
    """Return the teacher's log-probs [n, K] in the laws' type."""
    if tokens.support_teacher_logprobs is None:
        raise ValueError(
            "distillation needs the teacher's log-probs on every rollout, got rollouts without them; score them with "
            "the teacher, or set learner.objective to one without a teacher"
        )
    return tokens.support_teacher_logprobs.to(laws.scores.dtype)


def _tails(tokens: Tokens, laws: Laws) -> Tensor:
    """Return [n] nats in the laws' type."""
    if len(tokens) == 0:
        return laws.scores.new_empty(0)
    if tokens.support_teacher_tails is None:
        raise ValueError(
            "distillation with a tail needs the teacher's mass outside the support, got none; set tail to false, or "
            "have the teacher send it"
        )
    return tokens.support_teacher_tails.to(laws.scores.dtype)


def _num_floored(student: Tensor, teacher: Tensor, floor: float) -> Tensor:
    """[n, K] log-probs -> [n] how many of the teacher's are below the floor where the student's are not -inf."""
    # As numbers: comparisons to bool are several times slower on CPU.
    below = torch.lt(teacher, floor, out=torch.empty_like(teacher))
    allowed = torch.gt(student, -torch.inf, out=torch.empty_like(student))
    number: Tensor = torch.linalg.vecdot(below, allowed)
    return number


def _veto(teacher: Tensor, student: Tensor, beta: float) -> Tensor:
    """Return log Q [n, K] of log-probs [n, K], with the mass of the teacher."""
    target = teacher + beta * student
    change = teacher.logsumexp(-1, keepdim=True) - target.logsumexp(-1, keepdim=True)
    # No outcome that both allow: there is nothing to scale.
    return target + change.nan_to_num(0, posinf=0, neginf=0)


def _lowest(logprobs: Tensor) -> float:
    """Return what stands in for -inf, so that 0 times it is 0: a number whose exponential is still 0."""
    return 2 * math.log(torch.finfo(logprobs.dtype).tiny)


def _finite(logprobs: Tensor) -> Tensor:
    return logprobs.clamp(min=_lowest(logprobs))


def _target(teacher: Tensor, divergence: Divergence, floor: float) -> Tensor:
    """Return finite log-probs of the teacher, in reverse KL of at least the floor."""
    return teacher.clamp(min=floor) if isinstance(divergence, ReverseKL) else _finite(teacher)
