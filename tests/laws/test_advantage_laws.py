"""Laws of the group advantages and of the focal weight, with the golden values of F-GRPO's group of eight."""

import math

import numpy as np
import numpy.typing as npt
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from learner.advantages import (
    ADVANTAGES,
    focal_weights,
    group_advantages,
    overlong_penalty,
)
from learner.methods import focal_learning_rate_factor

Rewards = npt.NDArray[np.float64]

COMPARING = ("dr_grpo", "grpo", "maxrl", "rloo")

methods = st.sampled_from(sorted(ADVANTAGES))
comparing = st.sampled_from(COMPARING)
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


def mean_logprobs(rewards: Rewards) -> Rewards:
    """[P, G] nats, all different."""
    return -(1 + np.arange(rewards.size, dtype=np.float64).reshape(rewards.shape)) / 8


def plain(rewards: list[float], method: str, ddof: int, logprobs: list[float]) -> list[float]:
    """The slow obvious twin, for one group; a reward of 1/2 or more is correct."""
    n = len(rewards)
    mean = sum(rewards) / n
    if method == "reinforce":
        return rewards
    if method == "ds_grpo":
        base = plain(rewards, "grpo", 0, logprobs)
        signs = [-1 if reward >= 0.5 else 1 for reward in rewards]
        return [a + 0.05 * sign * nats for a, sign, nats in zip(base, signs, logprobs, strict=True)]
    if len(set(rewards)) == 1 or (method == "maxrl" and max(rewards) <= 0):
        return [0.0] * n
    if method == "rloo":
        return [r - (sum(rewards) - r) / (n - 1) for r in rewards]
    std = math.sqrt(sum((r - mean) ** 2 for r in rewards) / (n - ddof))
    divisor = {"grpo": std + 1e-6, "dr_grpo": 1.0, "maxrl": mean + 1e-6}[method]
    return [(r - mean) / divisor for r in rewards]


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
    logprobs = mean_logprobs(rewards)
    advantages = group_advantages(rewards, method=method, std_ddof=ddof, mean_logprobs=logprobs, correct_at=0.5)
    for row, logprobs_of_row, actual in zip(rewards, logprobs, advantages, strict=True):
        expected = plain(row.tolist(), method, ddof, logprobs_of_row.tolist())
        assert actual.tolist() == pytest.approx(expected, rel=1e-12, abs=1e-12)


@given(rewards=real_rewards(), method=comparing)
def test_advantages_of_a_group_sum_to_zero(rewards: Rewards, method: str) -> None:
    advantages = group_advantages(rewards, method=method)
    assert (advantages.sum(1).abs() <= 1e-9 * (1 + advantages.abs().amax(1))).all()


@given(rewards=binary_rewards(), method=comparing, gamma=gammas)
def test_focal_advantages_of_a_group_sum_to_zero(rewards: Rewards, method: str, gamma: float) -> None:
    assert group_advantages(rewards, method=method, focal_gamma=gamma).sum(1).abs().max() < 1e-9


@given(rewards=binary_rewards(), method=methods, dtype=st.sampled_from([torch.float32, torch.float64]))
def test_without_a_focal_weight_it_is_the_base_method_bit_for_bit(
    rewards: Rewards, method: str, dtype: torch.dtype
) -> None:
    values, logprobs = torch.tensor(rewards, dtype=dtype), mean_logprobs(rewards)
    base = group_advantages(values, method=method, mean_logprobs=logprobs)
    assert base.dtype == dtype
    assert torch.equal(group_advantages(values, method=method, focal_gamma=0.0, mean_logprobs=logprobs), base)
    assert torch.equal(base * focal_weights(values, focal_gamma=0.0)[:, None], base)


@given(rewards=binary_rewards(), method=methods, gamma=st.floats(0.1, 4.0))
def test_the_focal_weight_multiplies_the_finished_advantage(rewards: Rewards, method: str, gamma: float) -> None:
    logprobs = mean_logprobs(rewards)
    base = group_advantages(rewards, method=method, mean_logprobs=logprobs)
    expected = base * torch.tensor((1 - rewards.mean(1)) ** gamma)[:, None]
    focal = group_advantages(rewards, method=method, focal_gamma=gamma, mean_logprobs=logprobs)
    assert torch.allclose(focal, expected, rtol=1e-12)


@given(rewards=binary_rewards(), method=methods, gamma=gammas, data=st.data())
def test_permuting_a_group_permutes_its_advantages(
    rewards: Rewards, method: str, gamma: float, data: st.DataObject
) -> None:
    order, logprobs = data.draw(st.permutations(range(rewards.shape[1]))), mean_logprobs(rewards)
    advantages = group_advantages(rewards, method=method, focal_gamma=gamma, mean_logprobs=logprobs)
    permuted = group_advantages(rewards[:, order], method=method, focal_gamma=gamma, mean_logprobs=logprobs[:, order])
    assert torch.allclose(permuted, advantages[:, order], rtol=1e-12, atol=1e-12)


@given(rewards=binary_rewards(), gamma=st.floats(0.1, 4.0), data=st.data(), method=methods)
def test_shaped_rewards_change_the_advantage_but_not_the_focal_weight(
    rewards: Rewards, gamma: float, data: st.DataObject, method: str
) -> None:
    size = rewards.size
    shaping = data.draw(st.lists(st.sampled_from([0.0, -0.25, -1.0]), min_size=size, max_size=size))
    shaped, logprobs = rewards + np.array(shaping).reshape(rewards.shape), mean_logprobs(rewards)
    base = group_advantages(shaped, method=method, outcomes=rewards, mean_logprobs=logprobs)
    focal = group_advantages(shaped, method=method, outcomes=rewards, mean_logprobs=logprobs, focal_gamma=gamma)
    weights = torch.tensor((1 - rewards.mean(1)) ** gamma)[:, None]
    assert torch.allclose(focal, base * weights, rtol=1e-12)
    if method == "dr_grpo":
        assert torch.allclose(base, torch.tensor(shaped - shaped.mean(1, keepdims=True)), atol=1e-12)


@pytest.mark.parametrize(("wrong", "correct"), [(0.0, 1.0), (-1.0, 1.0), (0.1, 0.7)])
@pytest.mark.parametrize("num_correct", range(9))
def test_maxrl_is_the_mean_over_successes_less_the_mean_over_all(
    num_correct: int, wrong: float, correct: float
) -> None:
    """So sum_i A_i x_i / n is mean of x over correct ones less mean of x, whatever the rewards are worth."""
    rewards = [[correct] * num_correct + [wrong] * (8 - num_correct)]
    advantages = group_advantages(
        np.array(rewards), method="maxrl", reward_wrong=wrong, reward_correct=correct, tiny=0.0
    )
    x = np.arange(8) ** 2
    expected = x[:num_correct].mean() - x.mean() if num_correct else 0.0
    assert (advantages[0].numpy() * x).mean() == pytest.approx(expected, abs=1e-12)


def test_maxrl_divides_shaped_rewards_by_the_rate_of_success() -> None:
    """A group in which only the shaping differs, but nothing is right, teaches nothing."""
    outcomes, shaped = [[1.0, 0.0, 0.0, 0.0], [0.0] * 4], [[1.0, 0.0, 0.0, -1.0], [0.0, 0.0, 0.0, -1.0]]
    advantages = group_advantages(shaped, method="maxrl", outcomes=outcomes, tiny=0.0)
    assert advantages.tolist() == [[4.0, 0.0, 0.0, -4.0], [0.0] * 4]


@pytest.mark.parametrize("correct_at", [None, -0.5])
def test_a_lost_grade_is_not_taken_for_a_correct_one_where_those_are_worth_nothing(correct_at: float | None) -> None:
    weights = focal_weights(
        [[0.0, -1.0, math.nan]],
        focal_gamma=1.0,
        reward_wrong=-1.0,
        reward_correct=0.0,
        valid=[[True, True, False]],
        correct_at=correct_at,
    )
    assert weights.tolist() == [0.5]


def test_ds_grpo_has_an_advantage_in_a_group_of_equal_rewards_and_for_one_alone() -> None:
    rewards, logprobs = [[1.0, 1.0], [0.0, 0.0]], [[-1.0, -3.0], [-1.0, -3.0]]
    advantages = group_advantages(rewards, method="ds_grpo", mean_logprobs=logprobs, ds_coef=0.5)
    assert advantages.tolist() == [[0.5, 1.5], [-0.5, -1.5]]
    alone = group_advantages(
        rewards, method="ds_grpo", mean_logprobs=logprobs, ds_coef=0.5, valid=[[True, False], [False, False]]
    )
    assert alone.tolist() == [[0.5, 0.0], [0.0, 0.0]]


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


@given(rewards=real_rewards(), gamma=st.floats(0.1, 4.0), threshold=st.sampled_from([0.125, 0.5, 1.0]))
def test_with_a_threshold_grades_are_correct_or_wrong(rewards: Rewards, gamma: float, threshold: float) -> None:
    passed = (rewards >= threshold).astype(np.float64)
    weights = focal_weights(rewards, focal_gamma=gamma, correct_at=threshold)
    assert torch.equal(weights, focal_weights(passed, focal_gamma=gamma))
    with pytest.raises(ValueError, match=r"correct_at must be above reward_wrong = 0.0 and at most"):
        focal_weights(rewards, focal_gamma=gamma, correct_at=threshold - 1)


@given(rewards=binary_rewards(), method=methods, gamma=gammas, data=st.data())
def test_masking_a_member_is_removing_it(rewards: Rewards, method: str, gamma: float, data: st.DataObject) -> None:
    num_rollouts, logprobs = rewards.shape[1], mean_logprobs(rewards)
    kept = sorted(data.draw(st.sets(st.integers(0, num_rollouts - 1), min_size=2)))
    valid = np.zeros(rewards.shape, np.bool_)
    valid[:, kept] = True
    lost = np.where(valid, rewards, np.nan)
    masked = group_advantages(lost, method=method, focal_gamma=gamma, valid=valid, mean_logprobs=logprobs)
    assert (masked[~torch.from_numpy(valid)] == 0).all()
    removed = group_advantages(rewards[:, kept], method=method, focal_gamma=gamma, mean_logprobs=logprobs[:, kept])
    assert torch.allclose(masked[:, kept], removed, rtol=1e-12, atol=1e-12)
    weights = focal_weights(lost, focal_gamma=gamma, valid=valid)
    assert torch.equal(weights, focal_weights(rewards[:, kept], focal_gamma=gamma))


@pytest.mark.parametrize("method", COMPARING)
@pytest.mark.parametrize("reward", [0.0, 0.1, 1.0, 1 / 3, -7.3])
def test_a_group_of_equal_rewards_has_advantage_exactly_zero(method: str, reward: float) -> None:
    for dtype in (torch.float32, torch.float64):
        for group_size in (2, 3, 7):
            rewards = torch.full((2, group_size), reward, dtype=dtype)
            assert (group_advantages(rewards, method=method) == 0).all()


@pytest.mark.parametrize("method", COMPARING)
def test_a_group_with_fewer_than_two_valid_members_has_advantage_exactly_zero(method: str) -> None:
    valid = [[True, False, False], [False, False, False]]
    rewards = [[1.0, 0.0, math.nan], [math.inf, 1.0, 0.0]]
    assert (group_advantages(rewards, method=method, focal_gamma=0.5, valid=valid) == 0).all()
    assert focal_weights(rewards, focal_gamma=0.5, valid=valid).tolist() == [0.0, 1.0]


@pytest.mark.parametrize("gamma", [0.0, 0.3, 0.5, 1.0, 2.0, 4.0])
def test_the_learning_rate_factor_is_the_mean_weight_of_an_advantage(gamma: float) -> None:
    """By u = sin(t)^2, under which sqrt(u (1 - u)) du is 2 sin(t)^2 cos(t)^2 dt; midpoints converge fast."""
    t = (np.arange(2000) + 0.5) / 2000 * np.pi / 2
    density = np.sin(t) ** 2 * np.cos(t) ** 2
    expected = (np.cos(t) ** (2 * gamma) * density).sum() / density.sum()
    assert focal_learning_rate_factor(gamma) == pytest.approx(expected, rel=1e-6)
    if gamma in (0.5, 1.0, 2.0):
        table = {0.5: 0.679, 1.0: 0.5, 2.0: 0.3125}
        assert focal_learning_rate_factor(gamma) == pytest.approx(table[gamma], abs=5e-4)


@given(max_new_tokens=st.integers(1, 40), data=st.data(), penalty=st.sampled_from([0.5, 1.0, 2.0]))
def test_a_completion_is_punished_for_its_last_tokens_only(
    max_new_tokens: int, data: st.DataObject, penalty: float
) -> None:
    buffer_tokens = data.draw(st.integers(1, max_new_tokens))
    lengths = np.arange(max_new_tokens + 2)
    penalties = overlong_penalty(lengths, max_new_tokens=max_new_tokens, buffer_tokens=buffer_tokens, penalty=penalty)
    free = max_new_tokens - buffer_tokens
    assert (penalties[: free + 1] == 0).all()
    assert (penalties[max_new_tokens:] == -penalty).all()
    assert np.diff(penalties[free:-1]) == pytest.approx(-penalty / buffer_tokens)


def test_a_buffer_longer_than_a_completion_is_refused() -> None:
    with pytest.raises(ValueError, match=r"from 1 to rollouts.max_new_tokens = 4, got 5"):
        overlong_penalty(np.array([1]), max_new_tokens=4, buffer_tokens=5, penalty=1.0)


def test_integers_and_lists_give_float32() -> None:
    assert group_advantages([[1, 0]]).dtype == torch.float32
    assert focal_weights(np.array([[True, False]]), focal_gamma=1.0).dtype == torch.float32
    assert group_advantages(torch.empty(0, 4)).shape == (0, 4)


def test_methods_that_need_no_other_member_take_a_group_of_one() -> None:
    assert group_advantages([[1.0], [0.0]], method="dr_grpo").tolist() == [[0.0], [0.0]]
    assert group_advantages([[1.0], [-2.0]], method="reinforce").tolist() == [[1.0], [-2.0]]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"rewards": [[0.0, 1.0], [0.0, math.nan]]}, "nan in group 1, rollout 1"),
        ({"rewards": [[0.0, math.inf]]}, "inf in group 0, rollout 1"),
        ({"rewards": [[1.0]], "method": "grpo"}, "at least 2, got 1"),
        ({"rewards": [[1.0]], "method": "rloo"}, "at least 2, got 1"),
        ({"rewards": [[1.0, 0.0]], "method": "ds_grpo"}, "ds_grpo needs mean_logprobs"),
        (
            {"rewards": [[1.0, 0.0]], "outcomes": [[1.0]]},
            r"outcomes must have the rewards' shape \[1, 2\], got \[1, 1\]",
        ),
        ({"rewards": [[1.0, 0.0]], "mean_logprobs": [[math.nan, 0.0]]}, "mean_logprobs must be finite, got nan"),
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
