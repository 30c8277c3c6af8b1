"""The actor around the frozen teacher's engine: it scores what students draft, and finished completions."""

import time
from collections.abc import Sequence
from dataclasses import replace
from functools import cached_property

import numpy as np
import pyarrow as pa

from actors.engines.build import EngineSpec, build_engine
from actors.engines.protocol import DraftedIds, Engine, Scores, SequenceEngine, Settlement
from actors.experience import (
    BlendTrace,
    Rollout,
    rollouts_from_arrow,
    rollouts_to_arrow,
    sequence_requests_from_arrow,
)
from actors.head import PLAIN, Decoding
from actors.meter import Meter, metered
from actors.student import likeliest
from actors.wire import from_arrow, timed, to_arrow


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

    def likeliest(self, requests: pa.RecordBatch) -> list[list[int]]:
        """Return the support's ids at the position after each prompt."""
        return likeliest(self._engine, requests)

    def open(self, requests: pa.RecordBatch, lane: int, settled: Sequence[Settlement]) -> list[int]:
        """Settle what is past, admit sequences and return their handles."""
        self.settle(settled)
        return self._sequences.open(sequence_requests_from_arrow(requests), lane)

    def score(self, sequences: Sequence[int], drafted: pa.RecordBatch, settled: Sequence[Settlement]) -> pa.RecordBatch:
        """Settle what is past; return `Scores` of `DraftedIds` at the ids they request."""
        began = time.perf_counter()
        self.settle(settled)
        ids = from_arrow(DraftedIds, drafted)
        scores = to_arrow(self._sequences.score(sequences, ids.token_ids, ids.requested))
        return timed(scores, time.perf_counter() - began)

    def settle(self, settled: Sequence[Settlement]) -> None:
        """Commit and close sequences, in this order."""
        for settlement in settled:
            settlement.apply(self._sequences)

    def score_rollouts(self, rollouts: pa.RecordBatch, decoding: Decoding = PLAIN) -> pa.RecordBatch:
        """Return finished rollouts with the teacher's part filled, at each position's support.

        Args:
            rollouts: of the student alone.
            decoding: how they were drawn.
        """
        began = time.perf_counter()
        given = rollouts_from_arrow(rollouts)
        supports = [rollout.teacher.support_ids for rollout in given if rollout.teacher is not None]
        assert len(supports) == len(given), "rollouts sent to a teacher carry a support"
        scores = self._engine.score_completions(
            [rollout.prompt.token_ids for rollout in given],
            [rollout.completion.token_ids for rollout in given],
            supports,
        )
        scored = rollouts_to_arrow(
            [_scored(rollout, score, decoding) for rollout, score in zip(given, scores, strict=True)]
        )
        scored = scored.replace_schema_metadata({**rollouts.schema.metadata, **scored.schema.metadata})
        meter = Meter(
            num_passes=len(given),
            num_scored=sum(rollout.completion.num_tokens for rollout in given),
            teacher_s=time.perf_counter() - began,
            wire_bytes=rollouts.nbytes,
        )
        return metered(scored, meter)

    @property
    def _sequences(self) -> SequenceEngine:
        return self._engine  # type: ignore[return-value]


def _scored(rollout: Rollout, score: Scores, decoding: Decoding) -> Rollout:
    """Where the student drew from its own law, that is mu. Of a law made of it alone no divergence is known: NaN."""
    assert rollout.teacher is not None
    teacher = replace(
        rollout.teacher, teacher_logprobs=score.support_logprobs[0], teacher_tail_logprobs=score.tail_logprobs[0]
    )
    num_tokens = rollout.completion.num_tokens
    told = np.full(num_tokens, 0.0 if decoding.is_plain else np.nan, np.float32)
    blend = BlendTrace(
        epsilon=told,
        beta=told,
        divergence=told,
        teacher_divergence=teacher.kl_to_teacher() + told,
        teacher_logprobs=score.token_logprobs[0],
        accepted=np.ones(num_tokens, np.bool_),
    )
    return replace(rollout, blend=blend, teacher=teacher)
