"""How the KL budget changes with the step."""

from dataclasses import dataclass
from typing import Protocol


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
