"""The blending service: an actor that drives students and teachers, each in actors of their own, through a rollout.

The round itself is in actors/speculation.py, the verification in actors/verification.py, mu in actors/trust_region.py.
Here are the messages: ids go from student to teacher, log-probs of both come back to the service, all as Arrow.
"""

import threading
import time
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import pyarrow as pa
import ray
import torch
from ray.exceptions import RayError

from actors.behaviours import BlendedBehaviour
from actors.config import BlenderSection
from actors.draft_length import AdaptiveLength, DraftLength, FixedLength, MeasuredLength
from actors.engines.protocol import Draft, Ints, Scores, SequenceRequest, Settlement
from actors.experience import (
    BlendTrace,
    Completion,
    Prompt,
    Rollout,
    TeacherScores,
    requests_from_arrow,
    rollouts_to_arrow,
    sequence_requests_to_arrow,
)
from actors.failures import is_loss, root_cause
from actors.meter import metered
from actors.speculation import Pending, Sampled, SideLostError, Speculation, Timed
from actors.student import sequence_requests
from actors.tokenizer import load_tokenizer
from actors.weights import PolicyWeights
from actors.wire import from_arrow, seconds_of

_LANES_OF_A_STUDENT = 2
_RESTART_DEADLINE_S = 300.0
_RESTART_POLL_S = 0.5


def draft_length_of(section: BlenderSection, behaviour: BlendedBehaviour) -> DraftLength:
    """Return what chooses the draft length of one batch."""
    if section.draft_length == "adaptive":
        return AdaptiveLength(section.costs, prior=behaviour.expected_acceptance)
    if section.draft_length == "measured":
        return MeasuredLength(prior=behaviour.expected_acceptance)
    return FixedLength(length=section.draft_length)


class BlendingService:
    """Drives one student and one teacher actor at a time through a batch of sequences."""

    def __init__(
        self, name: str, *, model: str, seed: int, stop_token_id: int, threads: int, section: BlenderSection
    ) -> None:
        torch.set_num_threads(threads)
        self._name, self._seed, self._stop, self._section = name, seed, stop_token_id, section
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
        behaviour: BlendedBehaviour,
        max_new_tokens: int,
        *,
        student_number: int,
        max_num_sequences: int,
    ) -> pa.RecordBatch:
        """Sample every request to its end from mu, and return complete rollouts with the teacher's scores.

        Rollouts of one student take turns, so that its weights stay what they are while it drafts.

        Args:
            requests: made by `requests_to_arrow`.
            student: a `StudentActor`.
            teacher: a `TeacherActor`.
            weights: that the student drafts with.
            behaviour: gives mu.
            max_new_tokens: longest completion.
            student_number: gives the student lanes of its own in the teacher.
            max_num_sequences: how many sequences are open at once.

        Raises:
            SideLostError: if student or teacher is lost too often, or stays away.
        """
        with self._turns[repr(student)]:
            ours = RemoteStudent(student, weights)
            speculation = Speculation(
                ours,
                RemoteTeacher(teacher, first_lane=student_number * _LANES_OF_A_STUDENT),
                behaviour=behaviour,
                draft_length=draft_length_of(self._section, behaviour),
                seed=self._seed,
                stop_token_id=self._stop,
                max_num_sequences=max_num_sequences,
                overlap=self._section.overlap,
            )
            asked = requests_from_arrow(requests)
            sampled = speculation.run(sequence_requests(asked, max_new_tokens))
            rollouts = blended_rollouts(asked, sampled, behaviour, ours.policy_version, self._tokenizer)
        return metered(rollouts, speculation.meter)


def blended_rollouts(
    asked: Sequence[tuple[Prompt, int]],
    sampled: Sampled,
    behaviour: BlendedBehaviour,
    policy_version: int,
    tokenizer: Any,
) -> pa.RecordBatch:
    """Return the complete rollouts of a batch that was sampled to its end."""
    spans = [slice(*bounds) for bounds in zip(sampled.bounds[:-1], sampled.bounds[1:], strict=True)]
    ids = sampled.tokens.token_ids
    texts = tokenizer.batch_decode([ids[span].tolist() for span in spans], skip_special_tokens=True)
    rollouts = []
    for (prompt, index), span, text, stopped in zip(asked, spans, texts, sampled.stopped, strict=True):
        tokens = sampled.tokens.at(span)
        count = len(tokens.token_ids)
        rollouts.append(
            Rollout(
                prompt=prompt,
                sample_index=index,
                text=text,
                completion=Completion(
                    token_ids=tokens.token_ids,
                    behaviour_logprobs=tokens.behaviour_logprobs,
                    student_logprobs=tokens.student_logprobs,
                    finish_reason="stop" if stopped else "length",
                    policy_versions=np.full(count, policy_version, np.int32),
                ),
                blend=BlendTrace(
                    epsilon=np.full(count, behaviour.epsilon, np.float32),
                    beta=tokens.beta,
                    divergence=tokens.divergence,
                    teacher_divergence=tokens.teacher_divergence,
                    teacher_logprobs=tokens.teacher_logprobs,
                    accepted=tokens.accepted,
                ),
                teacher=TeacherScores(
                    support_ids=tokens.support_ids,
                    student_logprobs=tokens.support_student_logprobs,
                    student_tail_logprobs=tokens.student_tail_logprobs,
                    teacher_logprobs=tokens.support_teacher_logprobs,
                    teacher_tail_logprobs=tokens.teacher_tail_logprobs,
                ),
            )
        )
    return rollouts_to_arrow(rollouts)


@dataclass(frozen=True, slots=True)
class RemoteDraft:
    """A draft on its way from a student actor."""

    ids: Any
    """Reference to `DraftedIds`."""
    logprobs: Any
    """Reference to `DraftedLogprobs`."""

    def result(self) -> Timed:
        """Wait for it. Its ids count twice, since they go to the teacher as well."""
        ids, logprobs = _get([self.ids, self.logprobs])
        draft = from_arrow(Draft, ids, logprobs)
        return Timed(draft, seconds_of(logprobs), 2 * ids.nbytes + logprobs.nbytes)


@dataclass(frozen=True, slots=True)
class RemoteScores:
    """Scores on their way from a teacher actor."""

    scores: Any

    def result(self) -> Timed:
        """Wait for them."""
        (scores,) = _get([self.scores])
        return Timed(from_arrow(Scores, scores), seconds_of(scores), scores.nbytes)


class _RemoteSide:
    """What both sides share: handles of open sequences, and an actor that may die and be started again."""

    def __init__(self, actor: Any, first_lane: int) -> None:
        self._actor, self._first_lane = actor, first_lane
        self._open: set[int] = set()
        self._settled: list[Settlement] = []
        """What the actor is told with the next call."""

    def open(self, requests: Sequence[SequenceRequest], lane: int) -> list[int]:
        (handles,) = _get(
            [self._actor.open.remote(sequence_requests_to_arrow(requests), self._first_lane + lane, self._told())]
        )
        self._open.update(handles)
        return list(handles)

    def commit(self, sequences: Sequence[int], num_accepted: Ints, replacement_ids: Ints) -> None:
        settlement = Settlement(sequences=tuple(sequences), num_accepted=num_accepted, replacement_ids=replacement_ids)
        self._settled.append(settlement)

    def close(self, sequences: Sequence[int]) -> None:
        self._settled.append(Settlement(sequences=tuple(sequences)))

    def finish(self) -> None:
        # All of them once more: what was told with a call that failed may not have been heard.
        self._actor.settle.remote([Settlement(sequences=tuple(self._open))])
        self._open.clear()
        self._settled.clear()

    def _told(self) -> list[Settlement]:
        settled, self._settled = self._settled, []
        return settled

    def recover(self) -> None:
        deadline = time.monotonic() + _RESTART_DEADLINE_S
        while True:
            try:
                self._revive()
                break
            except SideLostError:
                if time.monotonic() > deadline:
                    raise
                time.sleep(_RESTART_POLL_S)
        self.finish()

    def _revive(self) -> None:
        _get([self._actor.ready.remote()])


class RemoteStudent(_RemoteSide):
    """A `StudentActor` for the length of one rollout."""

    def __init__(self, actor: Any, weights: PolicyWeights) -> None:
        super().__init__(actor, first_lane=0)
        self._weights = weights
        self.policy_version = -1
        """Of the weights that draft."""
        self.recover()

    def draft(self, sequences: Sequence[int], num_tokens: int) -> RemoteDraft:
        """Ask for a draft."""
        return RemoteDraft(*self._actor.draft.options(num_returns=2).remote(sequences, num_tokens, self._told()))

    def _revive(self) -> None:
        (self.policy_version,) = _get([self._actor.begin.remote(self._weights)])


class RemoteTeacher(_RemoteSide):
    """A `TeacherActor` for the length of one rollout; other rollouts may use it at the same time."""

    def score(self, sequences: Sequence[int], draft: Pending) -> RemoteScores:
        """Ask for scores; the draft's ids go from the student straight to the teacher."""
        assert isinstance(draft, RemoteDraft)
        return RemoteScores(self._actor.score.remote(sequences, draft.ids, self._told()))


def _get(refs: list[Any]) -> list[Any]:
    """Wait for calls.

    Raises:
        SideLostError: where an actor died, or was started anew and knows nothing of its sequences.
    """
    try:
        return list(ray.get(refs))
    except RayError as error:
        if is_loss(error):
            raise SideLostError(str(root_cause(error)).splitlines()[0]) from error
        raise
