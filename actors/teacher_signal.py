"""What the learner is told of the teacher at each token, when that is not simply the student's whole support.

T is the length of a completion, K a support's size, V the vocabulary.
"""

from dataclasses import dataclass, replace
from typing import Literal

import numpy as np

from actors.engines.protocol import Floats, Support
from actors.experience import LEARNED_COLUMNS, Rollout, TeacherScores

_SUPPORT_COLUMNS = frozenset({"support_ids", "support_teacher_logprobs", "teacher_tail_logprobs"})


@dataclass(frozen=True, slots=True, kw_only=True)
class SignalSpec:
    """What the learner is told; by default both laws' common support as rollouts have it."""

    kind: Literal["support", "sampled", "full", "hidden"] = "support"
    """Log-probs on a support, of the drawn token alone, of the whole vocabulary, or the last hidden state."""
    support: Literal["student", "teacher", "union"] = "student"
    """Whose likeliest ids; `union`: the student's, then the teacher's likeliest of all others."""
    support_size: int | None = None
    """K of each of them; None, for the student's alone, for as many as a rollout has."""

    def __post_init__(self) -> None:
        if self.kind == "support" and self.support != "student" and self.support_size is None:
            raise ValueError(f"support_size must be a number for the support {self.support}, got None")

    @property
    def needs_student_support(self) -> bool:
        """Whether plain rollouts must carry one; hidden states are told without any log-prob."""
        return self.kind != "hidden"

    @property
    def learned_columns(self) -> frozenset[str]:
        """The columns of a rollout batch that the learner needs; the others may be nulls."""
        return (LEARNED_COLUMNS - _SUPPORT_COLUMNS) | self._own_columns

    @property
    def is_in_every_rollout(self) -> bool:
        """Whether blended rollouts, and scored ones, carry it without anything being added."""
        return self.kind == "sampled" or (self.kind, self.support, self.support_size) == ("support", "student", None)

    def needs_model(self, support_size: int | None) -> bool:
        """Whether the teacher itself is asked for more than its log-probs on rollouts' supports of this size.

        Args:
            support_size: of rollouts; None for the whole vocabulary.
        """
        return {
            "support": self.support != "student",
            "sampled": False,
            "full": support_size is not None,
            "hidden": True,
        }[self.kind]

    @property
    def _own_columns(self) -> frozenset[str]:
        if self.kind == "sampled":
            return frozenset({"teacher_logprobs"})
        if self.kind == "hidden":
            return frozenset({"teacher_hidden"})
        if self.kind == "full":
            return frozenset({"learned_logprobs"})
        if self.is_in_every_rollout:
            return _SUPPORT_COLUMNS
        return frozenset({"learned_ids", "learned_logprobs", "learned_tail_logprobs"})


STUDENTS_SUPPORT = SignalSpec()
"""What rollouts have anyway."""


def with_own_scores(rollout: Rollout, signal: SignalSpec) -> Rollout:
    """Return the rollout with the signal made of the scores that it has; the teacher is not needed.

    A student's support is cut to its likeliest ids; scores of the whole vocabulary lose their ids.
    """
    if signal.is_in_every_rollout:
        return rollout
    assert rollout.teacher is not None, "a rollout without scores cannot tell what the learner needs"
    return replace(rollout, learned=_whole(rollout.teacher) if signal.kind == "full" else _cut(rollout.teacher, signal))


def _cut(scores: TeacherScores, signal: SignalSpec) -> Support:
    """The first K ids; the mass of the others joins the tail."""
    assert scores.teacher_logprobs is not None
    assert scores.teacher_tail_logprobs is not None
    size = signal.support_size
    return Support(
        ids=scores.support_ids[:, :size],
        logprobs=scores.teacher_logprobs[:, :size],
        tail_logprobs=tail_beyond(scores.teacher_logprobs, scores.teacher_tail_logprobs, size),
    )


def tail_beyond(logprobs: Floats, tails: Floats, size: int | None) -> Floats:
    """Return [T] nats: the log mass outside the first `size` of the ids of log-probs [T, K] with tails [T]."""
    if size is None:
        return tails
    beyond = np.concatenate([logprobs[:, size:], tails[:, None]], 1).astype(np.float64)
    return np.asarray(np.logaddexp.reduce(beyond, axis=1), np.float32)


def _whole(scores: TeacherScores) -> Support:
    assert scores.teacher_logprobs is not None
    logprobs = np.empty_like(scores.teacher_logprobs)
    np.put_along_axis(logprobs, scores.support_ids.astype(np.int64), scores.teacher_logprobs, axis=1)
    return Support(ids=None, logprobs=logprobs, tail_logprobs=None)
