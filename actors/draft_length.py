"""How many tokens to draft before the teacher is asked: as many as make the emitted tokens cheapest.

With acceptance a, k drafts emit ``E(a, k) = (1 - a^k) / (1 - a)`` tokens in the mean: the accepted run, and the token
that ends it, of at most k. A round of B sequences costs k student passes, one teacher pass over B k positions, and what
the round itself costs. The length with the most tokens per cost is taken; k = 1 is lockstep.

Acceptance and costs are estimated anew for each batch of sequences, from what is known beforehand and then from the
batch itself, so the choice depends on no clock and no history unless costs are asked to be measured.
"""

from dataclasses import dataclass
from typing import Protocol

import numpy as np

from actors.config import CostsSection

MAX_DRAFT_LENGTH = 64

_PRIOR_WEIGHT = 16.0
"""Verified drafts that the acceptance expected beforehand counts for."""
_MEMORY = 0.9
"""What is left of an observation after one more round."""


class DraftLength(Protocol):
    """Chooses the length of each round of one batch."""

    def choose(self, num_rows: int) -> int:
        """Return k for a round of `num_rows` sequences."""

    def observe(self, observation: "Observation") -> None:
        """Learn from a round."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Observation:
    """What a round of B sequences came to."""

    num_rows: int
    """B."""
    draft_length: int
    """k."""
    num_accepted: int
    """Drafts kept, of all rows."""
    num_refused: int
    """Rows whose run ended with a refused draft; drafts behind it were never decided."""
    student_s: float
    """Seconds of the student's k passes."""
    teacher_s: float
    """Seconds of the teacher's pass."""
    round_s: float
    """Seconds of everything else."""


@dataclass(frozen=True, slots=True, kw_only=True)
class FixedLength:
    """The same k in every round."""

    length: int

    def choose(self, num_rows: int) -> int:
        """Return k."""
        return self.length

    def observe(self, observation: Observation) -> None:
        """Nothing is learned."""


class Acceptance:
    """A running estimate of the share of decided drafts that are kept."""

    def __init__(self, prior: float) -> None:
        self._kept, self._decided = prior * _PRIOR_WEIGHT, _PRIOR_WEIGHT

    @property
    def rate(self) -> float:
        """In (0, 1)."""
        return min(max(self._kept / self._decided, 0.01), 0.999)

    def observe(self, num_accepted: int, num_refused: int) -> None:
        """Count a round's decided drafts."""
        self._kept = _MEMORY * self._kept + num_accepted
        self._decided = _MEMORY * self._decided + num_accepted + num_refused


class AdaptiveLength:
    """The cheapest k at fixed costs."""

    def __init__(self, costs: CostsSection, *, prior: float) -> None:
        """Begin with an acceptance of `prior`."""
        self._costs, self._acceptance = costs, Acceptance(prior)

    def choose(self, num_rows: int) -> int:
        """Return k in 1 .. MAX_DRAFT_LENGTH."""
        costs = self._costs
        return cheapest_length(
            self._acceptance.rate,
            draft=costs.student_pass + costs.student_row * num_rows,
            once=costs.round + costs.teacher_pass,
            position=costs.teacher_row * num_rows,
        )

    def observe(self, observation: Observation) -> None:
        """Learn the acceptance."""
        self._acceptance.observe(observation.num_accepted, observation.num_refused)


class MeasuredLength:
    """The cheapest k at costs read from the clock: never slower than it must be, but no run repeats to the bit."""

    def __init__(self, *, prior: float) -> None:
        self._acceptance = Acceptance(prior)
        self._draft_s = self._round_s = 0.0
        # Moments of (1, positions) against the teacher's seconds, for a straight line through them.
        self._moments, self._products = np.zeros((2, 2)), np.zeros(2)
        self._num_rounds = 0

    def choose(self, num_rows: int) -> int:
        """Return k; the first two rounds have two lengths, so that the teacher's two costs can be told apart."""
        if self._num_rounds < 2:
            return (4, 8)[self._num_rounds]
        once, position = self._teacher_line()
        return cheapest_length(
            self._acceptance.rate, draft=self._draft_s, once=once + self._round_s, position=position * num_rows
        )

    def observe(self, observation: Observation) -> None:
        """Learn the acceptance and the costs."""
        self._acceptance.observe(observation.num_accepted, observation.num_refused)
        self._num_rounds += 1
        memory = _MEMORY if self._num_rounds > 1 else 0.0
        self._draft_s = memory * self._draft_s + (1 - memory) * observation.student_s / observation.draft_length
        self._round_s = memory * self._round_s + (1 - memory) * observation.round_s
        row = np.array([1.0, observation.num_rows * observation.draft_length])
        self._moments = _MEMORY * self._moments + np.outer(row, row)
        self._products = _MEMORY * self._products + row * observation.teacher_s

    def _teacher_line(self) -> tuple[float, float]:
        """Seconds of a pass, and of each position in it; neither below 0."""
        once, position = np.linalg.lstsq(self._moments, self._products, rcond=1e-9)[0]
        if position < 0 or once < 0:
            mean = self._products[1] / self._moments[1, 1]  # the best line through the origin
            return 0.0, float(mean)
        return float(once), float(position)


def cheapest_length(acceptance: float, *, draft: float, once: float, position: float) -> int:
    """Return the k in 1 .. MAX_DRAFT_LENGTH with the most emitted tokens per cost.

    Args:
        acceptance: share of drafts that are kept, in (0, 1).
        draft: cost of one more student pass.
        once: cost of a round that does not grow with k.
        position: cost of scoring one more position of all rows.

    Example:
        >>> cheapest_length(0.95, draft=1.0, once=3.0, position=0.1)
        9
        >>> cheapest_length(0.5, draft=1.0, once=0.1, position=1.0)
        1
    """
    lengths = np.arange(1, MAX_DRAFT_LENGTH + 1)
    emitted = (1 - acceptance**lengths) / (1 - acceptance)
    return int(lengths[np.argmax(emitted / (once + lengths * (draft + position)))])
