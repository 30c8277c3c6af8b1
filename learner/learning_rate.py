"""The schedule of the learning rate."""

import math
from typing import Literal


def learning_rate_factor(
    step: int, *, schedule: Literal["constant", "cosine", "linear"], warmup_steps: int, num_steps: int
) -> float:
    """Return what the learning rate is multiplied by at a step, counted from 0.

    It rises linearly over the warmup and is 1 at its last step; then it stays (`constant`) or falls as half a cosine or
    linearly, and would be 0 at step `num_steps`, which is the first not to be taken. Later steps stay at 0.

    Example:
        >>> [learning_rate_factor(s, schedule="linear", warmup_steps=2, num_steps=6) for s in range(6)]
        [0.5, 1.0, 1.0, 0.75, 0.5, 0.25]
    """
    if step < warmup_steps:
        return (step + 1) / warmup_steps
    if schedule == "constant":
        return 1.0
    done = min(1.0, (step - warmup_steps) / max(1, num_steps - warmup_steps))
    return 1.0 - done if schedule == "linear" else 0.5 * (1.0 + math.cos(math.pi * done))
