"""How the behaviour policy changes with the step."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Protocol

from actors.behaviours import Behaviour, FixedBeta, InterleavedInjection, StudentAlone, TrustRegion
from actors.config import (
    FixedBetaSection,
    InterleavedInjectionSection,
    RolloutsSection,
    TemperatureWarmupSection,
    TrustRegionSection,
)
from actors.head import Decoding

BlendingSection = TrustRegionSection | FixedBetaSection | InterleavedInjectionSection | TemperatureWarmupSection


class Schedule(Protocol):
    """A budget for each step."""

    def __call__(self, step: int) -> float:
        """Return epsilon in nats for the batch learned from at `step`, counted from 0."""


@dataclass(frozen=True, slots=True, kw_only=True)
class LinearAnneal:
    """``epsilon_k = epsilon_0 (1 - k/K)`` for k < K, and exactly 0 from k = K on (TRB, arXiv 2605.31159).

    Example:
        >>> [LinearAnneal(start=0.02, num_steps=4)(k) for k in range(6)]
        [0.02, 0.015, 0.01, 0.005, 0.0, 0.0]
    """

    start: float
    """epsilon_0, nats."""
    num_steps: int
    """K; 0 means no warmup at all."""

    def __post_init__(self) -> None:
        if not 0 <= self.start < float("inf") or self.num_steps < 0:
            raise ValueError(f"start and num_steps must be finite and >= 0, got {self.start} and {self.num_steps}")

    def __call__(self, step: int) -> float:
        """Return epsilon at `step`."""
        return self.start * ((self.num_steps - step) / self.num_steps) if step < self.num_steps else 0.0


@dataclass(frozen=True, slots=True, kw_only=True)
class Constant:
    """The same budget at every step: the papers' fixed-epsilon baseline, or none at all."""

    epsilon: float
    """Nats."""

    def __post_init__(self) -> None:
        if not 0 <= self.epsilon < float("inf"):
            raise ValueError(f"epsilon must be finite and >= 0, got {self.epsilon}")

    def __call__(self, step: int) -> float:
        """Return epsilon, whatever the step."""
        return self.epsilon


def behaviour_plan(section: BlendingSection | None, rollouts: RolloutsSection) -> Callable[[int], Behaviour]:
    """Return which behaviour policy each batch is sampled with, by the step that learns from it.

    Every plan ends with the student alone, as the recipe's rollouts have it, unless its warmup has no end.
    """
    alone = StudentAlone(decoding=Decoding(top_k=rollouts.top_k, top_p=rollouts.top_p))

    def trust_region(step: int) -> Behaviour:
        assert isinstance(section, TrustRegionSection)
        schedule: Schedule = Constant(epsilon=section.epsilon)
        if section.schedule == "linear":
            schedule = LinearAnneal(start=section.epsilon, num_steps=section.warmup_steps)
        epsilon = schedule(step)
        return TrustRegion(epsilon=epsilon) if epsilon > 0 else alone

    def fixed_beta(step: int) -> Behaviour:
        assert isinstance(section, FixedBetaSection)
        return FixedBeta(beta=section.beta) if step < section.warmup_steps else alone

    def injection(step: int) -> Behaviour:
        assert isinstance(section, InterleavedInjectionSection)
        if section.warmup_steps is not None and step >= section.warmup_steps:
            return alone
        return InterleavedInjection(top_k=section.top_k, temperature=section.temperature)

    def temperature(step: int) -> Behaviour:
        assert isinstance(section, TemperatureWarmupSection)
        left = max(0.0, 1 - step / section.warmup_steps) if section.warmup_steps else 0.0
        decoding = Decoding(temperature=1 + (section.start - 1) * left, top_k=rollouts.top_k, top_p=rollouts.top_p)
        return StudentAlone(decoding=decoding)

    plans: dict[type, Callable[[int], Behaviour]] = {
        TrustRegionSection: trust_region, FixedBetaSection: fixed_beta,
        InterleavedInjectionSection: injection, TemperatureWarmupSection: temperature,
    }  # fmt: skip
    return plans.get(type(section), lambda step: alone)
