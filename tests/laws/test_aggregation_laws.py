"""Laws of the weights of tokens: what they sum to, and what changes them."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from learner.aggregation import token_weights

METHODS = ("token_mean", "sequence_mean", "fixed")

lengths = st.lists(st.integers(0, 12), min_size=1, max_size=8)


def weigh(num_tokens: list[int], trains: list[bool], method: str, aggregation_tokens: int = 16) -> np.ndarray:
    return token_weights(
        np.array(num_tokens), np.array(trains, np.bool_), method=method, aggregation_tokens=aggregation_tokens
    )


@st.composite
def steps(draw: st.DrawFn) -> tuple[list[int], list[bool]]:
    """Lengths of completions, and which of them train; at least one of them does and has a token."""
    num_tokens = draw(lengths)
    trains = draw(st.lists(st.booleans(), min_size=len(num_tokens), max_size=len(num_tokens)))
    return [*num_tokens, draw(st.integers(1, 12))], [*trains, True]


@given(step=steps(), method=st.sampled_from(METHODS[:2]))
def test_the_weights_of_all_tokens_sum_to_one(step: tuple[list[int], list[bool]], method: str) -> None:
    assert (weigh(*step, method) * step[0]).sum() == pytest.approx(1, rel=1e-12)


@given(step=steps(), aggregation_tokens=st.integers(1, 64))
def test_fixed_weights_sum_to_the_mean_length_over_the_fixed_one(
    step: tuple[list[int], list[bool]], aggregation_tokens: int
) -> None:
    learned = [length for length, trains in zip(*step, strict=True) if trains and length]
    total = (weigh(*step, "fixed", aggregation_tokens) * step[0]).sum()
    assert total == pytest.approx(sum(learned) / len(learned) / aggregation_tokens, rel=1e-12)


@given(step=steps(), method=st.sampled_from(METHODS))
def test_a_rollout_that_does_not_train_weighs_nothing_and_changes_no_other(
    step: tuple[list[int], list[bool]], method: str
) -> None:
    num_tokens, trains = step
    weights = weigh(num_tokens, trains, method)
    learned = [i for i, length in enumerate(num_tokens) if trains[i] and length]
    alone = weigh([num_tokens[i] for i in learned], [True] * len(learned), method)
    assert weights[learned] == pytest.approx(alone, rel=1e-14)
    assert (np.delete(weights, learned) == 0).all()


@given(step=steps(), method=st.sampled_from(METHODS), loss=st.floats(-4, 4))
def test_the_weighted_sum_is_the_mean_that_the_name_says(
    step: tuple[list[int], list[bool]], method: str, loss: float
) -> None:
    """With the loss of every token of rollout r equal to loss + r."""
    rollouts = [(length, loss + r) for r, (length, trains) in enumerate(zip(*step, strict=True)) if trains and length]
    losses = loss + np.arange(len(step[0]))
    total = float((weigh(*step, method) * step[0] * losses).sum())
    tokens = [value for length, value in rollouts for _ in range(length)]
    expected = {
        "token_mean": np.mean(tokens),
        "sequence_mean": np.mean([value for _, value in rollouts]),
        "fixed": sum(tokens) / 16 / len(rollouts),
    }
    assert total == pytest.approx(expected[method], rel=1e-9, abs=1e-9)


@pytest.mark.parametrize("method", METHODS)
def test_nothing_to_learn_weighs_nothing(method: str) -> None:
    assert weigh([3, 0], [False, True], method).tolist() == [0.0, 0.0]
    assert weigh([], [], method).shape == (0,)
