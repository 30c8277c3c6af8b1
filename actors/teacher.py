"""The actor around the frozen teacher's engine: it scores what students draft, and finished completions."""

from collections.abc import Sequence
from dataclasses import replace
from functools import cached_property

import numpy as np
import pyarrow as pa

from actors.engines.build import EngineSpec, build_engine
from actors.engines.protocol import Draft, Engine, Ints, SequenceEngine
from actors.experience import BlendTrace, Rollout, requests_from_arrow, rollouts_from_arrow, rollouts_to_arrow
from actors.student import sequence_requests
from actors.wire import from_arrow, to_arrow


class TeacherActor:
    """Scores requested ids at requested positions; it samples nothing."""

    def __init__(self, name: str, spec: EngineSpec) -> None:
        self._name, self._spec = name, spec

    def __repr__(self) -> str:
        return self._name

    @cached_property
    def _engine(self) -> Engine:
        # Built by the first call and not by the constructor, so that what it raises reaches the caller as it is.
        return build_engine(self._spec)

    def ready(self) -> str:
        """Load the model; return the actor's name."""
        assert self._engine.policy_version >= 0
        return self._name

    def open(self, requests: pa.RecordBatch, max_new_tokens: int) -> list[int]:
        """Admit sequences and return their handles."""
        return self._sequences.open(sequence_requests(requests_from_arrow(requests), max_new_tokens))

    def score(self, sequences: Sequence[int], draft: pa.RecordBatch) -> pa.RecordBatch:
        """Return `Scores` of a `Draft` at its support and, where there is a tail, at its spare as one column more."""
        drafted = from_arrow(Draft, draft)
        return to_arrow(self._sequences.score(sequences, drafted.token_ids, drafted.requested_ids))

    def commit(self, sequences: Sequence[int], num_accepted: Ints, replacement_ids: Ints) -> None:
        """Settle the last score (see `SequenceEngine.commit`)."""
        self._sequences.commit(sequences, num_accepted, replacement_ids)

    def close(self, sequences: Sequence[int]) -> None:
        """Forget the sequences."""
        self._sequences.close(sequences)

    def score_rollouts(self, rollouts: pa.RecordBatch) -> pa.RecordBatch:
        """Return finished rollouts with the teacher's part filled, at each position's support."""
        given = rollouts_from_arrow(rollouts)
        supports = [rollout.teacher.support_ids for rollout in given if rollout.teacher is not None]
        assert len(supports) == len(given), "rollouts sent to a teacher carry a support"
        scores = self._engine.score_completions(
            [rollout.prompt.token_ids for rollout in given],
            [rollout.completion.token_ids for rollout in given],
            supports,
        )
        scored: list[Rollout] = []
        for rollout, score in zip(given, scores, strict=True):
            assert rollout.teacher is not None
            zeros = np.zeros(rollout.completion.num_tokens, np.float32)
            scored.append(
                replace(
                    rollout,
                    blend=BlendTrace(
                        epsilon=zeros,
                        beta=zeros,
                        divergence=zeros,
                        teacher_logprobs=score.token_logprobs[0],
                        accepted=np.ones(len(zeros), np.bool_),
                    ),
                    teacher=replace(
                        rollout.teacher,
                        teacher_logprobs=score.support_logprobs[0],
                        teacher_tail_logprobs=score.tail_logprobs[0],
                    ),
                )
            )
        return rollouts_to_arrow(scored)

    @property
    def _sequences(self) -> SequenceEngine:
        return self._engine  # type: ignore[return-value]
