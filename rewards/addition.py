"""The toy task "1-3 digit addition with carry steps": problems, worked solutions, the exact checker.

A completion works from the last digit to the first, `digit+digit+carry=sum`, and gives the answer after a `#`. Only the
answer is judged.
"""

import random
import re
from itertools import zip_longest

from rewards.grade import CORRECT, Grade, Status, no_reward
from rewards.problem import Problem

# Written as Python writes it: ASCII digits, no leading zeros; 18 digits bound the work on a hostile text.
_INTEGER = re.compile(r"-?(?:0|[1-9][0-9]{0,17})")


def make_problem(rng: random.Random, max_digits: int = 3) -> Problem:
    """Return a sum of two numbers whose lengths are uniform in 1..max_digits.

    Example:
        >>> _problem(347, 85).solution
        '7+5+0=12,4+8+1=13,3+0+1=4#432'
    """
    first, second = (rng.randrange(10 ** rng.randint(1, max_digits)) for _ in range(2))
    return _problem(first, second)


def _problem(first: int, second: int) -> Problem:
    carry, steps = 0, []
    for x, y in zip_longest(reversed(str(first)), reversed(str(second)), fillvalue="0"):
        total = int(x) + int(y) + carry
        steps.append(f"{x}+{y}+{carry}={total}")
        carry = total // 10
    answer = str(first + second)
    return Problem(prompt=f"{first}+{second}:", solution=f"{','.join(steps)}#{answer}", reference=answer)


def check(text: str, reference: str) -> Grade:
    """Return whether the integer after the completion's only `#` equals the reference.

    UNPARSABLE if there is no `#`, more than one, or anything but one integer of at most 18 ASCII digits after it;
    REFUSED if the reference is no such integer. Never raises.

    Example:
        >>> check("7+5+0=12#12", "12").reward
        1.0
        >>> check("7+5+0=12#13", "12").detail
        'the answer is 13, not 12'
    """
    if _INTEGER.fullmatch(reference) is None:
        return no_reward(Status.REFUSED, "the reference of an addition must be an integer")
    _, *answers = text.split("#", maxsplit=2)
    if len(answers) != 1:
        return no_reward(Status.UNPARSABLE, "the completion must hold exactly one '#'")
    [answer] = answers
    if _INTEGER.fullmatch(answer) is None:
        return no_reward(Status.UNPARSABLE, "what follows '#' must be an integer and nothing else")
    if answer != reference:
        return no_reward(Status.WRONG, f"the answer is {answer}, not {reference}")
    return CORRECT
