"""The embedded engine: a transformers model with a batched cache and exact rollback, on CPU or GPU."""

import os
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from itertools import count
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor
from transformers import AutoModelForCausalLM

from actors.engines.errors import EngineError, LostSequenceError
from actors.engines.protocol import Draft, Generation, Ints, Scores, SequenceRequest
from actors.engines.ragged_cache import RaggedCache
from actors.random_numbers import Purpose, sample_from_logprobs, uniforms

_SCORE_ELEMENTS = 1 << 25


@dataclass(slots=True, kw_only=True)
class _Sequence:
    """A sequence in the cache. Entries of all its tokens but the last are cached."""

    request: SequenceRequest
    row: int
    last_token: int
    length: int
    pending: list[int] = field(default_factory=list)
    """Ids of the last draft or score, of which a commit keeps a prefix."""

    @property
    def num_new_tokens(self) -> int:
        return self.length - len(self.request.prompt_ids)


class TorchEngine:
    """Implements `SequenceEngine` (actors/engines/protocol.py) with a Hugging Face causal language model."""

    def __init__(
        self,
        *,
        model: str,
        seed: int,
        stop_token_id: int,
        support_size: int | None,
        temperature: float = 1.0,
        dtype: str = "float32",
        device: str = "cpu",
        threads: int = 1,
        max_num_sequences: int = 256,
    ) -> None:
        """Load the model.

        Args:
            model: a Hugging Face folder, or the name of a model on the Hub.
            seed: of the run's random numbers.
            stop_token_id: the token that ends a completion.
            support_size: K, how many of the likeliest ids are reported at each position; None for all, 0 for none.
            temperature: the laws drafted from and reported are softmax(logits / temperature).
            dtype: of the weights; log-probs are always computed in float32.
            device: a torch device.
            threads: CPU threads; 1 makes sums independent of the machine's load.
            max_num_sequences: how many sequences `generate` keeps in the cache at once.

        Raises:
            EngineError: if the model has attention this cache cannot serve.
        """
        torch.set_num_threads(threads)
        self._device = torch.device(device)
        loaded: Any = AutoModelForCausalLM.from_pretrained(
            model, dtype=getattr(torch, dtype), attn_implementation="sdpa"
        )
        self._model = loaded.to(self._device).eval().requires_grad_(False)
        other_attention = set(getattr(loaded.config, "layer_types", None) or ()) - {"full_attention"}
        if other_attention:
            raise EngineError(
                f"the torch engine needs full attention in every layer, {model} has {sorted(other_attention)}; "
                "use engine: vllm for this model"
            )
        self._num_layers: int = loaded.config.num_hidden_layers
        self._vocab_size: int = loaded.config.vocab_size
        self._seed, self._stop, self._temperature = seed, stop_token_id, temperature
        self._support_size = self._vocab_size if support_size is None else min(support_size, self._vocab_size)
        self._max_num_sequences = max_num_sequences
        self._cache = RaggedCache(self._num_layers)
        self._sequences: dict[int, _Sequence] = {}
        # Handles of an engine that died and was started again must not be taken for new ones.
        self._handles = count(int.from_bytes(os.urandom(6), "big"))
        self._policy_version = 0

    @property
    def policy_version(self) -> int:
        """Version of the weights in use."""
        return self._policy_version

    def open(self, requests: Sequence[SequenceRequest]) -> list[int]:
        """Admit sequences: run their prompts, all but the last token, through the model."""
        handles = []
        for request in requests:
            handle = next(self._handles)
            self._sequences[handle] = _Sequence(
                request=request, row=len(self._sequences), last_token=request.prompt_ids[-1],
                length=len(request.prompt_ids),
            )  # fmt: skip
            handles.append(handle)
        longest = max((len(r.prompt_ids) for r in requests), default=1) - 1
        if longest:
            padded = torch.zeros(len(requests), longest, dtype=torch.long)
            for i, request in enumerate(requests):
                padded[i, : len(request.prompt_ids) - 1] = torch.tensor(request.prompt_ids[:-1])
            positions = torch.arange(longest).expand(len(requests), -1)
            self._forward(handles, padded, positions, logits_to_keep=1)
        return handles

    @torch.inference_mode()
    def draft(self, sequences: Sequence[int], num_tokens: int) -> Draft:
        """Draw `num_tokens` tokens for each sequence, one forward each; nothing is committed."""
        steps = []
        states = self._states(sequences)
        tokens = torch.tensor([state.last_token for state in states])
        for state in states:
            state.pending = []
        for i in range(num_tokens):
            positions = torch.tensor([[state.length - 1 + i] for state in states])
            logprobs = self._logprobs(self._forward(sequences, tokens[:, None], positions))[:, 0]
            tokens = sample_from_logprobs(logprobs, self._uniforms(states, i, Purpose.TOKEN)).cpu()
            for state, token in zip(states, tokens.tolist(), strict=True):
                state.pending.append(token)
            steps.append((tokens, *self._support(logprobs, tokens, states, i)))
        columns = [torch.stack(parts, dim=1) for parts in zip(*steps, strict=True)]
        ids, token_logprobs, support_ids, support_logprobs, tail, spare, spare_logprobs = columns
        return Draft(
            token_ids=_ints(ids),
            token_logprobs=_floats(token_logprobs),
            support_ids=_ints(support_ids),
            support_logprobs=_floats(support_logprobs),
            tail_logprobs=_floats(tail),
            spare_ids=_ints(spare),
            spare_logprobs=_floats(spare_logprobs),
        )

    @torch.inference_mode()
    def score(self, sequences: Sequence[int], draft_ids: Ints, support_ids: Ints) -> Scores:
        """Score all k drafted tokens of each sequence in one forward; nothing is committed."""
        states = self._states(sequences)
        drafts = torch.from_numpy(np.asarray(draft_ids, dtype=np.int64))
        for state, row in zip(states, drafts.tolist(), strict=True):
            state.pending = row
        last = torch.tensor([[state.last_token] for state in states])
        starts = torch.tensor([[state.length - 1] for state in states])
        inputs = torch.cat([last, drafts[:, :-1]], dim=1)
        logprobs = self._logprobs(self._forward(sequences, inputs, starts + torch.arange(inputs.shape[1])))
        return _scores(logprobs, drafts, torch.from_numpy(np.asarray(support_ids, dtype=np.int64)))

    def commit(self, sequences: Sequence[int], num_accepted: Ints, replacement_ids: Ints) -> None:
        """Keep a prefix of each pending draft and append the replacement, if there is one."""
        for state, accepted, replacement in zip(
            self._states(sequences), num_accepted.tolist(), replacement_ids.tolist(), strict=True
        ):
            kept = state.pending[:accepted] + ([replacement] if replacement >= 0 else [])
            if kept:
                state.last_token = kept[-1]
                state.length += len(kept)
            state.pending = []

    def close(self, sequences: Sequence[int]) -> None:
        """Forget the sequences, where they are known; the rows that remain are moved together."""
        for handle in sequences:
            self._sequences.pop(handle, None)
        remaining = list(self._sequences.values())
        self._cache.keep(torch.tensor([state.row for state in remaining], dtype=torch.long, device=self._device))
        for row, state in enumerate(remaining):
            state.row = row

    def generate(self, requests: Sequence[SequenceRequest]) -> list[Generation]:
        """Sample every request to its end; finished sequences leave the batch at once."""
        generations: list[Generation] = []
        for first in range(0, len(requests), self._max_num_sequences):
            generations += self._generate_batch(requests[first : first + self._max_num_sequences])
        return generations

    def _generate_batch(self, requests: Sequence[SequenceRequest]) -> list[Generation]:
        handles = self.open(requests)
        active = dict(zip(handles, range(len(requests)), strict=True))
        steps: list[list[tuple[Draft, int]]] = [[] for _ in requests]
        finished: dict[int, Generation] = {}
        while active:
            sequences = list(active)
            draft = self.draft(sequences, 1)
            self.commit(sequences, np.ones(len(sequences), np.int32), np.full(len(sequences), -1, np.int32))
            ended = []
            for row, handle in enumerate(sequences):
                index = active[handle]
                steps[index].append((draft, row))
                stopped = int(draft.token_ids[row, 0]) == self._stop
                if stopped or len(steps[index]) == requests[index].max_new_tokens:
                    finished[index] = self._generation(steps[index], "stop" if stopped else "length")
                    ended.append(handle)
            if ended:
                self.close(ended)
            for handle in ended:
                del active[handle]
        return [finished[index] for index in range(len(requests))]

    def _generation(self, steps: Sequence[tuple[Draft, int]], finish_reason: str) -> Generation:
        return Generation(
            token_ids=np.array([d.token_ids[row, 0] for d, row in steps], np.int32),
            token_logprobs=np.array([d.token_logprobs[row, 0] for d, row in steps], np.float32),
            finish_reason=finish_reason,
            policy_versions=np.full(len(steps), self._policy_version, np.int32),
            support_ids=np.stack([d.support_ids[row, 0] for d, row in steps]),
            support_logprobs=np.stack([d.support_logprobs[row, 0] for d, row in steps]),
            tail_logprobs=np.array([d.tail_logprobs[row, 0] for d, row in steps], np.float32),
        )

    @torch.inference_mode()
    def score_completions(
        self, prompts: Sequence[tuple[int, ...]], completions: Sequence[Ints], support_ids: Sequence[Ints]
    ) -> list[Scores]:
        """Score finished completions in padded batches of bounded size, without a cache."""
        scores: list[Scores] = []
        longest = max((len(p) + len(c) for p, c in zip(prompts, completions, strict=True)), default=1)
        rows_at_once = max(1, _SCORE_ELEMENTS // (longest * self._vocab_size))
        for first in range(0, len(prompts), rows_at_once):
            chunk = slice(first, first + rows_at_once)
            scores += self._score_chunk(prompts[chunk], completions[chunk], support_ids[chunk])
        return scores

    def _score_chunk(
        self, prompts: Sequence[tuple[int, ...]], completions: Sequence[Ints], support_ids: Sequence[Ints]
    ) -> list[Scores]:
        texts = [[*p, *c.tolist()] for p, c in zip(prompts, completions, strict=True)]
        longest = max(map(len, texts))
        inputs = torch.tensor([text + [0] * (longest - len(text)) for text in texts], device=self._device)
        mask = torch.tensor([[1] * len(text) + [0] * (longest - len(text)) for text in texts], device=self._device)
        logits = self._model(input_ids=inputs, attention_mask=mask, use_cache=False).logits
        scores = []
        for row, (prompt, completion, support) in enumerate(zip(prompts, completions, support_ids, strict=True)):
            start = len(prompt) - 1
            logprobs = self._logprobs(logits[row : row + 1, start : start + len(completion)])
            ids = torch.from_numpy(np.asarray(completion, dtype=np.int64))[None]
            scores.append(_scores(logprobs, ids, torch.from_numpy(np.asarray(support, dtype=np.int64))[None]))
        return scores

    @torch.inference_mode()
    def load_weights(self, weights: Iterable[tuple[str, Tensor]], policy_version: int) -> None:
        """Copy the given parameters into the model; tied ones need not be given twice."""
        parameters = dict(self._model.named_parameters())
        for name, tensor in weights:
            if name not in parameters:
                raise EngineError(f"a published weight must be a parameter of the student's model, got {name!r}")
            parameters[name].copy_(tensor)
        self._policy_version = policy_version

    def shutdown(self) -> None:
        """Drop the model and the cache."""
        del self._model, self._cache

    def _states(self, sequences: Sequence[int]) -> list[_Sequence]:
        unknown = [handle for handle in sequences if handle not in self._sequences]
        if unknown:
            raise LostSequenceError(f"{len(unknown)} of {len(sequences)} sequences are not open in this engine")
        return [self._sequences[handle] for handle in sequences]

    def _forward(self, sequences: Sequence[int], inputs: Tensor, positions: Tensor, logits_to_keep: int = 0) -> Tensor:
        """Run [B, q] tokens of the sequences at [B, q] positions; return logits [B, q, V]."""
        rows = [self._sequences[handle].row for handle in sequences]
        num_rows = len(self._sequences)
        every_row = rows == list(range(num_rows))
        positions = positions.to(self._device)
        with torch.inference_mode():
            mask = self._cache.announce(
                None if every_row else torch.tensor(rows, device=self._device), positions, num_rows
            )
            logits: Tensor = self._model(
                input_ids=inputs.to(self._device),
                attention_mask=mask,
                position_ids=positions,
                past_key_values=self._cache,
                use_cache=True,
                logits_to_keep=logits_to_keep,
            ).logits
        return logits

    def _logprobs(self, logits: Tensor) -> Tensor:
        return torch.log_softmax(logits.float() / self._temperature, dim=-1)

    def _uniforms(self, states: Sequence[_Sequence], offset: int, purpose: Purpose) -> Tensor:
        return torch.from_numpy(
            uniforms(
                self._seed,
                [state.request.prompt_id for state in states],
                [state.request.sample_index for state in states],
                [state.num_new_tokens + offset for state in states],
                purpose,
            )
        )

    def _support(
        self, logprobs: Tensor, tokens: Tensor, states: Sequence[_Sequence], offset: int
    ) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
        """Return token log-probs [B], support ids and log-probs [B, K], log tail mass, spare ids and log-probs [B]."""
        token_logprobs = logprobs.gather(-1, tokens.to(logprobs.device)[:, None])[:, 0]
        support_logprobs, support_ids = logprobs.topk(self._support_size, dim=-1)
        if self._support_size in (0, self._vocab_size):
            tail = torch.full_like(token_logprobs, 0.0 if self._support_size == 0 else -torch.inf)
            spare, spare_logprobs = torch.full_like(tokens, -1), torch.full_like(token_logprobs, -torch.inf)
        else:
            outside = logprobs.scatter(-1, support_ids, -torch.inf)
            tail = torch.logsumexp(outside, dim=-1)
            spare = sample_from_logprobs(outside, self._uniforms(states, offset, Purpose.SPARE))
            spare_logprobs = logprobs.gather(-1, spare[:, None])[:, 0]
        return token_logprobs, support_ids, support_logprobs, tail, spare, spare_logprobs


def _scores(logprobs: Tensor, token_ids: Tensor, support_ids: Tensor) -> Scores:
    """Gather [B, k, V] log-probs at [B, k] tokens and [B, k, K] ids."""
    tokens, support = token_ids.to(logprobs.device), support_ids.to(logprobs.device)
    outside = logprobs.scatter(-1, support, -torch.inf)
    return Scores(
        token_logprobs=_floats(logprobs.gather(-1, tokens[..., None])[..., 0]),
        support_logprobs=_floats(logprobs.gather(-1, support)),
        tail_logprobs=_floats(torch.logsumexp(outside, dim=-1)),
    )


def _ints(tensor: Tensor) -> npt.NDArray[np.int32]:
    return tensor.to(torch.int32).cpu().numpy()


def _floats(tensor: Tensor) -> npt.NDArray[np.float32]:
    return tensor.float().cpu().numpy()
