"""The toy task "3-number countdown": combine the numbers, each once, by + - * so that the target comes out.

A completion is a derivation such as `9*5=45,45-3=42`: each step takes two of the numbers at hand and leaves their
result among them. Any right derivation is correct, so most prompts have several right answers.
"""

import random
import re
from collections.abc import Sequence
from functools import lru_cache

from rewards.grade import CORRECT, Grade, Status, no_reward
from rewards.problem import Problem

NUM_NUMBERS = 3
"""How many numbers a generated problem gives."""
LARGEST_NUMBER = 9
"""The numbers given are 1 to this."""
LARGEST_RESULT = 99
"""Every result, and so the target, is 0 to this."""

# ASCII digits without leading zeros; four digits hold every product of two numbers at hand.
_NUMBER = r"(0|[1-9][0-9]{0,3})"
_STEP = re.compile(rf"{_NUMBER}([-+*]){_NUMBER}={_NUMBER}")
_REFERENCE = re.compile(rf"{_NUMBER}(?: {_NUMBER}){{1,7}}>{_NUMBER}")


def make_problem(rng: random.Random) -> Problem:
    """Return a problem whose target some random derivation reaches; the reference is the prompt without its colon."""
    while True:
        numbers = [rng.randint(1, LARGEST_NUMBER) for _ in range(NUM_NUMBERS)]
        at_hand, steps = list(numbers), []
        while len(at_hand) > 1:
            larger, smaller = sorted((at_hand.pop(rng.randrange(len(at_hand))) for _ in range(2)), reverse=True)
            operator = rng.choice("+-*")
            at_hand.append(_apply(larger, operator, smaller))
            steps.append(f"{larger}{operator}{smaller}={at_hand[-1]}")
            if at_hand[-1] > LARGEST_RESULT:
                break
        else:
            rng.shuffle(numbers)
            reference = f"{' '.join(map(str, numbers))}>{at_hand[0]}"
            return Problem(prompt=f"{reference}:", solution=",".join(steps), reference=reference)


def solutions(numbers: Sequence[int], target: int) -> tuple[str, ...]:
    """Return every canonical derivation of the target, sorted; none if it cannot be reached.

    Canonical means the larger operand first. `check` takes either order; counting distinct right answers needs one.

    Example:
        >>> solutions([1, 2, 3], 9)
        ('2+1=3,3*3=9',)
    """
    return _solutions(tuple(sorted(numbers)), target)


@lru_cache(maxsize=4096)
def _solutions(numbers: tuple[int, ...], target: int) -> tuple[str, ...]:
    found: set[str] = set()

    def search(at_hand: tuple[int, ...], steps: tuple[str, ...]) -> None:
        if len(at_hand) == 1:
            if at_hand[0] == target:
                found.add(",".join(steps))
            return
        for i in range(len(at_hand)):
            for j in range(i):
                rest = tuple(number for k, number in enumerate(at_hand) if k not in (i, j))
                larger, smaller = max(at_hand[i], at_hand[j]), min(at_hand[i], at_hand[j])
                for operator in "+-*":
                    result = _apply(larger, operator, smaller)
                    if result <= LARGEST_RESULT:
                        search((*rest, result), (*steps, f"{larger}{operator}{smaller}={result}"))

    search(numbers, ())
    return tuple(sorted(found))


def check(text: str, reference: str) -> Grade:
    """Replay the derivation step by step and return whether it uses every number once and ends at the target.

    UNPARSABLE where a step is not written like `9*5=45` (there are no negative numbers), WRONG where it breaks a rule,
    REFUSED if the reference is not of the form `3 5 9>42`. The first fault decides. Never raises.

    Example:
        >>> check("9*5=45,45-3=42", "3 5 9>42").reward
        1.0
        >>> check("9*5=44,44-3=41", "3 5 9>41").detail
        'step 1: 9*5 is 45, not 44'
    """
    if _REFERENCE.fullmatch(reference) is None:
        return no_reward(Status.REFUSED, "the reference of a countdown must look like '3 5 9>42'")
    given, _, target = reference.partition(">")
    at_hand = [int(number) for number in given.split(" ")]
    for index, step in enumerate(text.split(","), start=1):
        fields = _STEP.fullmatch(step)
        if fields is None:
            return no_reward(Status.UNPARSABLE, f"step {index} must be of the form 9*5=45")
        left, operator, right, stated = fields.groups()
        for operand in (int(left), int(right)):
            if operand not in at_hand:
                return no_reward(Status.WRONG, f"step {index}: {operand} is not at hand")
            at_hand.remove(operand)
        result = _apply(int(left), operator, int(right))
        if result != int(stated):
            return no_reward(Status.WRONG, f"step {index}: {left}{operator}{right} is {result}, not {stated}")
        if result > LARGEST_RESULT:
            return no_reward(Status.WRONG, f"step {index}: {result} is more than {LARGEST_RESULT}")
        at_hand.append(result)
    if at_hand != [int(target)]:
        return no_reward(Status.WRONG, f"what is left is {' '.join(map(str, at_hand))}, not {target}")
    return CORRECT


def _apply(left: int, operator: str, right: int) -> int:
    if operator == "+":
        return left + right
    return left - right if operator == "-" else left * right
