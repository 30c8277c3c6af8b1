"""Dynamic sampling (DAPO, arXiv 2503.14476, section 3.2): groups whose rewards are all equal are replaced.

Refills come from a stream of indices of their own, so that which prompts the next batches have does not depend on how
many groups of this one taught something: a run repeats, and goes on after a stop, as one without refills does. A prompt
may be met in both streams.
"""

import math
from collections.abc import Mapping
from dataclasses import dataclass

_FIRST_REFILL = 10**9
"""Index of the first refill, beyond any batch of a run."""
_LEAST_SHARE = 0.125


@dataclass(frozen=True, slots=True, kw_only=True)
class Selection:
    """Which groups of a step are learned from."""

    learned: tuple[str, ...]
    """prompt_ids, in the order they were sampled."""
    padding: tuple[str, ...]
    """prompt_ids of groups that teach nothing but keep the places of those that are missing."""
    num_dropped: int
    """Groups of equal rewards that were sampled and are not among these."""
    num_surplus: int
    """Groups that would have taught something, sampled beyond what was asked for."""


def select(teaches: Mapping[str, bool], num_prompts: int) -> Selection:
    """Return the first `num_prompts` groups that teach, filled up with groups that do not.

    Example:
        >>> select({"a": True, "b": False, "c": True, "d": False}, num_prompts=3)
        Selection(learned=('a', 'c'), padding=('b',), num_dropped=1, num_surplus=0)
    """
    mixed = [prompt_id for prompt_id, differ in teaches.items() if differ]
    equal = [prompt_id for prompt_id, differ in teaches.items() if not differ]
    padding = equal[: max(0, num_prompts - len(mixed))]
    return Selection(
        learned=tuple(mixed[:num_prompts]),
        padding=tuple(padding),
        num_dropped=len(equal) - len(padding),
        num_surplus=max(0, len(mixed) - num_prompts),
    )


def refill_size(teaches: Mapping[str, bool], num_prompts: int) -> int:
    """Return how many more prompts to sample: as many as would fill the batch at the share that has taught so far.

    Example:
        >>> refill_size({"a": True, "b": False, "c": True, "d": False}, num_prompts=4)
        4
    """
    num_mixed = sum(teaches.values())
    share = max(num_mixed / len(teaches), _LEAST_SHARE)
    return min(num_prompts, math.ceil((num_prompts - num_mixed) / share))


def refill_start(index: int, refill: int, *, max_refills: int, num_prompts: int) -> int:
    """Return the index of the first prompt of a refill of batch `index`; refills never overlap."""
    return _FIRST_REFILL + (index * max_refills + refill) * num_prompts
