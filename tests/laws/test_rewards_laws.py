"""Laws of the checkers and of pass@k. About 10 s."""

import itertools
import operator
import random
from fractions import Fraction

import numpy as np
import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from rewards import addition, countdown, pass_at_k
from rewards.grade import Status
from rewards.math_answers import last_answer

SEEDS = st.integers(0, 2**32)
HOSTILE_PIECES = st.sampled_from(
    ["#", "=", ",", "+", "-", "*", "9", "0", "42", "9*5=45", "45-3=42", "#12", "9" * 5000, "\x00", "\n", " ", "1e9",
     "\N{ARABIC-INDIC DIGIT ONE}", "\N{SUPERSCRIPT TWO}", "\N{FULLWIDTH DIGIT NINE}", "\N{MINUS SIGN}", "\ud800", ">",
     "\\boxed{", "}", "{", "$", "\\(", "\\)", "\\", "__import__('os')"]
)  # fmt: skip
TEXTS = st.one_of(st.text(), st.lists(HOSTILE_PIECES, max_size=12).map("".join))
OPERATORS = {"+": operator.add, "-": operator.sub, "*": operator.mul}


@given(text=TEXTS, reference=st.one_of(TEXTS, st.just("12"), st.just("3 5 9>42")))
@example(text="#" + "9" * 10**6, reference="12")
@example(text="9" * 10**6 + "*5=45", reference="3 5 9>42")
def test_no_text_makes_a_checker_raise(text: str, reference: str) -> None:
    for check in (addition.check, countdown.check):
        grade = check(text, reference)
        assert grade.reward == (grade.status is Status.CORRECT)
        assert grade.status not in (Status.CRASHED, Status.TIMED_OUT)
        assert grade.detail.isascii()
        assert len(grade.detail) < 200
    answer = last_answer(text)
    assert answer is None or (answer in text and len(answer) <= 300)


@given(seed=SEEDS, max_digits=st.integers(1, 6))
def test_a_worked_addition_is_correct_and_carries_as_by_hand(seed: int, max_digits: int) -> None:
    problem = addition.make_problem(random.Random(seed), max_digits)
    assert addition.check(problem.solution, problem.reference).status is Status.CORRECT
    first, second = map(int, problem.prompt.removesuffix(":").split("+"))
    assert problem.reference == str(first + second)
    assert max(first, second) < 10**max_digits
    steps, _, answer = problem.solution.partition("#")
    sums = [step.split("=") for step in steps.split(",")]
    assert all(sum(map(int, left.split("+"))) == int(right) for left, right in sums)
    digits = [right[-1] for _, right in sums]
    assert int("".join(reversed(digits))) == int(answer) % 10 ** len(digits)


@given(seed=SEEDS, place=st.integers(0, 100), digit=st.sampled_from("0123456789"))
def test_another_digit_in_the_answer_of_an_addition_is_not_correct(seed: int, place: int, digit: str) -> None:
    problem = addition.make_problem(random.Random(seed))
    steps, _, answer = problem.solution.partition("#")
    place %= len(answer)
    mutated = answer[:place] + digit + answer[place + 1 :]
    grade = addition.check(f"{steps}#{mutated}", problem.reference)
    assert (grade.status is Status.CORRECT) == (mutated == answer)


@given(seed=SEEDS)
def test_a_worked_countdown_is_one_of_the_solutions_and_all_of_them_are_correct(seed: int) -> None:
    problem = countdown.make_problem(random.Random(seed))
    given_numbers, _, target = problem.reference.partition(">")
    numbers = [int(number) for number in given_numbers.split()]
    assert len(numbers) == 3
    assert all(1 <= number <= 9 for number in numbers)
    assert 0 <= int(target) <= 99
    found = countdown.solutions(numbers, int(target))
    assert problem.solution in found
    assert all(countdown.check(solution, problem.reference).status is Status.CORRECT for solution in found)
    assert problem.prompt == f"{problem.reference}:"


@given(seed=SEEDS, place=st.integers(0, 100), character=st.sampled_from("0123456789+-*=,"))
def test_another_character_in_a_countdown_is_not_correct_unless_it_still_adds_up(
    seed: int, place: int, character: str
) -> None:
    problem = countdown.make_problem(random.Random(seed))
    place %= len(problem.solution)
    mutated = problem.solution[:place] + character + problem.solution[place + 1 :]
    assert (countdown.check(mutated, problem.reference).reward == 1.0) == is_right(mutated, problem.reference)


@given(numbers=st.lists(st.integers(1, 9), min_size=3, max_size=3), target=st.integers(0, 99))
def test_the_solutions_of_a_countdown_are_those_of_brute_force(numbers: list[int], target: int) -> None:
    assert set(countdown.solutions(numbers, target)) == brute_force(numbers)[target]
    permuted = [countdown.solutions(order, target) for order in itertools.permutations(numbers)]
    assert len(set(permuted)) == 1


def brute_force(numbers: list[int]) -> dict[int, set[str]]:
    """Canonical derivations by target: all orders of three numbers, all pairs of operators, both ways to go on."""
    found: dict[int, set[str]] = {target: set() for target in range(100)}
    for a, b, c in itertools.permutations(numbers):
        for first, second in itertools.product("+-*", repeat=2):
            inner = OPERATORS[first](a, b)
            for left, right in ((inner, c), (c, inner)):
                outer = OPERATORS[second](left, right)
                if a >= b and left >= right and inner <= 99 and outer <= 99:
                    found[outer].add(f"{a}{first}{b}={inner},{left}{second}{right}={outer}")
    return found


def is_right(text: str, reference: str) -> bool:
    """Whether a text is a canonical solution but for the order of its operands."""
    given_numbers, _, target = reference.partition(">")
    canonical = countdown.solutions([int(number) for number in given_numbers.split()], int(target))
    orders = []
    for solution in canonical:
        steps = []
        for step in solution.split(","):
            left, symbol, right = next(step.partition(s) for s in "+*-" if s in step)
            right, _, result = right.partition("=")
            swapped = [] if symbol == "-" else [f"{right}{symbol}{left}={result}"]
            steps.append([step, *swapped])
        orders += [",".join(both) for both in itertools.product(*steps)]
    return text in orders


@given(data=st.data(), num_samples=st.integers(1, 9))
def test_pass_at_k_is_the_share_of_subsets_with_a_correct_sample(data: st.DataObject, num_samples: int) -> None:
    num_correct = data.draw(st.integers(0, num_samples))
    k = data.draw(st.integers(1, num_samples))
    subsets = list(itertools.combinations([True] * num_correct + [False] * (num_samples - num_correct), k))
    assert pass_at_k(num_samples, num_correct, k) == float(Fraction(sum(map(any, subsets)), len(subsets)))


@given(data=st.data(), num_samples=st.integers(1, 1024))
def test_pass_at_k_keeps_its_bounds_and_order_for_many_samples(data: st.DataObject, num_samples: int) -> None:
    num_correct = data.draw(st.integers(0, num_samples))
    k = data.draw(st.integers(1, num_samples))
    value = pass_at_k(num_samples, num_correct, k)
    assert pass_at_k(num_samples, num_correct, 1) == num_correct / num_samples
    assert num_correct / num_samples <= value <= 1.0
    assert pass_at_k(num_samples, num_correct, num_samples) == float(num_correct > 0)
    miss = Fraction(1)
    for i in range(k):
        miss *= Fraction(max(num_samples - num_correct - i, 0), num_samples - i)
    assert value == float(1 - miss)
    np.testing.assert_array_equal(pass_at_k(num_samples, [num_correct] * 2, k), [value] * 2)


def test_pass_at_k_is_unbiased_where_the_naive_estimate_is_not() -> None:
    """Its mean over 16 samples of a coin, weighed by the exact binomial law, is the coin's own pass@4."""
    share = Fraction(1, 5)
    n, k = 16, 4
    subsets = pass_at_k(n, list(range(n + 1)), 1)
    law = [Fraction(choose(n, c)) * share**c * (1 - share) ** (n - c) for c in range(n + 1)]
    exact = float(1 - (1 - share) ** k)
    assert float(sum(law)) == 1.0
    assert np.dot(pass_at_k(n, list(range(n + 1)), k), [float(p) for p in law]) == pytest.approx(exact, abs=1e-12)
    assert abs(np.dot(1 - (1 - subsets) ** k, [float(p) for p in law]) - exact) > 1e-2


def choose(n: int, k: int) -> int:
    """Pascal's rule, so that the law does not lean on the function under test."""
    row = [1]
    for _ in range(n):
        row = [a + b for a, b in zip([0, *row], [*row, 0], strict=True)]
    return row[k]
