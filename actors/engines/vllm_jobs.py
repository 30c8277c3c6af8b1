"""What a vLLM engine asks of its worker, and what it gets back."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy.typing as npt

from actors.behaviours import BlendedBehaviour
from actors.engines.protocol import Ints, SequenceRequest
from actors.head import PLAIN, Decoding, Head

Array = npt.NDArray[Any]

REQUEST_NUMBER = "number"
"""Key of a request's `extra_args` under which the engine puts the request's place in its job."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Laws:
    """What the worker draws from and records; fixed for the engine's life."""

    seed: int
    head: Head
    """How logits are read."""
    support_size: int | None
    """K; None for the whole vocabulary. As many as can be drawn, or more, are all."""


@dataclass(frozen=True, slots=True, kw_only=True)
class SampleJob:
    """Completions to sample, each from its `completion_ids` on; vLLM's requests point into `requests`."""

    requests: Sequence[SequenceRequest]
    decoding: Decoding = PLAIN
    """Read where one model samples alone."""
    behaviour: BlendedBehaviour | None = None
    """Read where a teacher is blended in."""
    with_spares: bool = False
    """Whether a spare draw from the tail is recorded beside each token."""


@dataclass(frozen=True, slots=True, kw_only=True)
class ScoreJob:
    """Tokens to score, each behind its prompt; the three sequences run in parallel."""

    prompt_lengths: Sequence[int]
    completions: Sequence[Ints]
    """[T] each."""
    support_ids: Sequence[Ints]
    """[T, K] each, one K for all."""


@dataclass(frozen=True, slots=True, kw_only=True)
class BlendCounts:
    """How much was verified."""

    num_passes: int
    """Passes of the teacher over drafts of a sequence, summed over sequences."""
    num_drafted: int
    """Drafts verified, those behind a refused one included."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Record:
    """All that was recorded since the job was set."""

    columns: Mapping[str, Array]
    """One row per token, sorted by `number` (the request's place in the job), then by `position` in its completion."""
    num_computed: int
    """Tokens that went through the model, those of prompts included."""
    num_undrafted: int
    """Rows that vLLM scheduled without a draft, from which nothing could be drawn exactly."""
    counts: BlendCounts
