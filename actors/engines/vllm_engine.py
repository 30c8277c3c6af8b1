"""The vLLM engines: one model, or student and teacher together.

`vllm_process` starts vLLM and `vllm_worker` lives inside its worker; nothing else touches vLLM. vLLM is imported when
an engine is built, so that a run without it needs none of it.

B counts the sequences of a call, k drafted tokens, K the support.
"""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

import numpy as np
import numpy.typing as npt
import torch

from actors.behaviours import BlendedBehaviour
from actors.engines.errors import EngineError
from actors.engines.protocol import Draft, Floats, Generation, Ints, Scores, SequenceRequest
from actors.engines.vllm_jobs import BlendCounts, Laws, Record, SampleJob, ScoreJob
from actors.engines.vllm_process import VllmProcess, environment
from actors.engines.vllm_sequences import OpenSequence, OpenSequences
from actors.head import PLAIN, Decoding, Head
from actors.verification import BlendedTokens

__all__ = ["BlendCounts", "BlendedGeneration", "VllmBlendEngine", "VllmEngine", "environment"]

_MIN_BATCHED_TOKENS = 4096


@dataclass(frozen=True, slots=True, kw_only=True)
class BlendedGeneration(BlendedTokens):
    """One completion drawn from mu, the stop token included where one was drawn; T tokens."""

    policy_versions: Ints
    """[T]."""
    finish_reason: str
    """'stop' or 'length'."""
    epsilon: Floats
    """[T] budget; NaN where the behaviour keeps none."""


class VllmEngine:
    """Implements `SequenceEngine` (actors/engines/protocol.py) with one model in vLLM.

    An open sequence is its tokens, on the host: every draft and every score is a run of vLLM over all of them, which
    finds all but the last block in its prefix cache. Lanes need nothing, since rows of vLLM's cache are its own affair.
    """

    def __init__(
        self,
        *,
        model: str,
        seed: int,
        head: Head,
        support_size: int | None,
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
            head: how logits are read.
            support_size: K, how many of the likeliest ids are reported at each position; None for all, 0 for none.
                As many as can be drawn, or more, are all.
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
            laws=Laws(seed=seed, head=head, support_size=support_size),
            memory_gib=memory_gib,
            max_model_len=max_model_len,
            max_num_batched_tokens=max(max_model_len, _MIN_BATCHED_TOKENS),
            max_num_seqs=max_num_seqs,
            dtype=dtype,
            enforce_eager=enforce_eager,
        )
        self._stop, self._stops, self._max_model_len = head.stop_token_id, head.stop_token_ids[:1], max_model_len
        self._policy_version = self._num_computed_tokens = 0
        self._sequences = OpenSequences()

    @property
    def policy_version(self) -> int:
        """Version of the weights in use."""
        return self._policy_version

    @property
    def num_computed_tokens(self) -> int:
        """Tokens that went through the model so far; beyond those drafted and scored they were computed again."""
        return self._num_computed_tokens

    def generate(
        self, requests: Sequence[SequenceRequest], decoding: Decoding = PLAIN, *, with_support: bool = True
    ) -> list[Generation]:
        """Sample every request to its end; only new tokens are returned, none where there is no room for any."""
        told = slice(None) if with_support else slice(0)
        record = self._run(
            SampleJob(requests=requests, decoding=decoding),
            [_text(request) for request in requests],
            [{"max_tokens": max(1, request.num_left), "stop_token_ids": list(self._stops)} for request in requests],
        )
        return [
            Generation(
                token_ids=rows["token_id"].astype(np.int32),
                token_logprobs=rows["token_logprob"],
                behaviour_logprobs=rows["behaviour_logprob"],
                finish_reason=_finish_reason(rows, self._stop),
                policy_versions=np.full(len(rows["token_id"]), self._policy_version, np.int32),
                support_ids=rows["support_ids"][:, told].astype(np.int32),
                support_logprobs=rows["support_logprobs"][:, told],
                tail_logprobs=rows["tail_logprob"] if with_support else np.zeros_like(rows["tail_logprob"]),
            )
            for rows in _completions(record, requests, self._stop)
        ]

    def score_completions(
        self, prompts: Sequence[tuple[int, ...]], completions: Sequence[Ints], support_ids: Sequence[Ints]
    ) -> list[Scores]:
        """Score finished completions, each of at least one token, at requested ids (one K for all)."""
        return [
            Scores(
                token_logprobs=rows["token_logprob"][None],
                support_logprobs=rows["support_logprobs"][None],
                tail_logprobs=rows["tail_logprob"][None],
            )
            for rows in self._scored(prompts, completions, support_ids)
        ]

    def open(self, requests: Sequence[SequenceRequest], lane: int = 0) -> list[int]:
        """Admit sequences and return their handles; nothing is computed yet."""
        return self._sequences.open(requests)

    def draft(self, sequences: Sequence[int], num_tokens: int) -> Draft:
        """Draw `num_tokens` tokens for each sequence, stop tokens or not; nothing is committed.

        Positions beyond `max_model_len`, which no completion reaches, repeat the last one before them.

        Raises:
            LostSequenceError: where a sequence is not open.
            EngineError: where one has no room for another token.
        """
        opened = self._sequences.at(sequences)
        rooms = [self._room(sequence, num_tokens) for sequence in opened]
        requests = [sequence.continued() for sequence in opened]
        record = self._run(
            SampleJob(requests=requests, with_spares=True),
            [sequence.token_ids for sequence in opened],
            [{"max_tokens": room} for room in rooms],
        )
        drafted = _split(record, len(opened))
        for rows, request, room in zip(drafted, requests, rooms, strict=True):
            _check_positions(rows, request, room)
        draft = Draft(
            token_ids=_stacked(drafted, "token_id", num_tokens).astype(np.int32),
            token_logprobs=_stacked(drafted, "token_logprob", num_tokens),
            support_ids=_stacked(drafted, "support_ids", num_tokens).astype(np.int32),
            support_logprobs=_stacked(drafted, "support_logprobs", num_tokens),
            tail_logprobs=_stacked(drafted, "tail_logprob", num_tokens),
            spare_ids=_stacked(drafted, "spare_id", num_tokens).astype(np.int32),
            spare_logprobs=_stacked(drafted, "spare_logprob", num_tokens),
        )
        for sequence, ids in zip(opened, draft.token_ids, strict=True):
            sequence.pending = ids
        return draft

    def score(self, sequences: Sequence[int], draft_ids: Ints, support_ids: Ints) -> Scores:
        """Score [B, k] drafted tokens at [B, k, K] ids; nothing is committed.

        What lies beyond `max_model_len`, and errors, are those of `draft`.
        """
        opened, drafts, supports = self._sequences.at(sequences), np.asarray(draft_ids), np.asarray(support_ids)
        num_tokens = drafts.shape[1]
        rooms = [self._room(sequence, num_tokens) for sequence in opened]
        scored = self._scored(
            [sequence.token_ids for sequence in opened],
            [ids[:room] for ids, room in zip(drafts, rooms, strict=True)],
            [ids[:room] for ids, room in zip(supports, rooms, strict=True)],
        )
        for sequence, ids in zip(opened, drafts, strict=True):
            sequence.pending = ids
        return Scores(
            token_logprobs=_stacked(scored, "token_logprob", num_tokens),
            support_logprobs=_stacked(scored, "support_logprobs", num_tokens),
            tail_logprobs=_stacked(scored, "tail_logprob", num_tokens),
        )

    def commit(self, sequences: Sequence[int], num_accepted: Ints, replacement_ids: Ints) -> None:
        """Keep a prefix of each pending draft and append the replacement, if there is one."""
        self._sequences.commit(sequences, num_accepted, replacement_ids)

    def close(self, sequences: Sequence[int]) -> None:
        """Forget the sequences, where they are known; vLLM drops the oldest of its cache when it needs room."""
        self._sequences.close(sequences)

    def load_weights(self, weights: Iterable[tuple[str, torch.Tensor]], policy_version: int) -> None:
        """Replace the weights in place and stamp what follows with the version."""
        self._vllm.load_weights(weights)
        self._policy_version = policy_version

    def shutdown(self) -> None:
        """Free the model and the cache."""
        self._vllm.shutdown()

    def _room(self, sequence: OpenSequence, num_tokens: int) -> int:
        """Return how many of that many tokens fit behind a sequence."""
        room = min(num_tokens, self._max_model_len - len(sequence.token_ids))
        if room < 1:
            raise EngineError(
                f"a sequence must be shorter than {self._max_model_len} tokens to go on, one of "
                f"{sequence.request.prompt_id!r} has {len(sequence.token_ids)}"
            )
        return room

    def _run(
        self, job: SampleJob | ScoreJob, prompts: Sequence[Sequence[int]], params: Sequence[Mapping[str, Any]]
    ) -> Record:
        record = self._vllm.run(job, prompts, params)
        self._num_computed_tokens += record.num_computed
        return record

    def _scored(
        self, prompts: Sequence[Sequence[int]], tokens: Sequence[Ints], support_ids: Sequence[Ints]
    ) -> list[dict[str, npt.NDArray[Any]]]:
        """Score tokens [T] behind each prompt at [T, K] ids; one record of T rows each.

        What is cached beyond a prompt, by a sequence that has the same tokens, is not computed and so not scored.
        Texts of which anything is missing are computed once more from their start.
        """
        scored = self._score_pass(prompts, tokens, support_ids, read_cache=True)
        missing = [i for i, rows in enumerate(scored) if len(rows["position"]) != len(tokens[i])]
        if missing:
            again = self._score_pass(
                [prompts[i] for i in missing],
                [tokens[i] for i in missing],
                [support_ids[i] for i in missing],
                read_cache=False,
            )
            for i, rows in zip(missing, again, strict=True):
                if len(rows["position"]) != len(tokens[i]):
                    raise EngineError(f"vLLM must score {len(tokens[i])} tokens, it scored {len(rows['position'])}")
                scored[i] = rows
        return scored

    def _score_pass(
        self,
        prompts: Sequence[Sequence[int]],
        tokens: Sequence[Ints],
        support_ids: Sequence[Ints],
        *,
        read_cache: bool,
    ) -> list[dict[str, npt.NDArray[Any]]]:
        record = self._run(
            ScoreJob(prompt_lengths=list(map(len, prompts)), completions=tokens, support_ids=support_ids),
            [[*prompt, *ids[:-1].tolist()] for prompt, ids in zip(prompts, tokens, strict=True)],
            [{"max_tokens": 1, "skip_reading_prefix_cache": not read_cache}] * len(prompts),
        )
        scored = []
        for rows in _split(record, len(prompts)):
            # A sequence that was preempted is computed, and recorded, again.
            _, once = np.unique(rows["position"], return_index=True)
            scored.append({name: values[once] for name, values in rows.items()})
        return scored


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
        head: Head,
        support_size: int | None,
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
            draft_length: k, how many tokens the student drafts for each pass of the teacher, at most.
            head: of both models.
        """
        # Drafts may reach beyond the longest completion. vLLM drafts for nobody where the longest sequence, its drafts
        # included, has no room for as many again, and a row without drafts is refused.
        room = max_model_len + 2 * draft_length + 2
        scheduled = max(room, max_num_seqs * (draft_length + 1), _MIN_BATCHED_TOKENS)
        self._vllm = VllmProcess(
            model=teacher,
            laws=Laws(seed=seed, head=head, support_size=support_size),
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
        self._draft_length = draft_length
        self._stop, self._stops = head.stop_token_id, head.stop_token_ids[:1]
        self._policy_version = 0

    @property
    def policy_version(self) -> int:
        """Version of the student's weights in use."""
        return self._policy_version

    def generate_blended(
        self,
        requests: Sequence[SequenceRequest],
        behaviour: BlendedBehaviour,
        draft_length: int | None = None,
    ) -> tuple[list[BlendedGeneration], BlendCounts]:
        """Sample every request to its end from mu; only new tokens are returned.

        Args:
            requests: of at least two tokens each, in the prompt or the completion so far.
            behaviour: gives mu; may differ from call to call.
            draft_length: k in this call, from 1 to the engine's own; None for that.

        Raises:
            ValueError: for a behaviour that is none (a budget below 0), a draft length or a request other than these.
            EngineError: if vLLM scheduled a row without a draft, since nothing exact can be drawn there.
        """
        self._check(requests, behaviour, draft_length)
        self._vllm.draft_at_once(None if draft_length == self._draft_length else draft_length)
        texts = [_text(request) for request in requests]
        record = self._vllm.run(
            SampleJob(requests=requests, behaviour=behaviour),
            [text[:-1] for text in texts],  # the last is forced: see BlendingSampler
            [
                {
                    "max_tokens": max(1, request.num_left) + 1,
                    # A forced stop token would end its request at once.
                    "stop_token_ids": [] if text[-1] == self._stop else list(self._stops),
                }
                for request, text in zip(requests, texts, strict=True)
            ],
        )
        if record.num_undrafted:
            raise EngineError(
                f"every token must come from a draft, vLLM scheduled {record.num_undrafted} rows without one; give the "
                "engine a larger memory_gib or a smaller max_num_sequences"
            )
        completions = _completions(record, requests, self._stop)
        return [self._generation(rows, behaviour.epsilon) for rows in completions], record.counts

    def load_weights(self, weights: Iterable[tuple[str, torch.Tensor]], policy_version: int) -> None:
        """Replace the student's weights in place and stamp what follows with the version."""
        self._vllm.load_weights(weights)
        self._policy_version = policy_version

    def shutdown(self) -> None:
        """Free both models and the cache."""
        self._vllm.shutdown()

    def _check(
        self, requests: Sequence[SequenceRequest], behaviour: BlendedBehaviour, draft_length: int | None
    ) -> None:
        if draft_length is not None and not 1 <= draft_length <= self._draft_length:
            raise ValueError(f"draft_length must be from 1 to {self._draft_length}, got {draft_length}")
        behaviour.target(torch.zeros(1, 2), torch.zeros(1, 2))  # raises here what would break vLLM amid its work
        for request in requests:
            if len(_text(request)) < 2:
                raise ValueError(
                    "prompts must have at least 2 tokens when student and teacher share a vLLM engine, got "
                    f"{len(_text(request))} in {request.prompt_id!r}"
                )

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
            teacher_divergence=rows["teacher_divergence"],
            accepted=rows["accepted"],
            support_ids=rows["support_ids"].astype(np.int32),
            support_student_logprobs=rows["support_student_logprobs"],
            support_teacher_logprobs=rows["support_teacher_logprobs"],
            student_tail_logprobs=rows["student_tail_logprob"],
            teacher_tail_logprobs=rows["teacher_tail_logprob"],
        )


def _text(request: SequenceRequest) -> tuple[int, ...]:
    """Return all tokens so far; of a completion that is full, which vLLM may not take, two that stand in for them."""
    return request.token_ids if request.num_left > 0 else request.token_ids[-2:]


def _split(record: Record, num_requests: int) -> list[dict[str, npt.NDArray[Any]]]:
    """Return the record's rows of each request."""
    if not record.columns:
        return [{"position": np.zeros(0, np.int64)} for _ in range(num_requests)]
    bounds = np.searchsorted(record.columns["number"], np.arange(num_requests + 1))
    return [{name: values[first:last] for name, values in record.columns.items()} for first, last in pairwise(bounds)]


def _check_positions(rows: Mapping[str, npt.NDArray[Any]], request: SequenceRequest, length: int) -> None:
    """Refuse a record that is not of the request's next `length` positions."""
    if not np.array_equal(rows["position"][:length], len(request.completion_ids) + np.arange(length)):
        raise EngineError(
            f"vLLM must sample {length} positions of {request.prompt_id!r} once, from {len(request.completion_ids)} "
            f"on; it sampled {rows['position'].tolist()}"
        )


def _completions(
    record: Record, requests: Sequence[SequenceRequest], stop_token_id: int
) -> list[dict[str, npt.NDArray[Any]]]:
    """Return each request's rows up to its stop token or its limit; drafts kept beyond either are dropped.

    Raises:
        EngineError: if a request's positions do not follow one another up to its end.
    """
    completions = []
    for rows, request in zip(_split(record, len(requests)), requests, strict=True):
        stops, left = np.flatnonzero(rows["token_id"] == stop_token_id), max(0, request.num_left)
        length = min(left, int(stops[0]) + 1) if len(stops) else left
        _check_positions(rows, request, length)
        completions.append({name: values[:length] for name, values in rows.items()})
    return completions


def _finish_reason(rows: Mapping[str, npt.NDArray[Any]], stop_token_id: int) -> str:
    return "stop" if len(rows["token_id"]) and rows["token_id"][-1] == stop_token_id else "length"


def _stacked(records: Sequence[Mapping[str, npt.NDArray[Any]]], name: str, length: int) -> npt.NDArray[Any]:
    """Return a column of B records as [B, length, ...]; a shorter one repeats its last row."""
    columns = [record[name] for record in records]
    return np.stack([column[np.minimum(np.arange(length), len(column) - 1)] for column in columns])
