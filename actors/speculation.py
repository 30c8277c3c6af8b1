"""Speculative sampling of a whole batch: the student drafts, the teacher scores, what is emitted is a draw from mu.

One round, for the sequences of a lane:

    student.draft  ->  teacher.score  ->  verify (here)  ->  student.commit, teacher.commit

Lanes take turns: while the teacher scores the drafts of one, the student drafts for the other. A sequence that ends
leaves its place to the next at once. Where either side is lost, the unfinished sequences are opened again with the
tokens they have, and the draws, which are counter-based, go on as they would have.
"""

import time
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import Protocol

import numpy as np
import numpy.typing as npt

from actors.behaviours import BlendedBehaviour
from actors.draft_length import DraftLength, Observation
from actors.engines.protocol import Draft, Ints, Scores, SequenceRequest
from actors.meter import Meter
from actors.random_numbers import Purpose, keyed_uniforms, prompt_keys
from actors.verification import BlendedTokens, Round, verify_round

_MIN_LANE_ROWS = 16
"""Smaller lanes would cost more in small forwards than overlap gains."""


@dataclass(frozen=True, slots=True)
class Timed:
    """What one side returned, how long it was at work, and what was sent for it."""

    value: Draft | Scores
    seconds: float
    wire_bytes: int = 0


class Pending(Protocol):
    """A call on its way."""

    def result(self) -> Timed:
        """Wait for it."""


class Side(Protocol):
    """One model's side of a rollout: an engine in this process or an actor elsewhere. Calls are served in order.

    Methods raise `SideLostError` where the sequences are gone.
    """

    def open(self, requests: Sequence[SequenceRequest], lane: int) -> list[int]:
        """Admit sequences and return their handles."""

    def commit(self, sequences: Sequence[int], num_accepted: Ints, replacement_ids: Ints) -> None:
        """Settle the last draft or score."""

    def close(self, sequences: Sequence[int]) -> None:
        """Forget sequences; unknown ones are none."""

    def finish(self) -> None:
        """Nothing more will be asked; whatever is still open is closed."""

    def recover(self) -> None:
        """Wait until the side can open sequences again; what was open is forgotten."""


class StudentSide(Side, Protocol):
    """The side that drafts."""

    def draft(self, sequences: Sequence[int], num_tokens: int) -> Pending:
        """Ask for a `Draft`."""


class TeacherSide(Side, Protocol):
    """The side that scores."""

    def score(self, sequences: Sequence[int], draft: Pending) -> Pending:
        """Ask for the `Scores` of a draft that may still be on its way."""


class SideLostError(Exception):
    """A model's side died, or no longer knows its sequences."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Sampled:
    """All sequences of a batch, N of them, with their tokens one after another."""

    tokens: BlendedTokens
    """Of all sequences, in the order of the requests."""
    bounds: npt.NDArray[np.int64]
    """[N + 1] where each sequence's tokens begin and end."""
    stopped: npt.NDArray[np.bool_]
    """[N] whether the stop token was drawn."""


@dataclass(slots=True)
class _Lane:
    number: int
    rows: npt.NDArray[np.int64] = field(default_factory=lambda: np.zeros(0, np.int64))
    """Sequences at work, by their place in the batch."""
    length: int = 0
    draft: Pending | None = None
    scores: Pending | None = None


class Speculation:
    """Samples one batch of requests from a blend of student and teacher."""

    def __init__(
        self,
        student: StudentSide,
        teacher: TeacherSide,
        *,
        behaviour: BlendedBehaviour,
        draft_length: DraftLength,
        seed: int,
        stop_token_id: int,
        max_num_sequences: int,
        overlap: bool = False,
        max_recoveries: int = 3,
    ) -> None:
        """Nothing is sent yet.

        Args:
            student: drafts.
            teacher: scores.
            behaviour: the law of every token.
            draft_length: chooses k, round by round.
            seed: of the run's random numbers.
            stop_token_id: the token that ends a completion.
            max_num_sequences: how many sequences are open at once.
            overlap: whether to work in two lanes where there are enough sequences.
            max_recoveries: how often a lost side is taken up again.
        """
        self._student, self._teacher = student, teacher
        self._behaviour, self._draft_length = behaviour, draft_length
        self._seed, self._stop = seed, stop_token_id
        self._max_num_sequences, self._overlap, self._max_recoveries = max_num_sequences, overlap, max_recoveries
        self.meter = Meter()

    def run(self, requests: Sequence[SequenceRequest]) -> Sampled:
        """Sample every request to its end.

        Raises:
            SideLostError: if a side is lost more often than allowed.
        """
        self._begin(requests)
        recoveries = 0
        try:
            while self._waiting or any(len(lane.rows) for lane in self._lanes):
                try:
                    self._take_turns()
                except SideLostError:
                    recoveries += 1
                    if recoveries > self._max_recoveries:
                        raise
                    self._recover()
        finally:
            for side in (self._student, self._teacher):
                side.finish()
        return self._collected()

    def _take_turns(self) -> None:
        for lane in self._lanes:
            self._finish_round(lane)
            self._admit(lane)
            self._start_round(lane)

    def _begin(self, requests: Sequence[SequenceRequest]) -> None:
        count = len(requests)
        self._requests, self._given = list(requests), [request.completion_ids for request in requests]
        self._keys = prompt_keys(self._seed, [request.prompt_id for request in requests])
        self._samples = np.array([request.sample_index for request in requests], np.int64)
        self._limits = np.array([request.max_new_tokens for request in requests], np.int64)
        self._num_tokens = np.array([len(ids) for ids in self._given], np.int64)
        self._stopped = np.zeros(count, np.bool_)
        self._student_handles, self._teacher_handles = np.zeros(count, np.int64), np.zeros(count, np.int64)
        self._waiting = np.flatnonzero(self._num_tokens < self._limits).tolist()
        self._emitted: list[tuple[npt.NDArray[np.int64], BlendedTokens]] = []
        at_once = min(count + count % 2, self._max_num_sequences)
        num_lanes = 2 if self._overlap and at_once >= 2 * _MIN_LANE_ROWS else 1
        self._lanes = [_Lane(number) for number in range(num_lanes)]
        self._lane_capacity = at_once // num_lanes

    def _admit(self, lane: _Lane) -> None:
        """Open waiting sequences in the lane's free places."""
        free = self._lane_capacity - len(lane.rows)
        if not free or not self._waiting:
            return
        rows, self._waiting = np.array(self._waiting[:free]), self._waiting[free:]
        lane.rows = np.concatenate([lane.rows, rows])
        requests = [self._requests[row] for row in rows]
        self._student_handles[rows] = self._student.open(requests, lane.number)
        self._teacher_handles[rows] = self._teacher.open(requests, lane.number)

    def _start_round(self, lane: _Lane) -> None:
        rows = lane.rows
        if not len(rows):
            return
        longest = int((self._limits - self._num_tokens)[rows].max())
        lane.length = min(self._draft_length.choose(len(rows)), longest)
        lane.draft = self._student.draft(self._student_handles[rows].tolist(), lane.length)
        lane.scores = self._teacher.score(self._teacher_handles[rows].tolist(), lane.draft)

    def _finish_round(self, lane: _Lane) -> None:
        if lane.draft is None or lane.scores is None:
            return
        drafted, scored = lane.draft.result(), lane.scores.result()
        lane.draft = lane.scores = None
        began = time.perf_counter()
        draft, scores, rows = drafted.value, scored.value, lane.rows
        assert isinstance(draft, Draft)
        assert isinstance(scores, Scores)
        left = (self._limits - self._num_tokens)[rows]
        outcome = verify_round(
            draft,
            scores,
            self._behaviour,
            num_drafted=np.minimum(left, lane.length),
            accept_and_replace=self._uniforms(rows, lane.length),
            stop_token_id=self._stop,
        )
        counts = outcome.num_emitted
        self._emitted.append((np.repeat(rows, counts), outcome.tokens))
        self._num_tokens[rows] += counts
        self._stopped[rows] = outcome.stopped
        ended = outcome.stopped | (self._num_tokens[rows] >= self._limits[rows])
        self._settle(lane, outcome, ended)
        self._measure(lane.length, len(rows), outcome, drafted, scored, time.perf_counter() - began)

    def _settle(self, lane: _Lane, outcome: Round, ended: npt.NDArray[np.bool_]) -> None:
        """Tell both sides what was kept and what has ended."""
        going, rows = ~ended, lane.rows
        for side, handles in ((self._student, self._student_handles), (self._teacher, self._teacher_handles)):
            if going.any():
                kept = handles[rows[going]].tolist()
                side.commit(kept, outcome.num_accepted[going], outcome.replacement_ids[going])
            if ended.any():
                side.close(handles[rows[ended]].tolist())
        lane.rows = rows[going]

    def _measure(
        self, length: int, num_rows: int, outcome: Round, drafted: Timed, scored: Timed, round_s: float
    ) -> None:
        self._draft_length.observe(
            Observation(
                num_rows=num_rows,
                draft_length=length,
                num_accepted=int(outcome.tokens.accepted.sum()),
                num_refused=int((~outcome.tokens.accepted).sum()),
                student_s=drafted.seconds,
                teacher_s=scored.seconds,
                round_s=round_s,
            )
        )
        self.meter += Meter(
            num_tokens=int(outcome.num_emitted.sum()),
            num_drafted=num_rows * length,
            num_passes=num_rows,
            num_scored=num_rows * length,
            student_s=drafted.seconds,
            teacher_s=scored.seconds,
            wire_bytes=drafted.wire_bytes + scored.wire_bytes,
        )

    def _recover(self) -> None:
        """Open every unfinished sequence again, with the tokens it has."""
        lost = sorted(int(row) for lane in self._lanes for row in lane.rows)
        for side in (self._student, self._teacher):
            side.recover()
        if self._emitted:
            sampled = self._collected()
            for row in lost:
                ids = sampled.tokens.token_ids[sampled.bounds[row] : sampled.bounds[row + 1]]
                completion_ids = (*self._given[row], *ids.tolist())
                self._requests[row] = replace(self._requests[row], completion_ids=completion_ids)
        self._waiting = lost + self._waiting
        self._lanes = [_Lane(lane.number) for lane in self._lanes]
        self.meter.num_reopened += len(lost)

    def _collected(self) -> Sampled:
        """Bring the tokens of all rounds into the order of the requests."""
        if not self._emitted:
            raise ValueError("at least one sequence must have a token to be sampled, got none")
        rows = np.concatenate([rows for rows, _ in self._emitted])
        order = np.argsort(rows, kind="stable")
        tokens = BlendedTokens.joined([tokens for _, tokens in self._emitted]).at(order)
        bounds = np.searchsorted(rows[order], np.arange(len(self._requests) + 1))
        return Sampled(tokens=tokens, bounds=bounds, stopped=self._stopped)

    def _uniforms(self, rows: npt.NDArray[np.int64], length: int) -> npt.NDArray[np.float64]:
        """[B, length, 2]."""
        each = np.repeat(rows, length)
        positions = (self._num_tokens[rows][:, None] + np.arange(length)).reshape(-1)
        draws = [
            keyed_uniforms(self._keys[each], self._samples[each], positions, purpose)
            for purpose in (Purpose.ACCEPT, Purpose.REPLACE)
        ]
        return np.stack(draws, -1).reshape(len(rows), length, 2)
