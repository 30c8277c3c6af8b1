"""The actor around a student's engine. It holds the weights being trained and never the teacher's."""

from collections.abc import Sequence
from functools import cached_property
from typing import Any

import pyarrow as pa

from actors.engines.build import EngineSpec, build_engine
from actors.engines.protocol import Engine, Generation, Ints, SequenceEngine, SequenceRequest
from actors.experience import (
    Completion,
    Prompt,
    Rollout,
    TeacherScores,
    requests_from_arrow,
    rollouts_to_arrow,
)
from actors.tokenizer import load_tokenizer
from actors.weights import PolicyWeights, read_weights
from actors.wire import to_arrow


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
        self._open: list[int] = []

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

    def sample(self, requests: pa.RecordBatch, weights: PolicyWeights, max_new_tokens: int) -> pa.RecordBatch:
        """Sample every request to its end from the student alone; the teacher's part is left open."""
        self._refresh(weights)
        asked = requests_from_arrow(requests)
        generations = self._engine.generate(sequence_requests(asked, max_new_tokens))
        texts = self._tokenizer.batch_decode([g.token_ids.tolist() for g in generations], skip_special_tokens=True)
        return rollouts_to_arrow(
            [
                Rollout(
                    prompt=prompt,
                    sample_index=index,
                    completion=Completion(
                        token_ids=generation.token_ids,
                        behaviour_logprobs=generation.token_logprobs,
                        student_logprobs=generation.token_logprobs,
                        finish_reason=generation.finish_reason,
                        policy_versions=generation.policy_versions,
                    ),
                    text=text,
                    teacher=None if self._spec.support_size == 0 else _unscored(generation),
                )
                for (prompt, index), generation, text in zip(asked, generations, texts, strict=True)
            ]
        )

    def open(self, requests: pa.RecordBatch, weights: PolicyWeights, max_new_tokens: int) -> tuple[list[int], int]:
        """Admit the sequences of one rollout; return their handles and the policy version that will draft them.

        A student serves one rollout at a time, so that its weights never change under one: what is still open was
        abandoned, and is forgotten.
        """
        self._sequences.close(self._open)
        self._refresh(weights)
        self._open = self._sequences.open(sequence_requests(requests_from_arrow(requests), max_new_tokens))
        return self._open, self._engine.policy_version

    def draft(self, sequences: Sequence[int], num_tokens: int) -> pa.RecordBatch:
        """Return a `Draft` of that many tokens for each sequence."""
        return to_arrow(self._sequences.draft(sequences, num_tokens))

    def commit(self, sequences: Sequence[int], num_accepted: Ints, replacement_ids: Ints) -> None:
        """Settle the last draft (see `SequenceEngine.commit`)."""
        self._sequences.commit(sequences, num_accepted, replacement_ids)

    def close(self, sequences: Sequence[int]) -> None:
        """Forget the sequences."""
        self._sequences.close(sequences)

    @property
    def _sequences(self) -> SequenceEngine:
        return self._engine  # type: ignore[return-value]

    def _refresh(self, weights: PolicyWeights) -> None:
        if weights.policy_version != self._engine.policy_version:
            self._engine.load_weights(read_weights(weights), weights.policy_version)


def _unscored(generation: Generation) -> TeacherScores:
    return TeacherScores(
        support_ids=generation.support_ids,
        student_logprobs=generation.support_logprobs,
        student_tail_logprobs=generation.tail_logprobs,
    )
