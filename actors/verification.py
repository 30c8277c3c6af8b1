"""One round, verified: which drafts are kept, what stands in for the first refused one, and what there is to record.

The laws are compared on the student's K likeliest ids plus one *tail* outcome, whose inner law is left to the student.
On these K + 1 outcomes mu is a real distribution, and its divergence from the student is that of the full law, so
the budget holds exactly for every K; with K = V it is the full blend. A tail outcome that has to be redrawn takes the
student's spare draw.
"""

from collections.abc import Sequence
from dataclasses import dataclass, fields
from typing import Any

import numpy as np
import numpy.typing as npt
import torch

from actors.behaviours import BlendedBehaviour
from actors.engines.protocol import Draft, Floats, Ints, Scores
from actors.trust_region import Verdict, verify_target

Bools = npt.NDArray[np.bool_]


@dataclass(frozen=True, slots=True, kw_only=True)
class BlendedTokens:
    """Emitted tokens, M of them, with what both models and their blend say of each; log-probs in nats."""

    token_ids: Ints
    """[M]."""
    behaviour_logprobs: Floats
    """[M] log mu."""
    student_logprobs: Floats
    """[M]."""
    teacher_logprobs: Floats
    """[M]."""
    beta: Floats
    """[M]."""
    divergence: Floats
    """[M] KL(mu || student) at the token's position."""
    teacher_divergence: Floats
    """[M] KL(mu || teacher) on the support and its tail."""
    accepted: Bools
    """[M] False where the student's draft was redrawn."""
    support_ids: Ints
    """[M, K]."""
    support_student_logprobs: Floats
    """[M, K]."""
    support_teacher_logprobs: Floats
    """[M, K]."""
    student_tail_logprobs: Floats
    """[M] log mass outside the support."""
    teacher_tail_logprobs: Floats
    """[M] likewise."""

    @staticmethod
    def joined(parts: "Sequence[BlendedTokens]") -> "BlendedTokens":
        """One after another."""
        names = [field.name for field in fields(BlendedTokens)]
        return BlendedTokens(**{name: np.concatenate([getattr(part, name) for part in parts]) for name in names})

    def at(self, index: Any) -> "BlendedTokens":
        """Return those at a numpy index: positions, a slice or a mask."""
        return BlendedTokens(**{f.name: getattr(self, f.name)[index] for f in fields(BlendedTokens)})


@dataclass(frozen=True, slots=True, kw_only=True)
class Round:
    """What became of B drafts of k tokens."""

    num_accepted: Ints
    """[B], drafts kept, those behind a stop token included."""
    replacement_ids: Ints
    """[B], -1 where nothing was redrawn."""
    num_emitted: npt.NDArray[np.int64]
    """[B] tokens up to the stop token: the drafts kept, and the one redrawn."""
    stopped: Bools
    """[B] whether the stop token is among them."""
    tokens: BlendedTokens
    """The emitted tokens, row by row."""


def verify_round(
    draft: Draft,
    scores: Scores,
    behaviour: BlendedBehaviour,
    *,
    num_drafted: npt.NDArray[Any],
    accept_and_replace: npt.NDArray[np.float64],
    stop_token_id: int,
) -> Round:
    """Verify a draft against the behaviour's law on the support and the tail.

    Args:
        draft: the student's.
        scores: the teacher's, at `draft.requested_ids`.
        behaviour: gives mu.
        num_drafted: [B] how many of the k drafts of each row count, at least 1.
        accept_and_replace: [B, k, 2] uniforms.
        stop_token_id: ends a row.
    """
    laws = _CoarseLaws.of(draft, scores)
    verdict = verify_target(
        torch.from_numpy(laws.outcomes),
        laws.student,
        behaviour.target(laws.student, laws.teacher),
        num_drafted=torch.from_numpy(np.asarray(num_drafted, np.int64)),
        uniforms=torch.from_numpy(accept_and_replace),
    )
    num_accepted, redrawn = verdict.num_accepted.numpy(), verdict.replacement_ids.numpy()
    length = draft.token_ids.shape[1]
    columns = np.arange(length)
    accepted = columns < num_accepted[:, None]
    outcomes = np.where(accepted, laws.outcomes, np.maximum(redrawn, 0)[:, None])
    token_ids = laws.pick(outcomes, accepted, draft.support_ids, draft.token_ids, draft.spare_ids)
    rows = np.arange(len(token_ids))
    replacement_ids = np.where(redrawn >= 0, token_ids[rows, np.minimum(num_accepted, length - 1)], -1)

    in_play = columns < (num_accepted + (redrawn >= 0))[:, None]
    stops = in_play & (token_ids == stop_token_id)
    stopped = stops.any(1)
    num_emitted = np.where(stopped, stops.argmax(1) + 1, in_play.sum(1))
    emitted = columns < num_emitted[:, None]
    return Round(
        num_accepted=num_accepted.astype(np.int32),
        replacement_ids=replacement_ids.astype(np.int32),
        num_emitted=num_emitted,
        stopped=stopped,
        tokens=_tokens(emitted, outcomes, accepted, token_ids, laws, verdict, draft, scores),
    )


def _tokens(
    emitted: Bools,
    outcomes: npt.NDArray[np.int64],
    accepted: Bools,
    token_ids: Ints,
    laws: "_CoarseLaws",
    verdict: Verdict,
    draft: Draft,
    scores: Scores,
) -> BlendedTokens:
    """Gather what is recorded of the emitted positions."""
    size = draft.support_ids.shape[-1]
    student_logprobs = laws.pick(outcomes, accepted, draft.support_logprobs, draft.token_logprobs, draft.spare_logprobs)
    teacher_logprobs = laws.pick(outcomes, accepted, laws.teacher_support, scores.token_logprobs, laws.teacher_spare)
    inner = np.where(outcomes < size, 0.0, student_logprobs - draft.tail_logprobs).astype(np.float32)
    return BlendedTokens(
        token_ids=token_ids[emitted],
        behaviour_logprobs=(verdict.behaviour_logprobs.numpy() + inner)[emitted],
        student_logprobs=student_logprobs[emitted],
        teacher_logprobs=teacher_logprobs[emitted],
        beta=verdict.beta.numpy()[emitted],
        divergence=verdict.divergence.numpy()[emitted],
        teacher_divergence=verdict.teacher_divergence.numpy()[emitted],
        accepted=accepted[emitted],
        support_ids=draft.support_ids[emitted],
        support_student_logprobs=draft.support_logprobs[emitted],
        support_teacher_logprobs=laws.teacher_support[emitted],
        student_tail_logprobs=draft.tail_logprobs[emitted],
        teacher_tail_logprobs=laws.teacher_tail[emitted],
    )


@dataclass(frozen=True, slots=True, kw_only=True)
class _CoarseLaws:
    """Both laws on K + 1 outcomes: the support's places, and K for the tail."""

    student: torch.Tensor
    """[B, k, K + 1]; [B, k, K] where there is no tail."""
    teacher: torch.Tensor
    """Likewise."""
    outcomes: npt.NDArray[np.int64]
    """[B, k] of the drafted tokens."""
    teacher_support: Floats
    """[B, k, K]."""
    teacher_spare: Floats
    """[B, k]."""
    teacher_tail: Floats
    """[B, k], the spare included."""

    @classmethod
    def of(cls, draft: Draft, scores: Scores) -> "_CoarseLaws":
        size = draft.support_ids.shape[-1]
        in_support = draft.support_ids == draft.token_ids[..., None]
        outcomes = np.where(in_support.any(-1), in_support.argmax(-1), size)
        if not draft.has_tail:
            return cls(
                student=torch.tensor(draft.support_logprobs), teacher=torch.tensor(scores.support_logprobs),
                outcomes=outcomes, teacher_support=scores.support_logprobs,
                teacher_spare=np.full_like(scores.tail_logprobs, -np.inf), teacher_tail=scores.tail_logprobs,
            )  # fmt: skip
        support, spare = scores.support_logprobs[..., :size], scores.support_logprobs[..., size]
        tail = np.logaddexp(scores.tail_logprobs, spare)
        return cls(
            student=torch.from_numpy(np.concatenate([draft.support_logprobs, draft.tail_logprobs[..., None]], -1)),
            teacher=torch.from_numpy(np.concatenate([support, tail[..., None]], -1)),
            outcomes=outcomes, teacher_support=support, teacher_spare=spare, teacher_tail=tail,
        )  # fmt: skip

    def pick(
        self,
        outcomes: npt.NDArray[np.int64],
        accepted: Bools,
        of_support: npt.NDArray[Any],
        of_draft: npt.NDArray[Any],
        of_spare: npt.NDArray[Any],
    ) -> npt.NDArray[Any]:
        """Return [B, k] values of the outcomes: the support's [B, k, K]; for the tail, the draft's or the spare's."""
        size = of_support.shape[-1]
        from_support = np.take_along_axis(of_support, np.minimum(outcomes, size - 1)[..., None], -1)[..., 0]
        return np.where(outcomes < size, from_support, np.where(accepted, of_draft, of_spare))
