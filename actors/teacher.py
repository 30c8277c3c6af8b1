"""The actor around the frozen teacher's engine: it scores what students draft, and finished completions."""

import time
from collections.abc import Sequence
from dataclasses import replace
from functools import cached_property

import numpy as np
import pyarrow as pa

from actors.engines.build import EngineSpec, build_engine
from actors.engines.errors import EngineError
from actors.engines.protocol import (
    DraftedIds,
    Engine,
    Ints,
    Scores,
    SequenceEngine,
    Settlement,
    Support,
    TellingEngine,
)
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
from actors.teacher_signal import STUDENTS_SUPPORT, SignalSpec, with_own_scores
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

    def score_rollouts(
        self, rollouts: pa.RecordBatch, decoding: Decoding = PLAIN, signal: SignalSpec = STUDENTS_SUPPORT
    ) -> pa.RecordBatch:
        """Return finished rollouts with the teacher's part filled, at each position's support.

        Args:
            rollouts: of the student alone.
            decoding: how they were drawn.
            signal: what the learner is told besides; of hidden states it is told nothing else.

        Raises:
            EngineError: if the engine cannot tell what the signal wants.
        """
        began = time.perf_counter()
        given = rollouts_from_arrow(rollouts)
        if signal.kind == "hidden":
            done = with_hidden(given, self._engine)
        else:
            scored = _scores(given, self._engine, signal, self._spec.support_size)
            done = [
                _told(_scored(rollout, scores, decoding), beside, signal)
                for rollout, (scores, beside) in zip(given, scored, strict=True)
            ]
        meter = Meter(
            num_passes=len(given),
            num_scored=sum(rollout.completion.num_tokens for rollout in given),
            teacher_s=time.perf_counter() - began,
            wire_bytes=rollouts.nbytes,
        )
        return metered(_like(rollouts, done), meter)

    def add_signal(self, rollouts: pa.RecordBatch, signal: SignalSpec) -> pa.RecordBatch:
        """Return blended rollouts with what the learner is told besides; all else stays as it is.

        Raises:
            EngineError: if the engine cannot tell what the signal wants.
        """
        return metered(
            with_signal(rollouts, self._engine, signal, self._spec.support_size), Meter(wire_bytes=rollouts.nbytes)
        )

    @property
    def _sequences(self) -> SequenceEngine:
        return self._engine  # type: ignore[return-value]


def with_signal(
    rollouts: pa.RecordBatch, teacher: Engine, signal: SignalSpec, support_size: int | None
) -> pa.RecordBatch:
    """Return rollouts that a teacher has scored with what the learner is told besides.

    Args:
        rollouts: with scores.
        teacher: is asked once more where the scores do not have it.
        signal: what the learner is told.
        support_size: of the rollouts; None for the whole vocabulary.

    Raises:
        EngineError: if the engine cannot tell what the signal wants.
    """
    began = time.perf_counter()
    given = rollouts_from_arrow(rollouts)
    if not signal.needs_model(support_size):
        return _like(rollouts, [with_own_scores(rollout, signal) for rollout in given])
    if signal.kind == "hidden":
        done = with_hidden(given, teacher)
    else:
        scored = _scores(given, teacher, signal, support_size)
        done = [replace(rollout, learned=beside) for rollout, (_, beside) in zip(given, scored, strict=True)]
    num_scored = sum(rollout.completion.num_tokens for rollout in given)
    return metered(_like(rollouts, done), Meter(num_scored=num_scored, teacher_s=time.perf_counter() - began))


def with_hidden(rollouts: Sequence[Rollout], teacher: Engine) -> list[Rollout]:
    """Return the rollouts with the teacher's last hidden states.

    Raises:
        EngineError: if the engine does not give them.
    """
    told = _telling(teacher).last_hidden(*_texts(rollouts))
    return [replace(rollout, teacher_hidden=hidden) for rollout, hidden in zip(rollouts, told, strict=True)]


def _scores(
    rollouts: Sequence[Rollout], teacher: Engine, signal: SignalSpec, support_size: int | None
) -> list[tuple[Scores, Support | None]]:
    """Score the rollouts at their supports, and gather besides what the signal wants of the teacher itself."""
    supports = [
        np.zeros((rollout.completion.num_tokens, 0), np.int32) if rollout.teacher is None
        else rollout.teacher.support_ids
        for rollout in rollouts
    ]  # fmt: skip
    if signal.needs_model(support_size):
        return [*_telling(teacher).score_beside(*_texts(rollouts), supports, signal)]
    return [(scores, None) for scores in teacher.score_completions(*_texts(rollouts), supports)]


def _texts(rollouts: Sequence[Rollout]) -> tuple[list[tuple[int, ...]], list[Ints]]:
    return [rollout.prompt.token_ids for rollout in rollouts], [rollout.completion.token_ids for rollout in rollouts]


def _telling(engine: Engine) -> TellingEngine:
    if not hasattr(engine, "score_beside"):
        raise EngineError(
            "engine must be torch where the teacher's signal is more than log-probs at the student's ids, got "
            f"{type(engine).__name__}"
        )
    return engine  # type: ignore[return-value]


def _like(given: pa.RecordBatch, rollouts: Sequence[Rollout]) -> pa.RecordBatch:
    """The rollouts as Arrow, with the metadata of the batch that they were."""
    batch = rollouts_to_arrow(rollouts)
    return batch.replace_schema_metadata({**given.schema.metadata, **batch.schema.metadata})


def _told(rollout: Rollout, beside: Support | None, signal: SignalSpec) -> Rollout:
    return with_own_scores(rollout, signal) if beside is None else replace(rollout, learned=beside)


def _scored(rollout: Rollout, score: Scores, decoding: Decoding) -> Rollout:
    """Where the student drew from its own law, that is mu. Of a law made of it alone no divergence is known: NaN.

    Nor is the divergence from the teacher known of a student without a support.
    """
    teacher = rollout.teacher
    num_tokens = rollout.completion.num_tokens
    told = np.full(num_tokens, 0.0 if decoding.is_plain else np.nan, np.float32)
    divergence = np.full(num_tokens, np.nan, np.float32)
    if teacher is not None:
        teacher = replace(
            teacher, teacher_logprobs=score.support_logprobs[0], teacher_tail_logprobs=score.tail_logprobs[0]
        )
        divergence = teacher.kl_to_teacher() + told
    blend = BlendTrace(
        epsilon=told,
        beta=told,
        divergence=told,
        teacher_divergence=divergence,
        teacher_logprobs=score.token_logprobs[0],
        accepted=np.ones(num_tokens, np.bool_),
    )
    return replace(rollout, blend=blend, teacher=teacher)
