"""Addition, countdown and their split. Well under a second."""

import random

import pytest

from rewards import addition, countdown
from rewards.grade import Status
from rewards.problem import is_held_out


@pytest.mark.parametrize(
    ("text", "status"),
    [
        ("7+5+0=12,4+8+1=13,3+0+1=4#432", Status.CORRECT),
        ("#432", Status.CORRECT),
        ("any thoughts#432", Status.CORRECT),
        ("7+5+0=12#431", Status.WRONG),
        ("#-432", Status.WRONG),
        ("", Status.UNPARSABLE),
        ("432", Status.UNPARSABLE),
        ("#432#432", Status.UNPARSABLE),
        ("#431#432", Status.UNPARSABLE),
        ("#", Status.UNPARSABLE),
        ("#0432", Status.UNPARSABLE),
        ("#432 ", Status.UNPARSABLE),
        ("#432\n", Status.UNPARSABLE),
        ("#4_32", Status.UNPARSABLE),
        ("#347+85", Status.UNPARSABLE),
        ("#432.0", Status.UNPARSABLE),
        ("#\N{ARABIC-INDIC DIGIT FOUR}\N{ARABIC-INDIC DIGIT THREE}\N{ARABIC-INDIC DIGIT TWO}", Status.UNPARSABLE),
        ("#" + "9" * 100_000, Status.UNPARSABLE),
        ("#" * 100_000, Status.UNPARSABLE),
        ("#432\x00", Status.UNPARSABLE),
    ],
)
def test_an_addition_is_judged_by_the_integer_after_its_only_hash(text: str, status: Status) -> None:
    grade = addition.check(text, "432")
    assert grade.status is status
    assert grade.reward == (status is Status.CORRECT)


@pytest.mark.parametrize("reference", ["", "x", "4 32", "9" * 19])
def test_an_addition_without_an_integer_reference_is_refused(reference: str) -> None:
    assert addition.check(f"#{reference}", reference).status is Status.REFUSED


@pytest.mark.parametrize(
    ("text", "status", "detail"),
    [
        ("9*5=45,45-3=42", Status.CORRECT, ""),
        ("5*9=45,45-3=42", Status.CORRECT, ""),
        ("", Status.UNPARSABLE, "step 1 must be of the form 9*5=45"),
        ("42", Status.UNPARSABLE, "step 1 must be of the form 9*5=45"),
        ("9*5=45,", Status.UNPARSABLE, "step 2 must be of the form 9*5=45"),
        ("9*5=045,45-3=42", Status.UNPARSABLE, "step 1 must be of the form 9*5=45"),
        ("9**5=45,45-3=42", Status.UNPARSABLE, "step 1 must be of the form 9*5=45"),
        ("9*5=45, 45-3=42", Status.UNPARSABLE, "step 2 must be of the form 9*5=45"),
        ("3-5=-2,9--2=11", Status.UNPARSABLE, "step 1 must be of the form 9*5=45"),
        ("9*5=45", Status.WRONG, "what is left is 3 45, not 42"),
        ("9*5=45,45+3=48", Status.WRONG, "what is left is 48, not 42"),
        ("9*5=42", Status.WRONG, "step 1: 9*5 is 45, not 42"),
        ("3-5=2,9*2=18", Status.WRONG, "step 1: 3-5 is -2, not 2"),
        ("7*6=42", Status.WRONG, "step 1: 7 is not at hand"),
        ("9*9=81", Status.WRONG, "step 1: 9 is not at hand"),
        ("9*5=45,45*3=135", Status.WRONG, "step 2: 135 is more than 99"),
        ("9*5=45,45-3=42,42-0=42", Status.WRONG, "step 3: 0 is not at hand"),
        ("9*5=45," * 100_000, Status.WRONG, "step 2: 9 is not at hand"),
    ],
)
def test_a_countdown_is_replayed_step_by_step(text: str, status: Status, detail: str) -> None:
    grade = countdown.check(text, "3 5 9>42")
    assert (grade.status, grade.detail) == (status, detail)
    assert grade.reward == (status is Status.CORRECT)


@pytest.mark.parametrize("reference", ["", "3 5 9", "3 5 9>", "3 5 9>42:", "3  5 9>42", "a b c>d", "3 5 9>99999"])
def test_a_countdown_without_numbers_and_target_is_refused(reference: str) -> None:
    assert countdown.check("9*5=45,45-3=42", reference).status is Status.REFUSED


def test_problems_and_solutions_look_as_documented() -> None:
    rng = random.Random(3)
    sums = {addition.make_problem(rng, max_digits=1).prompt for _ in range(2000)}
    assert sums == {f"{a}+{b}:" for a in range(10) for b in range(10)}
    problem = countdown.make_problem(rng)
    assert problem.prompt == f"{problem.reference}:"
    assert countdown.solutions([3, 5, 9], 42) == ("9*5=45,45-3=42", "9+5=14,14*3=42")
    assert countdown.solutions([1, 1, 1], 99) == ()


def test_one_prompt_in_ten_is_held_out() -> None:
    held_out = [is_held_out(f"{a}+{b}:") for a in range(100) for b in range(100)]
    assert 900 < sum(held_out) < 1100
    assert is_held_out("2+4:")
    assert not is_held_out("347+85:")


def test_the_same_seed_makes_the_same_problems() -> None:
    for make in (addition.make_problem, countdown.make_problem):
        first, second = ([make(rng) for _ in range(20)] for rng in (random.Random(5), random.Random(5)))
        assert first == second
        assert len({problem.prompt for problem in first}) > 10
