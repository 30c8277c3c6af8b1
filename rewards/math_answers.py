r"""The math grader: compares a completion's last answer with the reference, as mathematics, by math-verify.

math-verify may take for ever on a hostile answer (`9^{9^{9^{9}}}`), and its own time limit works by SIGALRM, in main
threads alone. That limit is off here: `check` is meant for the worker processes of `rewards.pool`, which can be killed.

An answer that only evaluates to the reference passes (`\boxed{123+456}` for 579): math-verify compares values. Where
its comparison fails inside, the answer was not shown equal and counts as wrong.
"""

import logging
import re
from functools import lru_cache
from typing import Any

from math_verify import LatexExtractionConfig, parse, verify

from rewards.grade import CORRECT, Grade, Status, no_reward

MAX_ANSWER_LENGTH = 300
"""Characters; longer answers are not read. Parsing costs seconds far above it and no real answer comes near."""
_TAIL_LENGTH = 2000
"""Without a box, the answer is looked for in so many last characters."""

_BOX = "\\boxed{"
# The alternatives are tried at each position from the left, so a number inside a formula belongs to the formula.
_ANSWER = re.compile(
    r"\$\$(?P<display>[^$]+)\$\$|\$(?P<inline>[^$\n]+)\$|\\\((?P<round>.+?)\\\)|\\\[(?P<square>.+?)\\\]"
    r"|(?P<number>-?[0-9]+(?:,[0-9]{3})*(?:\.[0-9]+)?(?:/[0-9]+)?%?)",
    re.DOTALL,
)
_LATEX = [LatexExtractionConfig(boxed_match_priority=0)]

# It warns in every process that its time limit is off.
logging.getLogger("math_verify").setLevel(logging.ERROR)


def check(text: str, reference: str) -> Grade:
    r"""Return whether the last answer of a completion equals the reference.

    UNPARSABLE if there is no answer, it is longer than `MAX_ANSWER_LENGTH`, or it cannot be parsed; REFUSED if the
    reference cannot be parsed. May run without end, or exhaust memory.

    Example:
        >>> check(r"... so it is \boxed{\frac{1}{2}}.", "0.5").status.value
        'correct'
    """
    gold = _parsed(last_answer(reference) if _BOX in reference else reference)
    if not gold:
        return no_reward(Status.REFUSED, "the reference cannot be parsed as mathematics")
    answer = last_answer(text)
    if answer is None:
        return no_reward(Status.UNPARSABLE, f"no answer of at most {MAX_ANSWER_LENGTH} characters was found")
    parsed = _parsed(answer)
    if not parsed:
        return no_reward(Status.UNPARSABLE, "the answer cannot be parsed as mathematics")
    if not verify(gold, parsed, timeout_seconds=None):
        return no_reward(Status.WRONG, "the answer does not equal the reference")
    return CORRECT


def last_answer(text: str) -> str | None:
    r"""Return the content of the last `\boxed{...}`, else the last formula or number near the end of the text.

    None if there is none, the last box is not closed, or the answer is longer than `MAX_ANSWER_LENGTH`.

    Example:
        >>> last_answer(r"\boxed{1}, no: \boxed{\frac{1}{2}}.")
        '\\frac{1}{2}'
        >>> last_answer("It costs 3 dollars, so four of them are 12.")
        '12'
    """
    box = text.rfind(_BOX)
    if box >= 0:
        answer = _balanced(text[box + len(_BOX) : box + len(_BOX) + MAX_ANSWER_LENGTH + 1])
    else:
        found = [match[match.lastgroup or 0] for match in _ANSWER.finditer(text[-_TAIL_LENGTH:])]
        answer = found[-1] if found else None
    return answer if answer is not None and len(answer) <= MAX_ANSWER_LENGTH else None


def _balanced(text: str) -> str | None:
    """The text up to the brace that closes one opened before it; escaped braces (sets) do not count."""
    depth = 1
    for match in re.finditer(r"\\.|[{}]", text, re.DOTALL):
        depth += {"{": 1, "}": -1}.get(match[0], 0)
        if depth == 0:
            return text[: match.start()]
    return None


@lru_cache(maxsize=1024)
def _parsed(answer: str | None) -> list[Any]:
    """What math-verify makes of one answer; empty if nothing."""
    if answer is None:
        return []
    boxed = f"{_BOX}{answer.strip().rstrip('.')}}}"
    return list(parse(boxed, extraction_config=_LATEX, fallback_mode="no_fallback", parsing_timeout=None))
