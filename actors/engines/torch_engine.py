"""The embedded engine: a transformers model with a batched cache and exact rollback, on CPU or GPU.

In the shapes n is the number of rows of a forward, V the size of the shared vocabulary.
"""

import os
from collections import deque
from collections.abc import Collection, Iterable, Sequence
from dataclasses import dataclass, field
from itertools import count
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor
from transformers import AutoModelForCausalLM

from actors.engines.errors import EngineError, LostSequenceError
from actors.engines.protocol import Draft, Generation, Ints, Scores, SequenceRequest, Support
from actors.engines.ragged_cache import ATTENTION, RaggedCache
from actors.engines.torch_columns import Columns, beside, bits, gathered
from actors.engines.torch_running import Running, uniforms_from
from actors.head import PLAIN, Decoding, Head
from actors.random_numbers import Purpose, prompt_keys, sample_from_logprobs
from actors.teacher_signal import SignalSpec

_SCORE_ELEMENTS = 1 << 25
"""Logits, tokens times vocabulary, that one forward of `score_completions` may have."""
_PASS_TOKENS = 1 << 12
"""Tokens, padding included, of one forward that fills the cache or scores completions."""


@dataclass(slots=True, eq=False, kw_only=True)
class _Sequence:
    """A sequence in the cache. Entries of all its tokens but the last are cached."""

    request: SequenceRequest
    lane: int
    row: int
    last_token: int
    length: int
    pending: Ints = field(default_factory=lambda: np.zeros(0, np.int32))
    """Ids of the last draft or score, of which a commit keeps a prefix."""

    @property
    def num_new_tokens(self) -> int:
        return self.length - len(self.request.prompt_ids)


@dataclass(slots=True)
class _Lane:
    """Sequences that are drafted and scored together; they fill rows 0 to n - 1 of a cache of their own."""

    cache: RaggedCache
    rows: list[_Sequence] = field(default_factory=list)


@dataclass(frozen=True, slots=True)
class _Batch:
    """The sequences of a call in the order in which they are run: that of their rows where these are neighbours."""

    cache: RaggedCache
    states: list[_Sequence]
    rows: slice | Tensor
    asked: npt.NDArray[np.intp] | None
    """For each sequence of the call its place in `states`; None where it is the same."""

    def from_call(self, values: npt.NDArray[Any]) -> npt.NDArray[Any]:
        """Order [n, ...] values of the call as the states are."""
        return values if self.asked is None else values[np.argsort(self.asked)]

    def to_call(self, values: npt.NDArray[Any]) -> npt.NDArray[Any]:
        """Order [n, ...] values of the states as the call is."""
        return values if self.asked is None else values[self.asked]


@dataclass(frozen=True, slots=True, kw_only=True)
class _Places:
    """Finished texts as a padded batch, and where in it the n tokens of all completions are predicted."""

    inputs: Tensor
    """[B, longest] ids."""
    rows: npt.NDArray[np.intp]
    """[n]."""
    predicting: npt.NDArray[np.intp]
    """[n] positions."""
    ends: npt.NDArray[np.intp]
    """[B - 1] where the tokens of one completion end and those of the next begin."""

    @classmethod
    def of(cls, texts: Sequence[list[int]], sizes: Sequence[int]) -> "_Places":
        """Place texts of which the last so many tokens are the completion."""
        firsts = np.array([len(text) - size - 1 for text, size in zip(texts, sizes, strict=True)])
        within = np.arange(sum(sizes)) - np.repeat(np.cumsum(sizes) - sizes, sizes)
        return cls(
            inputs=_padded(texts),
            rows=np.repeat(np.arange(len(texts)), sizes),
            predicting=np.repeat(firsts, sizes) + within,
            ends=np.cumsum(sizes)[:-1],
        )


class TorchEngine:
    """Implements `SequenceEngine` (actors/engines/protocol.py) with a Hugging Face causal language model."""

    def __init__(
        self,
        *,
        model: str,
        seed: int,
        head: Head,
        support_size: int | None,
        dtype: str = "float32",
        device: str = "cpu",
        threads: int = 1,
        max_num_sequences: int = 256,
    ) -> None:
        """Load the model.

        Args:
            model: a Hugging Face folder, or the name of a model on the Hub.
            seed: of the run's random numbers.
            head: how its logits are read.
            support_size: K, how many of the likeliest ids are reported at each position; None for all, 0 for none.
                As many as can be drawn, or more, are all.
            dtype: of the weights; log-probs are always computed in float32.
            device: a torch device.
            threads: CPU threads; 1 makes sums independent of the machine's load.
            max_num_sequences: how many sequences `generate` keeps in the cache at once.

        Raises:
            EngineError: if the model has attention this cache cannot serve, or lacks ids that the head has.
        """
        torch.set_num_threads(threads)
        self._device = torch.device(device)
        loaded: Any = AutoModelForCausalLM.from_pretrained(
            model, dtype=getattr(torch, dtype), attn_implementation="sdpa"
        )
        # Only now, because a model that "sdpa" cannot serve is refused above.
        loaded.set_attn_implementation(ATTENTION)
        self._model = loaded.to(self._device).eval().requires_grad_(False)
        layer_types = getattr(loaded.config, "layer_types", None)
        if layer_types is None and getattr(loaded.config, "sliding_window", None):
            layer_types = ["sliding_attention"]
        other_attention = set(layer_types or ()) - {"full_attention"}
        if other_attention:
            raise EngineError(
                f"the torch engine needs full attention in every layer, {model} has {sorted(other_attention)}; "
                "use engine: vllm for this model"
            )
        self._num_layers: int = loaded.config.num_hidden_layers
        self._vocab_size = _shared_vocabulary(head, loaded.config.vocab_size, model)
        self._seed, self._head = seed, head
        self._support_size = head.num_reported(support_size, self._vocab_size)
        self._max_num_sequences = max_num_sequences
        self._lanes: dict[int, _Lane] = {}
        self._own_cache = RaggedCache(self._num_layers)
        self._sequences: dict[int, _Sequence] = {}
        # Handles of an engine that died and was started again must not be taken for new ones.
        self._handles = count(int.from_bytes(os.urandom(6), "big"))
        self._policy_version = 0
        self._head_is_known_to_be_plain = False

    @property
    def policy_version(self) -> int:
        """Version of the weights in use."""
        return self._policy_version

    @torch.inference_mode()
    def open(self, requests: Sequence[SequenceRequest], lane: int = 0) -> list[int]:
        """Admit sequences to a lane: run all their tokens but the last through the model."""
        into = self._lanes.setdefault(lane, _Lane(RaggedCache(self._num_layers)))
        handles = [next(self._handles) for _ in requests]
        for i in self._prefill(into.cache, len(into.rows), requests):
            text = requests[i].token_ids
            state = _Sequence(request=requests[i], lane=lane, row=len(into.rows), last_token=text[-1], length=len(text))
            self._sequences[handles[i]] = state
            into.rows.append(state)
        return handles

    @torch.inference_mode()
    def draft(self, sequences: Sequence[int], num_tokens: int) -> Draft:
        """Draw `num_tokens` tokens for each sequence, one forward each; nothing is committed."""
        batch = self._batch(sequences)
        tokens, positions = self._last(batch)
        uniforms = self._uniforms(batch.states, num_tokens, Purpose.TOKEN)
        spares = self._uniforms(batch.states, num_tokens, Purpose.SPARE) if self._has_tail else None
        columns = Columns(self._support_size, self._vocab_size)
        for i in range(num_tokens):
            logprobs = self._logprobs(self._forward(batch.cache, batch.rows, tokens[:, None], positions + i))[:, 0]
            tokens = sample_from_logprobs(logprobs, uniforms[i])
            columns.add(tokens, logprobs, spare_uniforms=None if spares is None else spares[i])
        told: dict[str, Any] = {
            name: batch.to_call(column.reshape(num_tokens, len(sequences), *column.shape[1:]).swapaxes(0, 1))
            for name, column in columns.collect().items()
            if name != "behaviour_logprobs"
        }
        for handle, row in zip(sequences, told["token_ids"], strict=True):
            self._sequences[handle].pending = row
        return Draft(**told)

    @torch.inference_mode()
    def score(self, sequences: Sequence[int], draft_ids: Ints, support_ids: Ints) -> Scores:
        """Score all k drafted tokens of each sequence in one forward; nothing is committed."""
        batch = self._batch(sequences)
        drafted, num_tokens = np.asarray(draft_ids), np.shape(draft_ids)[1]
        last, starts = self._last(batch)
        drafts = self._ids(batch.from_call(drafted))
        inputs = torch.cat([last[:, None], drafts[:, :-1]], dim=1)
        positions = starts + torch.arange(num_tokens, device=self._device)
        logprobs = self._logprobs(self._forward(batch.cache, batch.rows, inputs, positions))
        scores = gathered(logprobs, drafts, self._ids(batch.from_call(np.asarray(support_ids))))
        for handle, row in zip(sequences, drafted, strict=True):
            self._sequences[handle].pending = row
        return Scores(
            token_logprobs=batch.to_call(scores.token_logprobs),
            support_logprobs=batch.to_call(scores.support_logprobs),
            tail_logprobs=batch.to_call(scores.tail_logprobs),
        )

    def commit(self, sequences: Sequence[int], num_accepted: Ints, replacement_ids: Ints) -> None:
        """Keep a prefix of each pending draft and append the replacement, if there is one."""
        for state, accepted, replacement in zip(
            self._states(sequences), num_accepted.tolist(), replacement_ids.tolist(), strict=True
        ):
            # The last drafted token has not been run: there is no entry of it for a replacement to follow.
            assert accepted + (replacement >= 0) <= len(state.pending)
            if replacement >= 0:
                state.last_token = replacement
            elif accepted:
                state.last_token = int(state.pending[accepted - 1])
            state.length += accepted + (replacement >= 0)
            state.pending = state.pending[:0]

    @torch.inference_mode()
    def close(self, sequences: Sequence[int]) -> None:
        """Forget the sequences, where they are known; the last rows of their lane take their places."""
        ended: dict[int, list[int]] = {}
        for handle in sequences:
            state = self._sequences.pop(handle, None)
            if state is not None:
                ended.setdefault(state.lane, []).append(state.row)
        for number, rows in ended.items():
            lane = self._lanes[number]
            used = [state.length - 1 + len(state.pending) for state in lane.rows]
            lane.rows = [lane.rows[row] for row in _drop(lane.cache, rows, used)]
            for row, state in enumerate(lane.rows):
                state.row = row

    @torch.inference_mode()
    def generate(
        self, requests: Sequence[SequenceRequest], decoding: Decoding = PLAIN, *, with_support: bool = True
    ) -> list[Generation]:
        """Sample every request to its end; places of those that have ended are taken by the next."""
        cache, columns = self._own_cache, Columns(self._support_size if with_support else 0, self._vocab_size)
        waiting = deque(i for i, r in enumerate(requests) if r.num_left > 0)
        reasons = ["length"] * len(requests)
        running = Running(self._seed, requests)
        owners = []
        while waiting or len(running):
            free = min(len(waiting), self._max_num_sequences - len(running))
            # Prompts are run a few at a time: each run costs about as much as a step of all rows.
            if free and free >= min(self._max_num_sequences // 16, len(waiting)):
                taken = [waiting.popleft() for _ in range(free)]
                order = self._prefill(cache, len(running), [requests[i] for i in taken])
                running.admit([taken[i] for i in order])
            tokens = self._ids(running.last_tokens)[:, None]
            rows, positions = slice(0, len(running)), self._ids(running.lengths - 1)[:, None]
            logprobs = self._logprobs(self._forward(cache, rows, tokens, positions))[:, 0]
            law = decoding.logprobs(logprobs)
            drawn = sample_from_logprobs(law, torch.from_numpy(running.uniforms()))
            columns.add(drawn, logprobs, behaviour=None if decoding.is_plain else law)
            owners.append(running.owners)
            running.append(drawn.cpu().numpy())
            stopped = running.last_tokens == self._head.stop_token_id
            ended = np.flatnonzero(stopped | (running.num_left == 0))
            if len(ended):
                for owner in running.owners[stopped]:
                    reasons[owner] = "stop"
                running.keep(_drop(cache, ended.tolist(), (running.lengths - 1).tolist()))
        return self._generations(columns, owners, reasons)

    def _generations(
        self, columns: Columns, owners: Sequence[npt.NDArray[np.intp]], reasons: Sequence[str]
    ) -> list[Generation]:
        """Sort what all steps told by the request that it is of."""
        told = columns.collect()
        of_request = np.concatenate([np.zeros(0, np.intp), *owners])
        order = np.argsort(of_request, kind="stable")
        ends = np.cumsum(np.bincount(of_request, minlength=len(reasons)))[:-1]
        parts: dict[str, list[Any]] = {
            name: np.split(column[order], ends) for name, column in told.items() if not name.startswith("spare")
        }
        return [
            Generation(
                finish_reason=reason,
                policy_versions=np.full(len(parts["token_ids"][i]), self._policy_version, np.int32),
                **{name: part[i] for name, part in parts.items()},
            )
            for i, reason in enumerate(reasons)
        ]

    @torch.inference_mode()
    def score_completions(
        self, prompts: Sequence[tuple[int, ...]], completions: Sequence[Ints], support_ids: Sequence[Ints]
    ) -> list[Scores]:
        """Score finished completions in batches of like length and bounded size, without a cache."""
        return [scores for scores, _ in self._scored(prompts, completions, support_ids, None)]

    @torch.inference_mode()
    def score_beside(
        self,
        prompts: Sequence[tuple[int, ...]],
        completions: Sequence[Ints],
        support_ids: Sequence[Ints],
        signal: SignalSpec,
    ) -> list[tuple[Scores, Support]]:
        """Score as `score_completions` does, and return with each what the signal wants of the same laws."""
        told = self._scored(prompts, completions, support_ids, signal)
        return [(scores, beside) for scores, beside in told if beside is not None]

    @torch.inference_mode()
    def last_hidden(
        self, prompts: Sequence[tuple[int, ...]], completions: Sequence[Ints]
    ) -> list[npt.NDArray[np.float32] | npt.NDArray[np.uint16]]:
        """Return [T, H] of each completion: what the output head makes the logits of its T tokens of.

        They are float32, or the bits of bfloat16 as uint16 for weights of that type. No logit is computed.

        Raises:
            EngineError: if the model's logits are not its output head's product with them.
        """
        texts = [[*prompt, *completion.tolist()] for prompt, completion in zip(prompts, completions, strict=True)]
        if not self._head_is_known_to_be_plain:
            self._require_plain_head(_padded(texts[:1]).to(self._device))
        told: dict[int, npt.NDArray[Any]] = {}
        for chunk in _chunks([len(text) for text in texts], _PASS_TOKENS):
            places = _Places.of([texts[i] for i in chunk], [len(completions[i]) for i in chunk])
            hidden = self._body(places.inputs.to(self._device))
            flat = hidden[self._ids(places.rows), self._ids(places.predicting)]
            told.update(zip(chunk, np.split(bits(flat), places.ends), strict=True))
        return [told[i] for i in range(len(texts))]

    def _scored(
        self,
        prompts: Sequence[tuple[int, ...]],
        completions: Sequence[Ints],
        support_ids: Sequence[Ints],
        signal: SignalSpec | None,
    ) -> list[tuple[Scores, Support | None]]:
        texts = [[*prompt, *completion.tolist()] for prompt, completion in zip(prompts, completions, strict=True)]
        limit = min(_PASS_TOKENS, _SCORE_ELEMENTS // self._vocab_size)
        scored: dict[int, tuple[Scores, Support | None]] = {}
        for chunk in _chunks([len(text) for text in texts], limit):
            places = _Places.of([texts[i] for i in chunk], [len(completions[i]) for i in chunk])
            logprobs = self._logprobs_at(places)
            ids, support = (
                self._ids(np.concatenate([values[i] for i in chunk])) for values in (completions, support_ids)
            )
            scores = _split_scores(gathered(logprobs, ids, support), places.ends)
            besides: list[Any] = [None] * len(chunk)
            if signal is not None:
                besides = _split_support(beside(logprobs, support, signal), places.ends)
            scored.update(zip(chunk, zip(scores, besides, strict=True), strict=True))
        return [scored[i] for i in range(len(texts))]

    def _logprobs_at(self, places: "_Places") -> Tensor:
        """Return [n, V] log-probs of all completions' tokens."""
        width = places.inputs.shape[1]
        first = int(places.predicting.min(initial=width - 1))
        # Causal attention: what is predicted within a text does not see the padding behind it.
        logits = self._model(
            input_ids=places.inputs.to(self._device), use_cache=False, logits_to_keep=width - first
        ).logits
        return self._logprobs(logits[self._ids(places.rows), self._ids(places.predicting - first)])

    def _body(self, inputs: Tensor) -> Tensor:
        hidden: Tensor = self._model.base_model(input_ids=inputs, use_cache=False).last_hidden_state
        return hidden

    def _require_plain_head(self, inputs: Tensor) -> None:
        logits = self._model(input_ids=inputs, use_cache=False, logits_to_keep=1).logits
        if not torch.allclose(logits, self._model.get_output_embeddings()(self._body(inputs)[:, -1:])):
            raise EngineError(
                "the signal hidden needs a teacher whose logits are its output head times its last hidden state, "
                f"{self._model.config.name_or_path} does more to them; choose the signal support or full"
            )
        self._head_is_known_to_be_plain = True

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
        """Drop the model and the caches."""
        del self._model, self._lanes, self._own_cache

    @property
    def _has_tail(self) -> bool:
        return 0 < self._support_size < self._vocab_size

    def _states(self, sequences: Sequence[int]) -> list[_Sequence]:
        unknown = [handle for handle in sequences if handle not in self._sequences]
        if unknown:
            raise LostSequenceError(f"{len(unknown)} of {len(sequences)} sequences are not open in this engine")
        return [self._sequences[handle] for handle in sequences]

    def _batch(self, sequences: Sequence[int]) -> _Batch:
        """Return how to run these sequences, which are of one lane."""
        states = self._states(sequences)
        assert len({state.lane for state in states}) == 1, "sequences of one lane are drafted and scored together"
        lane = self._lanes[states[0].lane]
        rows = [state.row for state in states]
        first, stop = min(rows), max(rows) + 1
        assert len(set(rows)) == len(rows), "a sequence was named twice"
        if stop - first > len(rows):
            return _Batch(lane.cache, states, torch.tensor(rows, device=self._device), None)
        in_order = lane.rows[first:stop]
        return _Batch(lane.cache, in_order, slice(first, stop), None if in_order == states else np.array(rows) - first)

    def _last(self, batch: _Batch) -> tuple[Tensor, Tensor]:
        """Return the sequences' last tokens [n] and the positions [n, 1] of these."""
        tokens = np.array([state.last_token for state in batch.states])
        return self._ids(tokens), self._ids(np.array([[state.length - 1] for state in batch.states]))

    def _prefill(self, cache: RaggedCache, first_row: int, requests: Sequence[SequenceRequest]) -> list[int]:
        """Fill the rows from the first with all tokens but the last; return which request each row holds."""
        texts = [request.token_ids[:-1] for request in requests]
        order: list[int] = []
        for chunk in _chunks([len(text) for text in texts], _PASS_TOKENS):
            inputs = _padded([texts[i] for i in chunk]).to(self._device)
            rows = slice(first_row + len(order), first_row + len(order) + len(chunk))
            order += chunk
            if inputs.shape[1]:
                positions = torch.arange(inputs.shape[1], device=self._device).expand(len(chunk), -1)
                # The body alone: a prompt's logits are not wanted.
                self._forward(cache, rows, inputs, positions, self._model.base_model)
        return order

    def _forward(
        self, cache: RaggedCache, rows: slice | Tensor, inputs: Tensor, positions: Tensor, model: Any = None
    ) -> Any:
        """Run [n, q] tokens at [n, q] positions of the rows; return the model's output."""
        return (self._model if model is None else model)(
            input_ids=inputs,
            attention_mask=cache.announce(rows, positions, self._model.dtype),
            position_ids=positions,
            past_key_values=cache,
            use_cache=True,
        )

    def _logprobs(self, output: Any) -> Tensor:
        """Return [..., V] log-probs of the head, from a model's output or its logits."""
        return self._head.logprobs(output if isinstance(output, Tensor) else output.logits)

    def _uniforms(self, states: Sequence[_Sequence], num_tokens: int, purpose: Purpose) -> Tensor:
        """Return [num_tokens, n] uniforms of the next positions."""
        keys = prompt_keys(self._seed, [state.request.prompt_id for state in states])
        samples = np.array([state.request.sample_index for state in states])
        first = np.array([state.num_new_tokens for state in states])
        return torch.from_numpy(uniforms_from(keys, samples, first, num_tokens, purpose))

    def _ids(self, values: npt.NDArray[Any]) -> Tensor:
        return torch.from_numpy(np.asarray(values, np.int64)).to(self._device)


def _split_scores(scores: Scores, ends: npt.NDArray[np.intp]) -> list[Scores]:
    columns = (scores.token_logprobs, scores.support_logprobs, scores.tail_logprobs)
    return [
        Scores(token_logprobs=tokens[None], support_logprobs=support[None], tail_logprobs=tail[None])
        for tokens, support, tail in zip(*(np.split(column, ends) for column in columns), strict=True)
    ]


def _split_support(support: Support, ends: npt.NDArray[np.intp]) -> list[Support]:
    columns: list[list[Any]] = [
        [None] * (len(ends) + 1) if column is None else np.split(column, ends)
        for column in (support.ids, support.logprobs, support.tail_logprobs)
    ]
    return [
        Support(ids=ids, logprobs=logprobs, tail_logprobs=tails) for ids, logprobs, tails in zip(*columns, strict=True)
    ]


def _shared_vocabulary(head: Head, width: int, model: str) -> int:
    """Return V of a model with logits [..., width]."""
    size = width if head.vocab_size is None else head.vocab_size
    if size > width:
        raise EngineError(f"the shared vocabulary has {size} ids, but the logits of {model} are {width} wide")
    if not all(0 <= stop < size for stop in head.stop_token_ids):
        raise EngineError(
            f"stop tokens must be among the {size} ids of the shared vocabulary, got {list(head.stop_token_ids)} "
            f"for {model}"
        )
    return size


def _padded(texts: Sequence[Sequence[int]]) -> Tensor:
    """Return [n, longest] ids, padded on the right."""
    padded = np.zeros((len(texts), max(map(len, texts))), np.int64)
    for row, text in zip(padded, texts, strict=True):
        row[: len(text)] = text
    return torch.from_numpy(padded)


def _chunks(lengths: Sequence[int], limit: int) -> list[list[int]]:
    """Group numbers of like length: each group padded to its longest has at most `limit` tokens, or one member."""
    chunks: list[list[int]] = []
    for i in sorted(range(len(lengths)), key=lengths.__getitem__):
        if chunks and lengths[i] * (len(chunks[-1]) + 1) <= limit:
            chunks[-1].append(i)
        else:
            chunks.append([i])
    return chunks


def _drop(cache: RaggedCache, ended: Collection[int], used: Sequence[int]) -> list[int]:
    """Move last rows into the holes of those that ended, with their used slots; return which row each one was."""
    order = list(range(len(used)))
    for row in sorted(ended, reverse=True):
        order[row] = order[-1]
        order.pop()
    moved = [(source, row) for row, source in enumerate(order) if source != row]
    cache.move([source for source, _ in moved], [row for _, row in moved], max((used[s] for s, _ in moved), default=0))
    return order
