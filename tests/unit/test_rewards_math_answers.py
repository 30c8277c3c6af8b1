"""The math grader on answers that are not hostile; those are in test_rewards_graders.py. About 5 s, mostly imports."""

import pytest

from rewards.grade import Status
from rewards.math_answers import MAX_ANSWER_LENGTH, check, last_answer


@pytest.mark.parametrize(
    ("text", "answer"),
    [
        (r"\boxed{7}", "7"),
        (r"\boxed{7} no, \boxed{8}. Or 9?", "8"),
        (r"\boxed{\frac{1}{\sqrt{2}}} is it", r"\frac{1}{\sqrt{2}}"),
        (r"\boxed{\{1, 2\}}", r"\{1, 2\}"),
        (r"\boxed{}", ""),
        (r"\boxed{7} and then \boxed{8", None),
        (r"\boxed{" + "1" * MAX_ANSWER_LENGTH + "}", "1" * MAX_ANSWER_LENGTH),
        (r"\boxed{" + "1" * (MAX_ANSWER_LENGTH + 1) + "}", None),
        (r"First $x = 3$, then \(y = \frac{1}{2}\).", r"y = \frac{1}{2}"),
        ("4 apples and 5 pears are 9 fruits.", "9"),
        ("He pays $18.", "18"),
        ("In all 1,234.5 m", "1,234.5"),
        ("one half, so -1/2", "-1/2"),
        ("no idea", None),
        ("", None),
        ("1" * 100_000, None),
        (r"\(" * 50_000 + "6", "6"),
        (r"\boxed{" * 50_000, None),
    ],
)
def test_the_last_boxed_answer_is_read_else_the_last_formula_or_number(text: str, answer: str | None) -> None:
    assert last_answer(text) == answer


@pytest.mark.parametrize(
    ("text", "reference", "status"),
    [
        (r"so \boxed{\frac{1}{2}}.", "0.5", Status.CORRECT),
        (r"so \boxed{1/2}", r"$\frac12$", Status.CORRECT),
        (r"\boxed{1,000}", "1000", Status.CORRECT),
        (r"\boxed{5 \text{ cm}}", "5", Status.CORRECT),
        (r"\boxed{x = 5}", "5", Status.CORRECT),
        (r"\boxed{\{2, 1\}}", r"\{1, 2\}", Status.CORRECT),
        (r"\boxed{1 + x^2}", "x^2+1", Status.CORRECT),
        ("The answer is 72.", "72", Status.CORRECT),
        ("7 or 5 or 3", "3", Status.CORRECT),
        (r"\boxed{9}", r"Since 3 and 3 make nine, \boxed{9}.", Status.CORRECT),
        ("7 or 5 or 3", "7", Status.WRONG),
        (r"72, so \boxed{71}", "72", Status.WRONG),
        (r"\boxed{x}", "72", Status.WRONG),
        ("no idea", "72", Status.UNPARSABLE),
        (r"\boxed{}", "72", Status.UNPARSABLE),
        (r"\boxed{\frac{}", "72", Status.UNPARSABLE),
        (r"\boxed{__import__('os').abort()}", "72", Status.UNPARSABLE),
        (r"\boxed{" + "(" * 250 + "1" + ")" * 40 + "}", "1", Status.UNPARSABLE),
        (r"\boxed{72}", "", Status.REFUSED),
        (r"\boxed{72}", r"\frac{", Status.REFUSED),
        (r"\boxed{72}", r"\boxed{", Status.REFUSED),
    ],
)
def test_answers_are_compared_as_mathematics(text: str, reference: str, status: Status) -> None:
    grade = check(text, reference)
    assert grade.status is status
    assert grade.reward == (status is Status.CORRECT)
