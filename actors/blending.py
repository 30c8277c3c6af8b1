"""The blending service: students draft, a teacher scores, and each emitted token is an exact draw from mu.

One round, for B sequences:

    student.draft  ->  teacher.score  ->  blend and verify (here)  ->  student.commit, teacher.commit

The laws are compared on the student's K likeliest ids plus one *tail* outcome, whose inner law is left to the student.
On these K + 1 outcomes mu is a real distribution, and its divergence from the student is that of the full law, so
the budget holds exactly for every K; with K = V it is the full blend. A tail outcome that has to be redrawn takes the
student's spare draw.
"""

import threading
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import ray
import torch

from actors.engines.protocol import Draft, Floats, Ints, Scores
from actors.experience import (
    BlendTrace,
    Completion,
    Prompt,
    Rollout,
    TeacherScores,
    requests_from_arrow,
    rollouts_to_arrow,
)
from actors.random_numbers import Purpose, uniforms
from actors.tokenizer import load_tokenizer
from actors.trust_region import verify_draft
from actors.weights import PolicyWeights
from actors.wire import from_arrow


@dataclass(frozen=True, slots=True, kw_only=True)
class Round:
    """What one round emitted, for B sequences; position j of row b counts only where j < num_emitted[b]."""

    num_accepted: Ints
    """[B]."""
    replacement_ids: Ints
    """[B], -1 where nothing was redrawn."""
    num_emitted: Ints
    """[B] num_accepted, and one more where a token was redrawn."""
    token_ids: Ints
    """[B, k]."""
    behaviour_logprobs: Floats
    """[B, k]."""
    student_logprobs: Floats
    """[B, k] of the emitted tokens."""
    teacher_logprobs: Floats
    """[B, k] of the emitted tokens."""
    accepted: npt.NDArray[np.bool_]
    """[B, k]."""
    beta: Floats
    """[B, k]."""
    divergence: Floats
    """[B, k] nats."""
    support_teacher_logprobs: Floats
    """[B, k, K]."""
    teacher_tail_logprobs: Floats
    """[B, k]."""


def blend_draft(
    draft: Draft,
    scores: Scores,
    epsilon: float,
    *,
    num_drafted: Ints,
    accept_and_replace: npt.NDArray[np.float64],
) -> Round:
    """Verify a draft against the blend of both laws on the support and the tail.

    Args:
        draft: the student's.
        scores: the teacher's, at `draft.requested_ids`.
        epsilon: budget in nats.
        num_drafted: [B] how many of the k drafts of each row count, at least 1.
        accept_and_replace: [B, k, 2] uniforms.
    """
    size = draft.support_ids.shape[-1]
    teacher_support, teacher_tail = scores.support_logprobs, scores.tail_logprobs
    teacher_spare = np.full_like(teacher_tail, -np.inf)
    if draft.has_tail:
        teacher_support, teacher_spare = scores.support_logprobs[..., :size], scores.support_logprobs[..., size]
        teacher_tail = np.logaddexp(teacher_tail, teacher_spare)
    student_law = np.concatenate([draft.support_logprobs, draft.tail_logprobs[..., None]], -1)
    teacher_law = np.concatenate([teacher_support, teacher_tail[..., None]], -1)
    in_support = draft.support_ids == draft.token_ids[..., None]
    outcomes = np.where(in_support.any(-1), in_support.argmax(-1), size)

    verdict = verify_draft(
        torch.tensor(outcomes),
        torch.tensor(student_law),
        torch.tensor(teacher_law),
        epsilon,
        num_drafted=torch.tensor(num_drafted),
        uniforms=torch.tensor(accept_and_replace),
    )
    num_accepted = verdict.num_accepted.numpy().astype(np.int32)
    redrawn = verdict.replacement_ids.numpy()
    accepted = np.arange(outcomes.shape[1]) < num_accepted[:, None]
    emitted = np.where(accepted, outcomes, np.maximum(redrawn, 0)[:, None])

    def of_emitted(support: npt.NDArray[Any], drafted: npt.NDArray[Any], spare: npt.NDArray[Any]) -> npt.NDArray[Any]:
        from_support = np.take_along_axis(support, np.minimum(emitted, size - 1)[..., None], -1)[..., 0]
        return np.where(emitted < size, from_support, np.where(accepted, drafted, spare))

    token_ids = of_emitted(draft.support_ids, draft.token_ids, draft.spare_ids)
    student_logprobs = of_emitted(draft.support_logprobs, draft.token_logprobs, draft.spare_logprobs)
    teacher_logprobs = of_emitted(teacher_support, scores.token_logprobs, teacher_spare)
    inner = np.where(emitted < size, 0.0, student_logprobs - draft.tail_logprobs).astype(np.float32)
    first_refused = np.minimum(num_accepted, outcomes.shape[1] - 1)
    replacement_ids = np.where(redrawn >= 0, token_ids[np.arange(len(token_ids)), first_refused], -1)
    return Round(
        num_accepted=num_accepted,
        replacement_ids=replacement_ids.astype(np.int32),
        num_emitted=num_accepted + (redrawn >= 0).astype(np.int32),
        token_ids=token_ids,
        behaviour_logprobs=verdict.behaviour_logprobs.numpy() + inner,
        student_logprobs=student_logprobs,
        teacher_logprobs=teacher_logprobs,
        accepted=accepted,
        beta=verdict.beta.numpy(),
        divergence=verdict.divergence.numpy(),
        support_teacher_logprobs=teacher_support,
        teacher_tail_logprobs=teacher_tail,
    )


@dataclass(slots=True)
class _Row:
    """One sequence on its way: its pieces, as (round, draft, row within them, tokens emitted)."""

    prompt: Prompt
    sample_index: int
    student: int
    teacher: int
    pieces: list[tuple[Round, Draft, int, int]]
    num_tokens: int = 0
    finish_reason: str = ""


class BlendingService:
    """Drives one student and one teacher actor at a time through a batch of sequences."""

    def __init__(self, name: str, *, model: str, seed: int, stop_token_id: int, threads: int) -> None:
        torch.set_num_threads(threads)
        self._name, self._seed, self._stop = name, seed, stop_token_id
        self._tokenizer = load_tokenizer(model)
        self._turns: defaultdict[str, threading.Lock] = defaultdict(threading.Lock)

    def __repr__(self) -> str:
        return self._name

    def ready(self) -> str:
        """Return the actor's name."""
        return self._name

    def rollout(
        self,
        requests: pa.RecordBatch,
        student: Any,
        teacher: Any,
        weights: PolicyWeights,
        epsilon: float,
        max_new_tokens: int,
        draft_length: int,
    ) -> pa.RecordBatch:
        """Sample every request to its end from mu, and return complete rollouts with the teacher's scores.

        Rollouts of one student take turns, so that its weights stay what they are while it drafts.
        """
        with self._turns[repr(student)]:
            return self._rollout(requests, student, teacher, weights, epsilon, max_new_tokens, draft_length)

    def _rollout(
        self,
        requests: pa.RecordBatch,
        student: Any,
        teacher: Any,
        weights: PolicyWeights,
        epsilon: float,
        max_new_tokens: int,
        draft_length: int,
    ) -> pa.RecordBatch:
        (student_handles, version), teacher_handles = ray.get(
            [student.open.remote(requests, weights, max_new_tokens), teacher.open.remote(requests, max_new_tokens)]
        )
        rows = [
            _Row(prompt, index, ours, theirs, [])
            for (prompt, index), ours, theirs in zip(
                requests_from_arrow(requests), student_handles, teacher_handles, strict=True
            )
        ]
        active = rows
        try:
            while active:
                active = self._advance(active, student, teacher, epsilon, max_new_tokens, draft_length)
        except BaseException:
            teacher.close.remote([row.teacher for row in rows])
            raise
        return self._rollouts(rows, epsilon, version)

    def _advance(
        self, rows: list[_Row], student: Any, teacher: Any, epsilon: float, max_new_tokens: int, draft_length: int
    ) -> list[_Row]:
        """One round; return the rows that go on."""
        ours, theirs = [row.student for row in rows], [row.teacher for row in rows]
        left = np.array([max_new_tokens - row.num_tokens for row in rows], np.int32)
        length = min(draft_length, int(left.max()))
        draft_ref = student.draft.remote(ours, length)
        scores_ref = teacher.score.remote(theirs, draft_ref)
        draft_batch, scores_batch = ray.get([draft_ref, scores_ref])
        draft, scores = from_arrow(Draft, draft_batch), from_arrow(Scores, scores_batch)
        outcome = blend_draft(
            draft,
            scores,
            epsilon,
            num_drafted=np.minimum(left, length),
            accept_and_replace=self._uniforms(rows, length),
        )
        student.commit.remote(ours, outcome.num_accepted, outcome.replacement_ids)
        teacher.commit.remote(theirs, outcome.num_accepted, outcome.replacement_ids)
        for i, row in enumerate(rows):
            emitted = outcome.token_ids[i, : outcome.num_emitted[i]]
            stops = np.flatnonzero(emitted == self._stop)
            count = int(stops[0]) + 1 if len(stops) else len(emitted)
            row.pieces.append((outcome, draft, i, count))
            row.num_tokens += count
            row.finish_reason = "stop" if len(stops) else "length" if row.num_tokens == max_new_tokens else ""
        ended = [row for row in rows if row.finish_reason]
        if ended:
            student.close.remote([row.student for row in ended])
            teacher.close.remote([row.teacher for row in ended])
        return [row for row in rows if not row.finish_reason]

    def _uniforms(self, rows: Sequence[_Row], length: int) -> npt.NDArray[np.float64]:
        """[B, length, 2]."""
        prompt_ids = [row.prompt.prompt_id for row in rows for _ in range(length)]
        samples = [row.sample_index for row in rows for _ in range(length)]
        positions = [row.num_tokens + j for row in rows for j in range(length)]
        draws = [uniforms(self._seed, prompt_ids, samples, positions, p) for p in (Purpose.ACCEPT, Purpose.REPLACE)]
        return np.stack(draws, -1).reshape(len(rows), length, 2)

    def _rollouts(self, rows: Sequence[_Row], epsilon: float, version: int) -> pa.RecordBatch:
        completions = [_joined(row, epsilon, version) for row in rows]
        texts = self._tokenizer.batch_decode(
            [completion.token_ids.tolist() for completion, _, _ in completions], skip_special_tokens=True
        )
        return rollouts_to_arrow(
            [
                Rollout(
                    prompt=row.prompt,
                    sample_index=row.sample_index,
                    completion=completion,
                    text=text,
                    blend=blend,
                    teacher=teacher,
                )
                for row, (completion, blend, teacher), text in zip(rows, completions, texts, strict=True)
            ]
        )


def _joined(row: _Row, epsilon: float, version: int) -> tuple[Completion, BlendTrace, TeacherScores]:
    """Put the pieces of one sequence together."""

    def of_round(name: str) -> npt.NDArray[Any]:
        return np.concatenate([getattr(piece, name)[i, :n] for piece, _, i, n in row.pieces])

    def of_draft(name: str) -> npt.NDArray[Any]:
        return np.concatenate([getattr(draft, name)[i, :n] for _, draft, i, n in row.pieces])

    completion = Completion(
        token_ids=of_round("token_ids"),
        behaviour_logprobs=of_round("behaviour_logprobs"),
        student_logprobs=of_round("student_logprobs"),
        finish_reason=row.finish_reason,
        policy_versions=np.full(row.num_tokens, version, np.int32),
    )
    blend = BlendTrace(
        epsilon=np.full(row.num_tokens, epsilon, np.float32),
        beta=of_round("beta"),
        divergence=of_round("divergence"),
        teacher_logprobs=of_round("teacher_logprobs"),
        accepted=of_round("accepted"),
    )
    teacher = TeacherScores(
        support_ids=of_draft("support_ids"),
        student_logprobs=of_draft("support_logprobs"),
        student_tail_logprobs=of_draft("tail_logprobs"),
        teacher_logprobs=of_round("support_teacher_logprobs"),
        teacher_tail_logprobs=of_round("teacher_tail_logprobs"),
    )
    return completion, blend, teacher
