"""Laws of the group advantages and of the focal weight, with the golden values of F-GRPO's group of eight."""

import math

import numpy as np
import numpy.typing as npt
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from learner.advantages import METHODS, focal_weights, group_advantages

Rewards = npt.NDArray[np.float64]

methods = st.sampled_from(sorted(METHODS))
gammas = st.floats(0.0, 4.0)


@st.composite
def binary_rewards(draw: st.DrawFn) -> Rewards:
    """[P, G] of 0 and 1."""
    shape = draw(st.tuples(st.integers(1, 4), st.integers(2, 9)))
    flat = draw(st.lists(st.sampled_from([0.0, 1.0]), min_size=math.prod(shape), max_size=math.prod(shape)))
    return np.array(flat).reshape(shape)


@st.composite
def real_rewards(draw: st.DrawFn) -> Rewards:
    """[P, G] of multiples of 1/8, often equal."""
    shape = draw(st.tuples(st.integers(1, 4), st.integers(2, 9)))
    flat = draw(st.lists(st.integers(-16, 16), min_size=math.prod(shape), max_size=math.prod(shape)))
    return np.array(flat).reshape(shape) / 8


def plain(rewards: list[float], method: str, ddof: int) -> list[float]:
    """The slow obvious twin, for one group of distinct rewards."""
    n = len(rewards)
    mean = sum(rewards) / n
    if method == "rloo":
        return [r - (sum(rewards) - r) / (n - 1) for r in rewards]
    std = math.sqrt(sum((r - mean) ** 2 for r in rewards) / (n - ddof))
    return [(r - mean) / (std + 1e-6) if method == "grpo" else r - mean for r in rewards]


# Number correct of 8, focal weights at gamma 0.5 and 1, advantages of correct and wrong with population std and ddof 1.
GOLDEN = [
    (1, 0.9354, 0.875, (2.6457, -0.3780), (2.4749, -0.3536)),
    (2, 0.8660, 0.750, (1.7320, -0.5773), (1.6202, -0.5401)),
    (4, 0.7071, 0.500, (1.0000, -1.0000), (0.9354, -0.9354)),
    (6, 0.5000, 0.250, (0.5773, -1.7320), (0.5401, -1.6202)),
    (7, 0.3536, 0.125, (0.3780, -2.6457), (0.3536, -2.4749)),
    (0, 1.0, 1.0, (0.0, 0.0), (0.0, 0.0)),
    (8, 0.0, 0.0, (0.0, 0.0), (0.0, 0.0)),
]


@pytest.mark.parametrize(("num_correct", "half", "one", "population", "unbiased"), GOLDEN)
def test_a_group_of_eight_has_the_golden_weights_and_advantages(
    num_correct: int, half: float, one: float, population: tuple[float, float], unbiased: tuple[float, float]
) -> None:
    rewards = torch.tensor([[1.0] * num_correct + [0.0] * (8 - num_correct)], dtype=torch.float64)
    for gamma, expected in ((0.5, half), (1.0, one)):
        assert focal_weights(rewards, focal_gamma=gamma).item() == pytest.approx(expected, abs=6e-5)
    for ddof, (correct, wrong) in ((0, population), (1, unbiased)):
        table = [correct] * num_correct + [wrong] * (8 - num_correct)
        base = group_advantages(rewards, method="grpo", std_ddof=ddof)
        assert base[0].tolist() == pytest.approx(table, abs=1.1e-4)
        focal = group_advantages(rewards, method="grpo", focal_gamma=1.0, std_ddof=ddof)
        assert focal[0].tolist() == pytest.approx([one * value for value in table], abs=1.1e-4)


@given(rewards=real_rewards(), method=methods, ddof=st.sampled_from([0, 1]))
def test_each_method_is_its_plain_formula(rewards: Rewards, method: str, ddof: int) -> None:
    advantages = group_advantages(rewards, method=method, std_ddof=ddof)
    for row, actual in zip(rewards, advantages, strict=True):
        expected = [0.0] * len(row) if len(set(row)) == 1 else plain(row.tolist(), method, ddof)
        assert actual.tolist() == pytest.approx(expected, rel=1e-12, abs=1e-12)


@given(rewards=real_rewards(), method=methods)
def test_advantages_of_a_group_sum_to_zero(rewards: Rewards, method: str) -> None:
    assert group_advantages(rewards, method=method).sum(1).abs().max() < 1e-9


@given(rewards=binary_rewards(), method=methods, gamma=gammas)
def test_focal_advantages_of_a_group_sum_to_zero(rewards: Rewards, method: str, gamma: float) -> None:
    assert group_advantages(rewards, method=method, focal_gamma=gamma).sum(1).abs().max() < 1e-9


@given(rewards=binary_rewards(), method=methods, dtype=st.sampled_from([torch.float32, torch.float64]))
def test_without_a_focal_weight_it_is_the_base_method_bit_for_bit(
    rewards: Rewards, method: str, dtype: torch.dtype
) -> None:
    values = torch.tensor(rewards, dtype=dtype)
    base = group_advantages(values, method=method)
    assert base.dtype == dtype
    assert torch.equal(group_advantages(values, method=method, focal_gamma=0.0), base)
    assert torch.equal(base * focal_weights(values, focal_gamma=0.0)[:, None], base)


@given(rewards=binary_rewards(), method=methods, gamma=st.floats(0.1, 4.0))
def test_the_focal_weight_multiplies_the_finished_advantage(rewards: Rewards, method: str, gamma: float) -> None:
    base = group_advantages(rewards, method=method)
    expected = base * torch.tensor((1 - rewards.mean(1)) ** gamma)[:, None]
    assert torch.allclose(group_advantages(rewards, method=method, focal_gamma=gamma), expected, rtol=1e-12)


@given(rewards=binary_rewards(), method=methods, gamma=gammas, data=st.data())
def test_permuting_a_group_permutes_its_advantages(
    rewards: Rewards, method: str, gamma: float, data: st.DataObject
) -> None:
    order = data.draw(st.permutations(range(rewards.shape[1])))
    advantages = group_advantages(rewards, method=method, focal_gamma=gamma)
    permuted = group_advantages(rewards[:, order], method=method, focal_gamma=gamma)
    assert torch.allclose(permuted, advantages[:, order], rtol=1e-12, atol=1e-12)


@given(rewards=binary_rewards(), gamma=gammas)
def test_a_focal_weight_lies_in_the_unit_interval_and_falls_as_more_are_correct(rewards: Rewards, gamma: float) -> None:
    weights = focal_weights(rewards, focal_gamma=gamma)
    assert weights.shape == rewards.shape[:1]
    assert ((weights >= 0) & (weights <= 1)).all()
    easier = rewards.copy()
    easier[:, 0] = 1.0
    assert (focal_weights(easier, focal_gamma=gamma) <= weights).all()


@given(rewards=binary_rewards(), gamma=gammas)
def test_focal_weights_do_not_depend_on_what_wrong_is_worth(rewards: Rewards, gamma: float) -> None:
    weights = focal_weights(rewards, focal_gamma=gamma)
    signed = focal_weights(2 * rewards - 1, focal_gamma=gamma, reward_wrong=-1.0)
    assert torch.equal(signed, weights)


@given(rewards=binary_rewards(), method=methods, gamma=gammas, data=st.data())
def test_masking_a_member_is_removing_it(rewards: Rewards, method: str, gamma: float, data: st.DataObject) -> None:
    num_rollouts = rewards.shape[1]
    kept = sorted(data.draw(st.sets(st.integers(0, num_rollouts - 1), min_size=2)))
    valid = np.zeros(rewards.shape, np.bool_)
    valid[:, kept] = True
    lost = np.where(valid, rewards, np.nan)
    masked = group_advantages(lost, method=method, focal_gamma=gamma, valid=valid)
    assert (masked[~torch.from_numpy(valid)] == 0).all()
    removed = group_advantages(rewards[:, kept], method=method, focal_gamma=gamma)
    assert torch.allclose(masked[:, kept], removed, rtol=1e-12, atol=1e-12)
    weights = focal_weights(lost, focal_gamma=gamma, valid=valid)
    assert torch.equal(weights, focal_weights(rewards[:, kept], focal_gamma=gamma))


@pytest.mark.parametrize("method", sorted(METHODS))
@pytest.mark.parametrize("reward", [0.0, 0.1, 1.0, 1 / 3, -7.3])
def test_a_group_of_equal_rewards_has_advantage_exactly_zero(method: str, reward: float) -> None:
    for dtype in (torch.float32, torch.float64):
        for group_size in (2, 3, 7):
            rewards = torch.full((2, group_size), reward, dtype=dtype)
            assert (group_advantages(rewards, method=method) == 0).all()


@pytest.mark.parametrize("method", sorted(METHODS))
def test_a_group_with_fewer_than_two_valid_members_has_advantage_exactly_zero(method: str) -> None:
    valid = [[True, False, False], [False, False, False]]
    rewards = [[1.0, 0.0, math.nan], [math.inf, 1.0, 0.0]]
    assert (group_advantages(rewards, method=method, focal_gamma=0.5, valid=valid) == 0).all()
    assert focal_weights(rewards, focal_gamma=0.5, valid=valid).tolist() == [0.0, 1.0]


def test_integers_and_lists_give_float32() -> None:
    assert group_advantages([[1, 0]]).dtype == torch.float32
    assert focal_weights(np.array([[True, False]]), focal_gamma=1.0).dtype == torch.float32
    assert group_advantages(torch.empty(0, 4)).shape == (0, 4)


def test_dr_grpo_takes_a_group_of_one() -> None:
    assert group_advantages([[1.0], [0.0]], method="dr_grpo").tolist() == [[0.0], [0.0]]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"rewards": [[0.0, 1.0], [0.0, math.nan]]}, "nan in group 1, rollout 1"),
        ({"rewards": [[0.0, math.inf]]}, "inf in group 0, rollout 1"),
        ({"rewards": [[1.0]], "method": "grpo"}, "at least 2, got 1"),
        ({"rewards": [[1.0]], "method": "rloo"}, "at least 2, got 1"),
        ({"rewards": [[1.0, 0.0]], "method": "gppo"}, "did you mean 'grpo'"),
        ({"rewards": [[1.0, 0.0]], "reward_wrong": 1.0}, "above reward_wrong, got 1.0 and 1.0"),
        ({"rewards": [[1.0, 0.0]], "focal_gamma": -0.5}, "focal_gamma must be a finite number >= 0, got -0.5"),
        ({"rewards": [[1.0, 0.0]], "focal_gamma": math.inf}, "focal_gamma must be a finite number >= 0, got inf"),
        ({"rewards": [[1.0, 0.0]], "focal_gamma": math.nan}, "focal_gamma must be a finite number >= 0, got nan"),
        ({"rewards": [[1.0, 0.0], [0.5, 1.0]], "focal_gamma": 0.5}, "0.5 in group 1, rollout 0"),
        ({"rewards": [1.0, 0.0]}, r"shape \[P, G\], got torch.float32 \[2\]"),
        ({"rewards": [[1.0, 0.0]], "valid": [[True]]}, r"rewards' shape \[1, 2\], got torch.bool \[1, 1\]"),
        ({"rewards": [[1.0, 0.0]], "valid": [[1, 0]]}, "valid must be bool"),
        ({"rewards": None}, "rewards must be numbers"),
        ({"rewards": [[1.0, 0.0]], "std_ddof": 2}, "std_ddof must be 0 or 1, got 2"),
    ],
)
def test_bad_input_is_a_value_error_that_says_what_came(arguments: dict[str, object], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        group_advantages(**arguments)  # type: ignore[arg-type]


def test_rewards_between_are_fine_without_a_focal_weight() -> None:
    assert group_advantages([[0.0, 0.5, 1.0]], method="dr_grpo").tolist() == [[-0.5, 0.0, 0.5]]
