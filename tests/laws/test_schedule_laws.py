"""The budget's schedule."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from orchestrator.schedules import Constant, LinearAnneal


@given(st.floats(0, 10), st.integers(0, 200), st.integers(0, 400))
def test_a_linear_anneal_falls_to_exactly_zero(start: float, num_steps: int, step: int) -> None:
    anneal = LinearAnneal(start=start, num_steps=num_steps)
    assert 0 <= anneal(step + 1) <= anneal(step) <= start
    if step >= num_steps:
        assert anneal(step) == 0.0
    else:
        assert anneal(step) == pytest.approx(start * (1 - step / num_steps))
    if num_steps:
        assert anneal(0) == start


def test_a_constant_budget_stays() -> None:
    assert [Constant(epsilon=0.01)(step) for step in (0, 1, 10**6)] == [0.01] * 3


@pytest.mark.parametrize("wrong", [-0.1, float("nan"), float("inf")])
def test_a_budget_that_is_negative_or_not_finite_is_refused(wrong: float) -> None:
    with pytest.raises(ValueError, match="must be finite and >= 0"):
        Constant(epsilon=wrong)
    with pytest.raises(ValueError, match="must be finite and >= 0"):
        LinearAnneal(start=wrong, num_steps=3)
