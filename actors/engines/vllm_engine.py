"""The vLLM engines: one model, or student and teacher together.

`vllm_process` starts vLLM and `vllm_worker` lives inside its worker; nothing else touches vLLM. vLLM is imported when
an engine is built, so that a run without it needs none of it.
"""

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt

from actors.engines.errors import EngineError
from actors.engines.protocol import Floats, Generation, Ints, Scores, SequenceRequest
from actors.engines.vllm_jobs import Laws, Record, SampleJob, ScoreJob
from actors.engines.vllm_process import VllmProcess, environment

if TYPE_CHECKING:
    import torch

__all__ = ["BlendedGeneration", "VllmBlendEngine", "VllmEngine", "environment"]

Bools = npt.NDArray[np.bool_]

_MIN_BATCHED_TOKENS = 4096


@dataclass(frozen=True, slots=True, kw_only=True)
class BlendedGeneration:
    """One completion drawn from mu; T tokens, log-probs in nats."""

    token_ids: Ints
    """[T], the stop token included where one was drawn."""
    behaviour_logprobs: Floats
    """[T] log mu."""
    student_logprobs: Floats
    """[T]."""
    teacher_logprobs: Floats
    """[T]."""
    policy_versions: Ints
    """[T]."""
    finish_reason: str
    """'stop' or 'length'."""
    epsilon: Floats
    """[T] budget."""
    beta: Floats
    """[T] blend weight."""
    divergence: Floats
    """[T] KL(mu || student)."""
    accepted: Bools
    """[T] False where the student's draft was redrawn."""
    support_ids: Ints
    """[T, K], the student's likeliest, sorted by its falling log-prob."""
    support_student_logprobs: Floats
    """[T, K]."""
    support_teacher_logprobs: Floats
    """[T, K]."""
    student_tail_logprobs: Floats
    """[T] log mass outside the support; -inf where K = V."""
    teacher_tail_logprobs: Floats
    """[T] likewise."""


class VllmEngine:
    """Implements `Engine` (actors/engines/protocol.py) with one model in vLLM."""

    def __init__(
        self,
        *,
        model: str,
        seed: int,
        temperature: float,
        support_size: int | None,
        stop_token_id: int,
        max_model_len: int,
        dtype: str = "float32",
        memory_gib: float = 1.0,
        max_num_seqs: int = 64,
        enforce_eager: bool = True,
    ) -> None:
        """Start vLLM and load the model.

        Args:
            model: a Hugging Face folder, or the name of a model on the Hub.
            seed: of the run's random numbers.
            temperature: the laws drawn from and reported are softmax(logits / temperature).
            support_size: K, how many of the likeliest ids are reported at each position; None for all, 0 for none.
            stop_token_id: the token that ends a completion.
            max_model_len: longest prompt plus longest completion, in tokens.
            dtype: of the weights, "float32", "bfloat16" or "auto" (the model's own); log-probs are float32.
            memory_gib: size of the key-value cache.
            max_num_seqs: how many sequences are decoded at once.
            enforce_eager: whether to skip compilation.

        Raises:
            EngineError: if vLLM is missing or of a wrong version, the environment is not that of `environment`, or
                vLLM refuses the model.
        """
        self._vllm = VllmProcess(
            model=model,
            laws=Laws(seed=seed, temperature=temperature, support_size=support_size, stop_token_id=stop_token_id),
            memory_gib=memory_gib,
            max_model_len=max_model_len,
            max_num_batched_tokens=max(max_model_len, _MIN_BATCHED_TOKENS),
            max_num_seqs=max_num_seqs,
            dtype=dtype,
            enforce_eager=enforce_eager,
        )
        self._stop = stop_token_id
        self._policy_version = 0

    @property
    def policy_version(self) -> int:
        """Version of the weights in use."""
        return self._policy_version

    def generate(self, requests: Sequence[SequenceRequest]) -> list[Generation]:
        """Sample every request to its end."""
        record = self._vllm.run(
            SampleJob(requests=requests),
            [request.prompt_ids for request in requests],
            [{"max_tokens": request.max_new_tokens, "stop_token_ids": [self._stop]} for request in requests],
        )
        return [
            Generation(
                token_ids=rows["token_id"].astype(np.int32),
                token_logprobs=rows["token_logprob"],
                finish_reason=_finish_reason(rows, self._stop),
                policy_versions=np.full(len(rows["token_id"]), self._policy_version, np.int32),
                support_ids=rows["support_ids"].astype(np.int32),
                support_logprobs=rows["support_logprobs"],
                tail_logprobs=rows["tail_logprob"],
            )
            for rows in _completions(record, requests, self._stop)
        ]

    def score_completions(
        self, prompts: Sequence[tuple[int, ...]], completions: Sequence[Ints], support_ids: Sequence[Ints]
    ) -> list[Scores]:
        """Score finished completions, each of at least one token, at requested ids (one K for all)."""
        record = self._vllm.run(
            ScoreJob(prompt_lengths=list(map(len, prompts)), completions=completions, support_ids=support_ids),
            [(*prompt, *ids[:-1].tolist()) for prompt, ids in zip(prompts, completions, strict=True)],
            # A cached position would not be computed, and so could not be scored.
            [{"max_tokens": 1, "skip_reading_prefix_cache": True}] * len(prompts),
        )
        scores = []
        for rows, completion in zip(_split(record, len(prompts)), completions, strict=True):
            if len(rows["position"]) != len(completion):
                raise EngineError(f"vLLM scored {len(rows['position'])} of {len(completion)} tokens of a completion")
            scores.append(
                Scores(
                    token_logprobs=rows["token_logprob"][None],
                    support_logprobs=rows["support_logprobs"][None],
                    tail_logprobs=rows["tail_logprob"][None],
                )
            )
        return scores

    def load_weights(self, weights: Iterable[tuple[str, "torch.Tensor"]], policy_version: int) -> None:
        """Replace the weights in place and stamp what follows with the version."""
        self._vllm.load_weights(weights)
        self._policy_version = policy_version

    def shutdown(self) -> None:
        """Free the model and the cache."""
        self._vllm.shutdown()


class VllmBlendEngine:
    """TRB with both models in one vLLM: the teacher is the target, the student its draft model.

    All draws (drafts, acceptance, replacements) are counter-based, so that what is sampled does not depend on the
    draft length, and mu is solved on the whole vocabulary.
    """

    def __init__(
        self,
        *,
        student: str,
        teacher: str,
        draft_length: int,
        seed: int,
        temperature: float,
        support_size: int | None,
        stop_token_id: int,
        max_model_len: int,
        dtype: str = "float32",
        memory_gib: float = 1.0,
        max_num_seqs: int = 64,
        enforce_eager: bool = True,
    ) -> None:
        """Start vLLM and load both models.

        Arguments and errors are those of `VllmEngine`, and:

        Args:
            student: Hugging Face folder of the model whose weights `load_weights` replaces.
            teacher: of the frozen one; the same vocabulary.
            draft_length: k, how many tokens the student drafts for each pass of the teacher.
            temperature: of both laws.
        """
        # Drafts may reach beyond the longest completion; cut drafts would leave rows without any.
        room = max_model_len + draft_length + 2
        scheduled = max(room, max_num_seqs * (draft_length + 1), _MIN_BATCHED_TOKENS)
        self._vllm = VllmProcess(
            model=teacher,
            laws=Laws(seed=seed, temperature=temperature, support_size=support_size, stop_token_id=stop_token_id),
            memory_gib=memory_gib,
            max_model_len=room,
            max_num_scheduled_tokens=scheduled,
            max_num_batched_tokens=scheduled + max_num_seqs,  # the drafter runs one token more for each sequence
            max_num_seqs=max_num_seqs,
            dtype=dtype,
            enforce_eager=enforce_eager,
            speculative_config={
                "method": "draft_model",
                "model": student,
                "num_speculative_tokens": draft_length,
                "draft_sample_method": "probabilistic",
            },
        )
        self._vllm.check_draft_length(room)
        self._vllm.forbid_preemption()
        self._stop = stop_token_id
        self._policy_version = 0

    @property
    def policy_version(self) -> int:
        """Version of the student's weights in use."""
        return self._policy_version

    def generate_blended(self, requests: Sequence[SequenceRequest], epsilon: float) -> list[BlendedGeneration]:
        """Sample every request to its end from mu.

        Args:
            requests: prompts of at least two tokens each.
            epsilon: budget of every token, in nats; may differ from call to call.

        Raises:
            ValueError: for an epsilon that is negative or not finite, or a prompt of fewer than two tokens.
            EngineError: if vLLM scheduled a row without a draft, since nothing exact can be drawn there.
        """
        if not (math.isfinite(epsilon) and epsilon >= 0):
            raise ValueError(f"epsilon must be finite and >= 0 nats, got {epsilon}")
        for request in requests:
            if len(request.prompt_ids) < 2:
                raise ValueError(
                    "prompts must have at least 2 tokens when student and teacher share a vLLM engine, got "
                    f"{len(request.prompt_ids)} in {request.prompt_id!r}"
                )
        record = self._vllm.run(
            SampleJob(requests=requests, epsilon=epsilon),
            [request.prompt_ids[:-1] for request in requests],  # the last is forced: see BlendingSampler
            [
                {
                    "max_tokens": request.max_new_tokens + 1,
                    # A forced stop token would end its request at once.
                    "stop_token_ids": [] if request.prompt_ids[-1] == self._stop else [self._stop],
                }
                for request in requests
            ],
        )
        if record.num_undrafted:
            raise EngineError(
                f"every token must come from a draft, vLLM scheduled {record.num_undrafted} rows without one; give the "
                "engine a larger memory_gib or a smaller max_num_sequences"
            )
        return [self._generation(rows, epsilon) for rows in _completions(record, requests, self._stop)]

    def load_weights(self, weights: Iterable[tuple[str, "torch.Tensor"]], policy_version: int) -> None:
        """Replace the student's weights in place and stamp what follows with the version."""
        self._vllm.load_weights(weights)
        self._policy_version = policy_version

    def shutdown(self) -> None:
        """Free both models and the cache."""
        self._vllm.shutdown()

    def _generation(self, rows: Mapping[str, npt.NDArray[Any]], epsilon: float) -> BlendedGeneration:
        num_tokens = len(rows["token_id"])
        return BlendedGeneration(
            token_ids=rows["token_id"].astype(np.int32),
            behaviour_logprobs=rows["behaviour_logprob"],
            student_logprobs=rows["student_logprob"],
            teacher_logprobs=rows["teacher_logprob"],
            policy_versions=np.full(num_tokens, self._policy_version, np.int32),
            finish_reason=_finish_reason(rows, self._stop),
            epsilon=np.full(num_tokens, epsilon, np.float32),
            beta=rows["beta"],
            divergence=rows["divergence"],
            accepted=rows["accepted"],
            support_ids=rows["support_ids"].astype(np.int32),
            support_student_logprobs=rows["support_student_logprobs"],
            support_teacher_logprobs=rows["support_teacher_logprobs"],
            student_tail_logprobs=rows["student_tail_logprob"],
            teacher_tail_logprobs=rows["teacher_tail_logprob"],
        )


def _split(record: Record, num_requests: int) -> list[dict[str, npt.NDArray[Any]]]:
    """Return the record's rows of each request."""
    if not num_requests:
        return []
    bounds = np.searchsorted(record.columns["number"], np.arange(num_requests + 1))
    return [{name: values[first:last] for name, values in record.columns.items()} for first, last in pairwise(bounds)]


def _completions(
    record: Record, requests: Sequence[SequenceRequest], stop_token_id: int
) -> list[dict[str, npt.NDArray[Any]]]:
    """Return each request's rows up to its stop token or its limit; drafts kept beyond either are dropped.

    Raises:
        EngineError: if a request's positions are not 0, 1, ... up to its end.
    """
    completions = []
    for rows, request in zip(_split(record, len(requests)), requests, strict=True):
        stops = np.flatnonzero(rows["token_id"] == stop_token_id)
        length = min(request.max_new_tokens, int(stops[0]) + 1 if len(stops) else request.max_new_tokens)
        if not np.array_equal(rows["position"][:length], np.arange(length)):
            raise EngineError(
                f"vLLM must sample each of {length} positions of {request.prompt_id!r} once, it sampled "
                f"{rows['position'].tolist()}"
            )
        completions.append({name: values[:length] for name, values in rows.items()})
    return completions


def _finish_reason(rows: Mapping[str, npt.NDArray[Any]], stop_token_id: int) -> str:
    return "stop" if rows["token_id"][-1] == stop_token_id else "length"
