"""Behaviour policies: which law each token is drawn from. Each is a small object; samplers only carry them.

A behaviour that blends says what its law mu is, given the student's and the teacher's at one position; drafting,
verification, engines and actors are the same for all of them (actors/trust_region.py, `verify_target`).
"""

import math
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

from actors.head import PLAIN, Decoding
from actors.trust_region import Blend, blend, blend_at, law_as_blend


class BlendedBehaviour(Protocol):
    """A law made of the student's and the teacher's."""

    @property
    def epsilon(self) -> float:
        """Budget in nats that the law keeps; NaN where it keeps none."""

    @property
    def expected_acceptance(self) -> float:
        """Share of drafts that may be expected to be kept, before any has been seen."""

    def target(self, student_logprobs: Tensor, teacher_logprobs: Tensor) -> Blend:
        """Return mu for [..., V] rows of both, in nats."""


@dataclass(frozen=True, slots=True, kw_only=True)
class StudentAlone:
    """The student's own law, or one made of it alone: no teacher is asked while sampling."""

    decoding: Decoding = PLAIN


@dataclass(frozen=True, slots=True, kw_only=True)
class TrustRegion:
    """TRB: the law closest to the teacher among those within a KL budget of the student (arXiv 2605.31159)."""

    epsilon: float
    """Nats per token."""

    @property
    def expected_acceptance(self) -> float:
        """At least this share is kept, by Pinsker's inequality."""
        return max(0.0, 1 - math.sqrt(self.epsilon / 2))

    def target(self, student_logprobs: Tensor, teacher_logprobs: Tensor) -> Blend:
        """Return mu for [..., V] rows of both."""
        return blend(student_logprobs, teacher_logprobs, self.epsilon)


class _WithoutBudget:
    """What there is to say of a law that keeps no budget."""

    __slots__ = ()

    @property
    def epsilon(self) -> float:
        """None."""
        return float("nan")

    @property
    def expected_acceptance(self) -> float:
        """Nothing is known; as at an epsilon of 0.05."""
        return 0.84


@dataclass(frozen=True, slots=True, kw_only=True)
class FixedBeta(_WithoutBudget):
    """``mu ∝ pi_S^(1-beta) pi_T^beta`` with one beta for all tokens: no budget is kept."""

    beta: float
    """In [0, 1]."""

    def target(self, student_logprobs: Tensor, teacher_logprobs: Tensor) -> Blend:
        """Return mu for [..., V] rows of both."""
        return blend_at(student_logprobs, teacher_logprobs, self.beta)


@dataclass(frozen=True, slots=True, kw_only=True)
class InterleavedInjection(_WithoutBudget):
    """SKD (Xu et al., ICLR 2025): a student's token outside the teacher's top-K gives way to a teacher's sample.

    As a law: ``mu = pi_S 1[top-K] + pi_S(outside) softmax(log pi_T / temperature)``. It speaks of the teacher's
    likeliest tokens, so it needs both laws on the whole vocabulary.
    """

    top_k: int
    """K, of the teacher."""
    temperature: float
    """Of the teacher's sample."""

    def target(self, student_logprobs: Tensor, teacher_logprobs: Tensor) -> Blend:
        """Return mu for [..., V] rows of both; its beta is NaN, since it is not on the path between them."""
        student = torch.log_softmax(student_logprobs.double(), dim=-1)
        teacher = torch.log_softmax(teacher_logprobs.double(), dim=-1)
        likeliest = teacher.topk(min(self.top_k, teacher.shape[-1]), dim=-1).indices
        kept = torch.full_like(student, -torch.inf).scatter(-1, likeliest, student.gather(-1, likeliest))
        outside = torch.logsumexp(student.scatter(-1, likeliest, -torch.inf), dim=-1, keepdim=True)
        mu = torch.logaddexp(kept, outside + torch.log_softmax(teacher / self.temperature, dim=-1))
        dtype = torch.promote_types(student_logprobs.dtype, teacher_logprobs.dtype)
        return law_as_blend(mu.to(dtype), student_logprobs, teacher_logprobs)


Behaviour = StudentAlone | TrustRegion | FixedBeta | InterleavedInjection
