"""The actor around a student's engine. It holds the weights being trained and never the teacher's."""

import time
from collections.abc import Sequence
from functools import cached_property
from typing import Any

import pyarrow as pa

from actors.engines.build import EngineSpec, build_engine
from actors.engines.protocol import (
    DraftedIds,
    DraftedLogprobs,
    Engine,
    Generation,
    SequenceEngine,
    SequenceRequest,
    Settlement,
)
from actors.experience import (
    Completion,
    Prompt,
    Rollout,
    TeacherScores,
    requests_from_arrow,
    rollouts_to_arrow,
    sequence_requests_from_arrow,
)
from actors.head import PLAIN, Decoding
from actors.meter import Meter, metered
from actors.tokenizer import load_tokenizer
from actors.weights import PolicyWeights, read_weights
from actors.wire import timed, to_arrow


def sequence_requests(requests: Sequence[tuple[Prompt, int]], max_new_tokens: int) -> list[SequenceRequest]:
    """Return what an engine needs of each (prompt, sample index)."""
    return [
        SequenceRequest(
            prompt_id=prompt.prompt_id,
            sample_index=index,
            prompt_ids=prompt.token_ids,
            max_new_tokens=max_new_tokens,
        )
        for prompt, index in requests
    ]


class StudentActor:
    """Drafts tokens for the blending service, or samples whole completions by itself."""

    def __init__(self, name: str, spec: EngineSpec) -> None:
        self._name, self._spec = name, spec
        self._open: set[int] = set()

    def __repr__(self) -> str:
        return self._name

    @cached_property
    def _engine(self) -> Engine:
        # Built by the first call and not by the constructor, so that what it raises reaches the caller as it is.
        return build_engine(self._spec)

    @cached_property
    def _tokenizer(self) -> Any:
        return load_tokenizer(self._spec.model)

    def ready(self) -> str:
        """Load the model; return the actor's name."""
        assert self._engine.policy_version >= 0
        return self._name

    def sample(
        self,
        requests: pa.RecordBatch,
        weights: PolicyWeights,
        max_new_tokens: int,
        decoding: Decoding = PLAIN,
        with_support: bool = True,
    ) -> pa.RecordBatch:
        """Sample every request to its end from the student alone; the teacher's part is left open.

        Args:
            requests: made by `requests_to_arrow`.
            weights: to sample from.
            max_new_tokens: longest completion.
            decoding: how tokens are drawn from the student's law.
            with_support: whether its likeliest ids are wanted, where the engine reports any.
        """
        began = time.perf_counter()
        self._refresh(weights)
        asked = requests_from_arrow(requests)
        generations = self._engine.generate(
            sequence_requests(asked, max_new_tokens), decoding, with_support=with_support
        )
        texts = self._tokenizer.batch_decode([g.token_ids.tolist() for g in generations], skip_special_tokens=True)
        rollouts = rollouts_to_arrow(
            [
                Rollout(
                    prompt=prompt,
                    sample_index=index,
                    completion=Completion(
                        token_ids=generation.token_ids,
                        behaviour_logprobs=generation.behaviour_logprobs,
                        student_logprobs=generation.token_logprobs,
                        finish_reason=generation.finish_reason,
                        policy_versions=generation.policy_versions,
                    ),
                    text=text,
                    teacher=_unscored(generation) if with_support and self._spec.support_size != 0 else None,
                )
                for (prompt, index), generation, text in zip(asked, generations, texts, strict=True)
            ]
        )
        num_tokens = sum(len(generation.token_ids) for generation in generations)
        return metered(rollouts, Meter(num_tokens=num_tokens, student_s=time.perf_counter() - began))

    def likeliest(self, requests: pa.RecordBatch, weights: PolicyWeights) -> list[list[int]]:
        """Return the support's ids at the position after each prompt."""
        self._refresh(weights)
        return likeliest(self._engine, requests)

    def begin(self, weights: PolicyWeights) -> int:
        """Forget all open sequences, take these weights, and return the policy version that will draft.

        A student serves one rollout at a time, so that its weights never change under one: what is still open was
        abandoned.
        """
        self._sequences.close(list(self._open))
        self._open.clear()
        self._refresh(weights)
        return self._engine.policy_version

    def open(self, requests: pa.RecordBatch, lane: int, settled: Sequence[Settlement]) -> list[int]:
        """Settle what is past, admit sequences and return their handles."""
        self.settle(settled)
        handles = self._sequences.open(sequence_requests_from_arrow(requests), lane)
        self._open.update(handles)
        return handles

    def draft(
        self, sequences: Sequence[int], num_tokens: int, settled: Sequence[Settlement]
    ) -> tuple[pa.RecordBatch, pa.RecordBatch]:
        """Settle what is past; return the `DraftedIds` and `DraftedLogprobs` of that many tokens for each sequence.

        They are apart because a teacher needs the ids alone.
        """
        began = time.perf_counter()
        self.settle(settled)
        draft = self._sequences.draft(sequences, num_tokens)
        ids, logprobs = to_arrow(draft, DraftedIds), to_arrow(draft, DraftedLogprobs)
        return ids, timed(logprobs, time.perf_counter() - began)

    def settle(self, settled: Sequence[Settlement]) -> None:
        """Commit and close sequences, in this order."""
        for settlement in settled:
            settlement.apply(self._sequences)

    @property
    def _sequences(self) -> SequenceEngine:
        return self._engine  # type: ignore[return-value]

    def _refresh(self, weights: PolicyWeights) -> None:
        if weights.policy_version != self._engine.policy_version:
            self._engine.load_weights(read_weights(weights), weights.policy_version)


def likeliest(engine: Engine, requests: pa.RecordBatch) -> list[list[int]]:
    """Return the engine's likeliest ids, as many as its support has, at the position after each prompt."""
    generations = engine.generate(sequence_requests(requests_from_arrow(requests), max_new_tokens=1))
    return [generation.support_ids[0].tolist() for generation in generations]


def _unscored(generation: Generation) -> TeacherScores:
    return TeacherScores(
        support_ids=generation.support_ids,
        student_logprobs=generation.support_logprobs,
        student_tail_logprobs=generation.tail_logprobs,
    )
