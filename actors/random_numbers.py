"""Counter-based random numbers: each draw is a function of what it is for, of nothing else.

A uniform is keyed by (seed, prompt, sample, position, purpose), so it depends neither on the batch it is drawn in,
nor on the draft length, the actor or a restart. The generator is Philox4x32-10 (Salmon, Moraes, Dror and Shaw,
"Parallel random numbers: as easy as 1, 2, 3", 2011), written over arrays of keys because the libraries' own takes
one key at a time.
"""

from collections.abc import Sequence
from enum import IntEnum
from functools import lru_cache
from hashlib import blake2b

import numpy as np
import numpy.typing as npt
import torch

Words = npt.NDArray[np.uint64]

_LOW = np.uint64(0xFFFFFFFF)
_MULTIPLIERS = (np.uint64(0xD2511F53), np.uint64(0xCD9E8D57))
_WEYL = (np.uint64(0x9E3779B9), np.uint64(0xBB67AE85))


class Purpose(IntEnum):
    """What a draw decides."""

    TOKEN = 0
    """The student's token."""
    SPARE = 1
    """The spare token from the tail of the student's law."""
    ACCEPT = 2
    """Whether a draft is kept."""
    REPLACE = 3
    """What stands in for a refused draft."""


def philox4x32(counter: Words, key: Words) -> Words:
    """Return ten rounds of Philox4x32.

    Args:
        counter: [N, 4] words below 2**32.
        key: [N, 2] words below 2**32.

    Returns:
        [N, 4] random words below 2**32.
    """
    c0, c1, c2, c3 = (counter[:, i] for i in range(4))
    k0, k1 = key[:, 0], key[:, 1]
    shift = np.uint64(32)
    for _ in range(10):
        product0, product1 = _MULTIPLIERS[0] * c0, _MULTIPLIERS[1] * c2
        c0, c1, c2, c3 = (
            (product1 >> shift) ^ c1 ^ k0,
            product1 & _LOW,
            (product0 >> shift) ^ c3 ^ k1,
            product0 & _LOW,
        )
        k0, k1 = (k0 + _WEYL[0]) & _LOW, (k1 + _WEYL[1]) & _LOW
    return np.stack([c0, c1, c2, c3], axis=1)


@lru_cache(maxsize=65536)
def _prompt_key(seed: int, prompt_id: str) -> tuple[int, int]:
    digest = blake2b(f"{seed}/{prompt_id}".encode(), digest_size=8).digest()
    return int.from_bytes(digest[:4], "little"), int.from_bytes(digest[4:], "little")


def prompt_keys(seed: int, prompt_ids: Sequence[str]) -> Words:
    """Return the part of the key that stays the same along a completion, [N, 2]."""
    return np.array([_prompt_key(seed, prompt_id) for prompt_id in prompt_ids], dtype=np.uint64).reshape(-1, 2)


def uniforms(
    seed: int,
    prompt_ids: Sequence[str],
    sample_indices: npt.ArrayLike,
    positions: npt.ArrayLike,
    purpose: Purpose,
) -> npt.NDArray[np.float64]:
    """Return one uniform in [0, 1) for each of N (prompt, sample, position) triples.

    Args:
        seed: of the run.
        prompt_ids: N ids.
        sample_indices: [N], which of the group's samples.
        positions: [N], index of the token within its completion, from 0.
        purpose: what is decided.

    Returns:
        [N] float64, with 53 random bits each.
    """
    return keyed_uniforms(prompt_keys(seed, prompt_ids), sample_indices, positions, purpose)


def keyed_uniforms(
    keys: Words, sample_indices: npt.ArrayLike, positions: npt.ArrayLike, purpose: Purpose
) -> npt.NDArray[np.float64]:
    """`uniforms` with the seed and the prompts given as `prompt_keys` [N, 2]."""
    counter = np.zeros((len(keys), 4), dtype=np.uint64)
    counter[:, 0] = np.asarray(sample_indices, dtype=np.uint64)
    counter[:, 1] = np.asarray(positions, dtype=np.uint64)
    counter[:, 2] = np.uint64(purpose)
    words = philox4x32(counter, keys)
    bits = (words[:, 0] << np.uint64(21)) ^ (words[:, 1] >> np.uint64(11))
    return bits.astype(np.float64) * 2.0**-53


def sample_from_logprobs(logprobs: torch.Tensor, uniforms: torch.Tensor) -> torch.Tensor:
    """Return one id per row by inverting the cumulative distribution in float64.

    Args:
        logprobs: [N, V] natural logs, normalised or not; -inf is never drawn.
        uniforms: [N] in [0, 1).

    Returns:
        [N] int64 ids.
    """
    cumulative = torch.softmax(logprobs.double(), dim=-1).cumsum(-1)
    threshold = uniforms.to(cumulative)[:, None] * cumulative[:, -1:]
    # A step of height zero is never the first to exceed the threshold, so ids without mass are not drawn.
    ids = torch.searchsorted(cumulative, threshold, right=True)[:, 0]
    return ids.clamp(max=logprobs.shape[-1] - 1)
