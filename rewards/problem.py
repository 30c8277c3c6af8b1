"""Generated problems and their split into training and held-out prompts."""

import zlib
from dataclasses import dataclass


@dataclass(frozen=True, slots=True, kw_only=True)
class Problem:
    """A problem that a task makes by itself, with one worked solution to learn from.

    Example:
        >>> Problem(prompt="7+5:", solution="7+5+0=12#12", reference="12").reference
        '12'
    """

    prompt: str
    """What the student is given."""
    solution: str
    """One completion that the task's checker finds correct."""
    reference: str
    """What the task's checker compares with."""


def is_held_out(prompt_text: str) -> bool:
    """Return whether a prompt is kept for evaluation: one in ten, by its text alone.

    The split follows from the text's CRC-32, so a prompt drawn twice always falls on the same side.

    Example:
        >>> is_held_out("347+85:"), is_held_out("2+4:")
        (False, True)
    """
    return zlib.crc32(prompt_text.encode()) % 10 == 0
