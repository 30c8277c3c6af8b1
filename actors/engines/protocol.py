"""What an engine is: something that holds one model, opens sequences and tells log-probs. It knows nothing of TRB.

B is the number of sequences in a call, k the draft length, K the support size, V the vocabulary.
"""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Protocol

import numpy as np
import numpy.typing as npt

from actors.head import PLAIN, Decoding

if TYPE_CHECKING:
    import torch

    from actors.teacher_signal import SignalSpec

Ints = npt.NDArray[np.int32]
Floats = npt.NDArray[np.float32]


@dataclass(frozen=True, slots=True, kw_only=True)
class SequenceRequest:
    """One completion to sample. (prompt_id, sample_index) keys its random numbers."""

    prompt_id: str
    sample_index: int
    prompt_ids: tuple[int, ...]
    max_new_tokens: int
    completion_ids: tuple[int, ...] = ()
    """Tokens of the completion that are there already; sampling goes on after them."""

    @property
    def token_ids(self) -> tuple[int, ...]:
        """All tokens so far, of prompt and completion."""
        return (*self.prompt_ids, *self.completion_ids)

    @property
    def num_left(self) -> int:
        """How many tokens are still to be sampled."""
        return self.max_new_tokens - len(self.completion_ids)


@dataclass(frozen=True, slots=True, kw_only=True)
class Draft:
    """What a student proposes for its next k positions; log-probs in nats, under the student at its temperature."""

    token_ids: Ints
    """[B, k]."""
    token_logprobs: Floats
    """[B, k]."""
    support_ids: Ints
    """[B, k, K], sorted by falling log-prob."""
    support_logprobs: Floats
    """[B, k, K]."""
    tail_logprobs: Floats
    """[B, k] log mass outside the support; -inf where K = V."""
    spare_ids: Ints
    """[B, k] one spare draw from the tail's inner law, independent of the draft; -1 where K = V."""
    spare_logprobs: Floats
    """[B, k] of the spare draws; -inf where K = V."""

    @property
    def has_tail(self) -> bool:
        """Whether the support is less than the vocabulary."""
        return bool((self.spare_ids >= 0).all())

    @property
    def ids(self) -> "DraftedIds":
        """What a teacher needs to know."""
        return DraftedIds(token_ids=self.token_ids, support_ids=self.support_ids, spare_ids=self.spare_ids)


@dataclass(frozen=True, slots=True, kw_only=True)
class DraftedIds:
    """The ids of a `Draft` without their log-probs."""

    token_ids: Ints
    """[B, k]."""
    support_ids: Ints
    """[B, k, K]."""
    spare_ids: Ints
    """[B, k], -1 where K = V."""

    @property
    def requested(self) -> Ints:
        """The ids a teacher is asked for: the support and, where there is a tail, the spare as column K."""
        if not (self.spare_ids >= 0).all():
            return self.support_ids
        return np.concatenate([self.support_ids, self.spare_ids[..., None]], -1)


@dataclass(frozen=True, slots=True, kw_only=True)
class DraftedLogprobs:
    """The log-probs of a `Draft` without their ids."""

    token_logprobs: Floats
    """[B, k]."""
    support_logprobs: Floats
    """[B, k, K]."""
    tail_logprobs: Floats
    """[B, k]."""
    spare_logprobs: Floats
    """[B, k]."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Scores:
    """What a model says of given ids at given positions; log-probs in nats, over its full vocabulary."""

    token_logprobs: Floats
    """[B, k] of the drafted tokens."""
    support_logprobs: Floats
    """[B, k, K] at the requested support ids."""
    tail_logprobs: Floats
    """[B, k] log mass outside the requested support, by logsumexp over the complement; -inf where K = V."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Support:
    """One model's log-probs, in nats, on some ids at each of T positions of a completion."""

    ids: Ints | None
    """[T, K], all different at each position; None where they are all ids in the vocabulary's order."""
    logprobs: Floats
    """[T, K]."""
    tail_logprobs: Floats | None
    """[T] log mass outside the ids; None where nothing is outside."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Generation:
    """One completion that an engine sampled by itself; T tokens."""

    token_ids: Ints
    """[T], the stop token included where one was drawn."""
    token_logprobs: Floats
    """[T] under the model."""
    behaviour_logprobs: Floats
    """[T] under the law drawn from: the same where the decoding is plain."""
    finish_reason: str
    """'stop' or 'length'."""
    policy_versions: Ints
    """[T]."""
    support_ids: Ints
    """[T, K], sorted by falling log-prob."""
    support_logprobs: Floats
    """[T, K]."""
    tail_logprobs: Floats
    """[T]."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Settlement:
    """What became of the last draft or score of some sequences, for `commit` or, where they have ended, `close`."""

    sequences: tuple[int, ...]
    num_accepted: Ints | None = None
    """[B] drafts kept; None: the sequences are closed."""
    replacement_ids: Ints | None = None
    """[B], -1 where none."""

    def apply(self, engine: "SequenceEngine") -> None:
        """Tell the engine."""
        if self.num_accepted is None or self.replacement_ids is None:
            engine.close(self.sequences)
        else:
            engine.commit(self.sequences, self.num_accepted, self.replacement_ids)


class Engine(Protocol):
    """Generates whole completions and scores finished ones."""

    @property
    def policy_version(self) -> int:
        """Version of the weights that the next token will be drawn from."""

    def generate(
        self, requests: Sequence[SequenceRequest], decoding: Decoding = PLAIN, *, with_support: bool = True
    ) -> list[Generation]:
        """Sample every request to its end, as many at once as the engine can; a place that is free is filled.

        Without a support, K is 0.
        """

    def score_completions(
        self, prompts: Sequence[tuple[int, ...]], completions: Sequence[Ints], support_ids: Sequence[Ints]
    ) -> list[Scores]:
        """Score finished completions (each [T]) at requested ids (each [T, K]); one `Scores` each, with B = 1."""

    def load_weights(self, weights: Iterable[tuple[str, "torch.Tensor"]], policy_version: int) -> None:
        """Replace the weights in place (Hugging Face parameter names) and stamp what follows with the version."""

    def shutdown(self) -> None:
        """Free the model."""


class TellingEngine(Engine, Protocol):
    """Also tells more of finished completions than log-probs at ids that the caller knows."""

    def score_beside(
        self,
        prompts: Sequence[tuple[int, ...]],
        completions: Sequence[Ints],
        support_ids: Sequence[Ints],
        signal: "SignalSpec",
    ) -> list[tuple[Scores, Support]]:
        """Score as `score_completions` does, and return with each what the signal wants of the same laws."""

    def last_hidden(
        self, prompts: Sequence[tuple[int, ...]], completions: Sequence[Ints]
    ) -> list[Floats | npt.NDArray[np.uint16]]:
        """Return the last hidden states [T, H] of which each completion's tokens are predicted."""


class SequenceEngine(Engine, Protocol):
    """Also lets a caller steer each token: draft, score, commit, over one KV cache with exact rollback."""

    def open(self, requests: Sequence[SequenceRequest], lane: int = 0) -> list[int]:
        """Admit sequences and return their handles.

        Sequences of one lane are drafted and scored together; lanes take turns without disturbing one another.
        """

    def draft(self, sequences: Sequence[int], num_tokens: int) -> Draft:
        """Propose `num_tokens` tokens for each sequence; nothing is committed."""

    def score(self, sequences: Sequence[int], draft_ids: Ints, support_ids: Ints) -> Scores:
        """Score [B, k] drafted tokens at [B, k, K] ids in one pass; nothing is committed."""

    def commit(self, sequences: Sequence[int], num_accepted: Ints, replacement_ids: Ints) -> None:
        """Keep the first num_accepted [B] tokens of the last draft or score; append replacement_ids [B] (-1: none).

        Everything else of the draft is rolled back.
        """

    def close(self, sequences: Sequence[int]) -> None:
        """Forget the sequences and free their cache."""
