"""The actor around a vLLM engine that holds student and teacher together while they are blended."""

from functools import cached_property
from typing import TYPE_CHECKING, Any

import numpy as np
import pyarrow as pa

from actors.engines.build import EngineSpec
from actors.experience import (
    BlendTrace,
    Completion,
    Prompt,
    Rollout,
    TeacherScores,
    requests_from_arrow,
    rollouts_to_arrow,
)
from actors.student import sequence_requests
from actors.tokenizer import load_tokenizer
from actors.weights import PolicyWeights, read_weights

if TYPE_CHECKING:
    from actors.engines.vllm_engine import BlendedGeneration, VllmBlendEngine


class OneEngineActor:
    """The student is the teacher's draft model; the verifier runs inside the engine's worker."""

    def __init__(self, name: str, spec: EngineSpec, teacher: str, draft_length: int) -> None:
        self._name, self._spec, self._teacher, self._draft_length = name, spec, teacher, draft_length

    def __repr__(self) -> str:
        return self._name

    @cached_property
    def _engine(self) -> "VllmBlendEngine":
        # Built by the first call and not by the constructor, so that what it raises reaches the caller as it is.
        from actors.engines.vllm_engine import VllmBlendEngine

        spec = self._spec
        assert spec.section.type == "vllm"
        return VllmBlendEngine(
            student=spec.model,
            teacher=self._teacher,
            draft_length=self._draft_length,
            seed=spec.seed,
            temperature=spec.temperature,
            support_size=spec.support_size,
            stop_token_id=spec.stop_token_id,
            max_model_len=spec.max_model_len,
            dtype=spec.section.dtype,
            memory_gib=spec.section.memory_gib,
            max_num_seqs=spec.section.max_num_sequences,
            enforce_eager=spec.section.enforce_eager,
        )

    @cached_property
    def _tokenizer(self) -> Any:
        return load_tokenizer(self._spec.model)

    def ready(self) -> str:
        """Load both models; return the actor's name."""
        assert self._engine.policy_version >= 0
        return self._name

    def sample(
        self, requests: pa.RecordBatch, weights: PolicyWeights, epsilon: float, max_new_tokens: int
    ) -> pa.RecordBatch:
        """Sample every request to its end from mu, and return complete rollouts with the teacher's scores."""
        if weights.policy_version != self._engine.policy_version:
            self._engine.load_weights(read_weights(weights), weights.policy_version)
        asked = requests_from_arrow(requests)
        generations = self._engine.generate_blended(sequence_requests(asked, max_new_tokens), epsilon)
        texts = self._tokenizer.batch_decode([g.token_ids.tolist() for g in generations], skip_special_tokens=True)
        return rollouts_to_arrow(
            [
                _rollout(generation, text, prompt, index)
                for (prompt, index), generation, text in zip(asked, generations, texts, strict=True)
            ]
        )


def _rollout(generation: "BlendedGeneration", text: str, prompt: Prompt, index: int) -> Rollout:
    return Rollout(
        prompt=prompt,
        sample_index=index,
        completion=Completion(
            token_ids=generation.token_ids,
            behaviour_logprobs=generation.behaviour_logprobs,
            student_logprobs=generation.student_logprobs,
            finish_reason=generation.finish_reason,
            policy_versions=generation.policy_versions,
        ),
        text=text,
        blend=BlendTrace(
            epsilon=generation.epsilon,
            beta=generation.beta,
            divergence=generation.divergence,
            teacher_logprobs=generation.teacher_logprobs,
            accepted=np.asarray(generation.accepted, np.bool_),
        ),
        teacher=TeacherScores(
            support_ids=generation.support_ids,
            student_logprobs=generation.support_student_logprobs,
            student_tail_logprobs=generation.student_tail_logprobs,
            teacher_logprobs=generation.support_teacher_logprobs,
            teacher_tail_logprobs=generation.teacher_tail_logprobs,
        ),
    )
