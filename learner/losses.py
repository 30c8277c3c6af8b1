"""Per-token losses of distillation and of reinforcement learning, as functions of tensors alone.

B is the number of rollouts of a micro-batch, T the number of its completion positions (the longest completion and what
the alignment of different prompts needs), K the support size, V the vocabulary. Losses are returned per token and
unreduced: the caller divides their sum by the number of training tokens of the whole step (token-mean), so that neither
micro-batches nor the number of ranks matter. All logarithms are natural; 16-bit logits are computed with in float32.
"""

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

from learner.config import PolicyGradientObjective, ReverseKLObjective


@dataclass(frozen=True, slots=True, kw_only=True)
class LossInputs:
    """What a loss sees of a micro-batch. Where loss_mask is False all other values are ignored, NaN included.

    Only the logits must be numbers there, too: their gradient passes through the softmax.
    """

    logits: Tensor
    """[B, T, V] of the current policy at the position that predicts each token, as the sampler reads them: at its
    temperature, over the shared vocabulary (`Head.scores`)."""
    token_ids: Tensor
    """[B, T] the tokens that were drawn; any id inside the vocabulary where the mask is False."""
    loss_mask: Tensor
    """[B, T] bool; True where the token trains."""
    behaviour_logprobs: Tensor
    """[B, T] nats, of the law that drew each token."""
    advantages: Tensor
    """[B], one per rollout."""
    support_ids: Tensor | None = None
    """[B, T, K], sorted by falling log-prob of the student that was sampled."""
    support_teacher_logprobs: Tensor | None = None
    """[B, T, K] nats; -inf for a token that the teacher forbids."""
    support_teacher_tails: Tensor | None = None
    """[B, T] nats, the teacher's mass outside the support."""


@dataclass(frozen=True, slots=True, kw_only=True)
class LossOutputs:
    """A loss of a micro-batch."""

    per_token: Tensor
    """[B, T], exactly 0 where loss_mask is False."""
    metrics: Mapping[str, Tensor]
    """Name -> sum over the training tokens (scalar, no gradient); divide by their number for the mean."""


class Loss(Protocol):
    """Something to minimise."""

    def __call__(self, inputs: LossInputs) -> LossOutputs:
        """Return the loss of each token."""


@dataclass(frozen=True, slots=True, kw_only=True)
class ReverseKL:
    """KL(student || teacher) at each prefix, on the student's K likeliest tokens.

    With s the current student, t the teacher, S the first `support_size` ids of the stored support and
    w_x = s_x / sum_S s the student's probability renormalised over S, the gradient at a position is

        sum over x in S of  w_x (log s_x - log t_x) grad log s_x

    with w and the bracket held constant: the normalised surrogate of arXiv 2604.13016, which TRB follows. It lacks the
    "+1" of the derivative of the truncated sum, and so does not reward moving mass out of S. With S the whole
    vocabulary that term is zero and this is exactly the gradient of KL(s || t). The value returned is
    sum_S w_x (log s_x - log t_x), so it is the exact KL there, too. No importance weight enters: the law that drew the
    tokens only decided which prefixes are visited.

    Where log t_x is below `teacher_logprob_floor` (-inf included, where the KL would be infinite) the floor stands in
    for it; metric `teacher_floored` counts these entries. An id that the student itself forbids (-inf) adds nothing.

    With `tail`, all that lies outside S is one outcome more, with the mass that each law has there: the loss is then
    the KL of two laws that sum to 1, and its gradient moves no mass out of S for its own sake. Without it (the papers'
    form) each position pushes mass out of S in proportion to its KL, harmless where S has nearly all of it.

    Metrics: `kl_to_teacher` = sum_S s_x (log s_x - log t_x), the exact KL where S is the vocabulary; `support_mass` =
    sum_S s_x; `teacher_floored`, entries per token.
    """

    support_size: int | None
    """K: this many ids from the front of the stored support; None: the stored support must be the whole vocabulary."""
    teacher_logprob_floor: float = -30.0
    """Nats; the lowest log-prob that the teacher is taken at."""
    tail: bool = False
    """Whether what lies outside S counts as one outcome more."""

    def __call__(self, inputs: LossInputs) -> LossOutputs:
        """Return the loss of each token.

        Raises:
            ValueError: if the rollouts carry no teacher log-probs, or fewer than the loss needs.
        """
        support_ids, teacher_logprobs = self._support(inputs)
        mask = inputs.loss_mask
        logits = at_least_float32(inputs.logits)
        support_logits = logits.gather(-1, support_ids)
        size = support_ids.shape[-1]
        if self.tail and size < logits.shape[-1]:
            support_logits = torch.cat([support_logits, _outside(logits, support_ids)], -1)
            teacher_logprobs = torch.cat([teacher_logprobs, self._teacher_tails(inputs, size)], -1)
        policy_logprobs = support_logits - logits.logsumexp(-1, keepdim=True)
        allowed = mask[..., None] & (support_logits != -torch.inf)
        policy_logprobs = torch.where(allowed, policy_logprobs, 0)
        constant = policy_logprobs.detach()
        teacher_logprobs = torch.where(allowed, teacher_logprobs.to(constant.dtype), 0)
        floored = teacher_logprobs < self.teacher_logprob_floor
        log_ratio = constant - teacher_logprobs.clamp(min=self.teacher_logprob_floor)
        probs = torch.where(allowed, constant.exp(), 0)
        support_mass = probs.sum(-1)
        weights = probs / support_mass.clamp(min=torch.finfo(probs.dtype).tiny)[..., None]
        value = (weights * log_ratio).sum(-1)
        surrogate = (weights * log_ratio * policy_logprobs).sum(-1)
        return LossOutputs(
            # The surrogate gives the gradient, the KL gives the number.
            per_token=torch.where(mask, value + surrogate - surrogate.detach(), 0),
            metrics={
                "kl_to_teacher": (probs * log_ratio).sum(),
                "support_mass": probs[..., :size].sum(),
                "teacher_floored": floored.sum(),
            },
        )

    def _support(self, inputs: LossInputs) -> tuple[Tensor, Tensor]:
        """Return ids and teacher log-probs, both [B, T, K] with the K of this loss."""
        if inputs.support_ids is None or inputs.support_teacher_logprobs is None:
            raise ValueError("reverse_kl needs the teacher's log-probs on every rollout, got rollouts without them")
        stored, vocabulary_size = inputs.support_ids.shape[-1], inputs.logits.shape[-1]
        if self.support_size is None and stored != vocabulary_size:
            raise ValueError(
                f"reverse_kl on the full vocabulary needs a stored support of {vocabulary_size} ids, got {stored}; set "
                "support_size of the rollouts to full, or learner.objective.support_size to a number"
            )
        size = vocabulary_size if self.support_size is None else min(self.support_size, vocabulary_size)
        if size > stored:
            raise ValueError(
                f"reverse_kl on {size} ids needs a stored support at least as large, got {stored}; raise support_size "
                "of the rollouts or lower learner.objective.support_size"
            )
        return inputs.support_ids[..., :size].long(), inputs.support_teacher_logprobs[..., :size]

    @staticmethod
    def _teacher_tails(inputs: LossInputs, size: int) -> Tensor:
        """Return [B, T, 1], what the teacher has outside the first `size` ids of the stored support."""
        if inputs.support_teacher_tails is None or inputs.support_teacher_logprobs is None:
            raise ValueError("reverse_kl with a tail needs the teacher's mass outside the support, got none")
        parts = [inputs.support_teacher_logprobs[..., size:], inputs.support_teacher_tails[..., None]]
        return torch.cat(parts, -1).logsumexp(-1, keepdim=True)


def _outside(logits: Tensor, support_ids: Tensor) -> Tensor:
    """Return [B, T, 1] logsumexp over the complement of the support; -inf, without a gradient, where it has no mass."""
    outside = logits.scatter(-1, support_ids, -torch.inf)
    empty = outside.detach().amax(-1, keepdim=True) == -torch.inf
    return outside.masked_fill(empty, 0).logsumexp(-1, keepdim=True).masked_fill(empty, -torch.inf)


@dataclass(frozen=True, slots=True, kw_only=True)
class ClippedPolicyGradient:
    """-min(ratio A, clip(ratio, 1 - clip_low, 1 + clip_high) A), with ratio = policy / behaviour per token.

    The surrogate of PPO (arXiv 1707.06347) without a KL term, as GRPO's followers use it; clip_high > clip_low is that
    of DAPO (arXiv 2503.14476). The ratio is to the law that really drew the token, so off-policy rollouts (a blend with
    the teacher, older weights) are corrected within the clip range.

    Metrics: `ratio`; `clipped_share` of tokens where the bound is active; `logprob_gap` = abs(log policy - log
    behaviour), which on-policy is only what sampler and learner compute differently; `entropy` of the policy in nats.
    """

    clip_low: float = 0.2
    clip_high: float = 0.2

    def __call__(self, inputs: LossInputs) -> LossOutputs:
        """Return the loss of each token."""
        mask = inputs.loss_mask
        logits = at_least_float32(inputs.logits)
        chosen = logits.gather(-1, inputs.token_ids.long()[..., None])[..., 0]
        log_normaliser = logits.logsumexp(-1)
        policy_logprobs = torch.where(mask, chosen - log_normaliser, 0)
        behaviour_logprobs = torch.where(mask, inputs.behaviour_logprobs.to(logits.dtype), 0)
        advantages = inputs.advantages.to(logits.dtype)[:, None]
        log_ratio = policy_logprobs - behaviour_logprobs
        ratio = log_ratio.exp()
        free = ratio * advantages
        bounded = ratio.clamp(1 - self.clip_low, 1 + self.clip_high) * advantages
        with torch.no_grad():
            entropy = torch.where(mask, _entropy(logits, log_normaliser), 0)
            metrics = {
                "ratio": torch.where(mask, ratio, 0).sum(),
                "clipped_share": (mask & (bounded < free)).sum(),
                "logprob_gap": log_ratio.abs().sum(),
                "entropy": entropy.sum(),
            }
        return LossOutputs(per_token=torch.where(mask, -torch.minimum(free, bounded), 0), metrics=metrics)


def build_loss(objective: ReverseKLObjective | PolicyGradientObjective, *, temperature: float = 1.0) -> Loss:
    """Return the loss of a recipe's objective; `temperature` is the sampler's, which its logits must be at.

    Raises:
        ValueError: if the temperature is not above 0, or not 1 where a teacher is distilled.
    """
    if not (math.isfinite(temperature) and temperature > 0):
        raise ValueError(f"temperature must be above 0, got {temperature!r}")
    if isinstance(objective, PolicyGradientObjective):
        return ClippedPolicyGradient(clip_low=objective.clip_low, clip_high=objective.clip_high)
    if temperature != 1.0:
        raise ValueError(f"distillation compares both laws at temperature 1.0, got rollouts at {temperature!r}")
    size = None if objective.support_size == "full" else objective.support_size
    return ReverseKL(support_size=size, teacher_logprob_floor=objective.teacher_logprob_floor, tail=objective.tail)


def at_least_float32(logits: Tensor) -> Tensor:
    """Return 16-bit logits in float32, others as they are."""
    return logits if logits.dtype == torch.float64 else logits.float()


def _entropy(logits: Tensor, log_normaliser: Tensor) -> Tensor:
    """[B, T, V], [B, T] -> [B, T] nats; a forbidden token (-inf) counts as 0 log 0 = 0."""
    logprobs = logits - log_normaliser[..., None]
    return -(logprobs.exp() * logprobs.clamp(min=torch.finfo(logprobs.dtype).min)).sum(-1)
