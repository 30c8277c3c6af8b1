"""What a vLLM engine asks of its worker, and what it gets back."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy.typing as npt

from actors.engines.protocol import Ints, SequenceRequest

Array = npt.NDArray[Any]

REQUEST_NUMBER = "number"
"""Key of a request's `extra_args` under which the engine puts the request's place in its job."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Laws:
    """What the worker draws from and records; fixed for the engine's life."""

    seed: int
    temperature: float
    support_size: int | None
    """K; None for the whole vocabulary."""
    stop_token_id: int


@dataclass(frozen=True, slots=True, kw_only=True)
class SampleJob:
    """Completions to sample; vLLM's requests point into `requests`."""

    requests: Sequence[SequenceRequest]
    epsilon: float = 0.0
    """Budget in nats; read where a teacher is blended in."""


@dataclass(frozen=True, slots=True, kw_only=True)
class ScoreJob:
    """Finished completions to score; the three sequences run in parallel."""

    prompt_lengths: Sequence[int]
    completions: Sequence[Ints]
    """[T] each."""
    support_ids: Sequence[Ints]
    """[T, K] each, one K for all."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Record:
    """All that was recorded since the job was set."""

    columns: Mapping[str, Array]
    """One row per token, sorted by `number` (the request's place in the job), then by `position` (from 0)."""
    num_undrafted: int
    """Rows that vLLM scheduled without a draft, from which nothing could be drawn exactly."""
