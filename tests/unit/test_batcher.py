"""From the grades of rollouts to what is learned from them: the batcher."""

import math
from collections.abc import Sequence
from typing import Any

import numpy as np
import pyarrow as pa
import pytest
import ray

from learner.advantages import focal_weights, group_advantages
from learner.aggregation import token_weights
from learner.batcher import Batcher, TrainBatch, groups_that_teach
from learner.config import DistillationObjective, DistillationSection, OverlongSection, PolicyGradientObjective
from learner.errors import LearnerError

Row = tuple[str, int, float | None, str | None, int]

MAX_NEW_TOKENS = 8


def make_summary(
    rows: Sequence[Row], *, finish_reasons: Sequence[str] | None = None, mean_logprobs: Sequence[float] | None = None
) -> pa.RecordBatch:
    columns = [list(values) for values in zip(*rows, strict=True)]
    columns += [list(finish_reasons or ["stop"] * len(rows)), list(mean_logprobs or [-0.5] * len(rows))]
    names = ["prompt_id", "sample_index", "reward", "status", "num_tokens", "finish_reason", "mean_logprob"]
    types = [pa.string(), pa.int32(), pa.float32(), pa.string(), pa.int32(), pa.string(), pa.float32()]
    arrays = [pa.array(values, kind) for values, kind in zip(columns, types, strict=True)]
    return pa.RecordBatch.from_arrays(arrays, names=names)


def shard() -> Any:
    """A reference that nothing follows: packing only hands it on."""
    return ray.ObjectRef.from_random()


def pack(
    objective: PolicyGradientObjective | DistillationObjective, *summaries: pa.RecordBatch, **arguments: Any
) -> tuple[TrainBatch, dict[str, float]]:
    batcher = Batcher(objective=objective, max_new_tokens=MAX_NEW_TOKENS)
    return batcher.pack(0, [shard() for _ in summaries], summaries, **arguments)


# Groups a and b are interleaved over two shards; b lost a member, c both.
ROWS: list[list[Row]] = [
    [("a", 0, 1.0, "correct", 3), ("b", 0, 0.0, "wrong", 5), ("a", 1, 0.0, "unparsable", 2)],
    [("b", 1, 0.0, "timed_out", 7), ("b", 2, 1.0, "correct", 4), ("a", 2, 0.0, "wrong", 1)],
    [("c", 0, 0.0, "crashed", 6), ("c", 1, None, None, 8)],
]
SUMMARIES = [make_summary(rows) for rows in ROWS]

PAIR: list[Row] = [("a", 0, 1.0, "correct", 2), ("a", 1, 0.0, "wrong", 8)]


def test_a_rollout_without_a_verdict_does_not_train_and_leaves_its_group() -> None:
    objective = PolicyGradientObjective(method="grpo", focal_gamma=1.0, reward_wrong=-1.0)
    shards = [shard(), shard(), shard()]
    batch, metrics = Batcher(objective=objective, max_new_tokens=MAX_NEW_TOKENS).pack(4, shards, SUMMARIES)
    group_a = group_advantages([[1.0, -1.0, -1.0]], focal_gamma=1.0, reward_wrong=-1.0)[0].tolist()
    group_b = group_advantages([[-1.0, 1.0]], focal_gamma=1.0, reward_wrong=-1.0)[0].tolist()
    expected = [group_a[0], group_b[0], group_a[1], 0.0, group_b[1], group_a[2], 0.0, 0.0]
    assert batch.step == 4
    assert batch.shards == tuple(shards)
    assert batch.advantages.tolist() == pytest.approx(expected, abs=1e-6)
    assert batch.advantages.dtype == batch.token_weights.dtype == np.float32
    assert batch.trains.tolist() == [True, True, True, False, True, True, False, False]
    assert batch.num_tokens == 3 + 5 + 2 + 4 + 1
    assert batch.token_weights.tolist() == pytest.approx([trains / 15 for trains in batch.trains])
    weights = [*focal_weights([[1.0, 0.0, 0.0], [1.0, 0.0, math.nan]], focal_gamma=1.0,
                              valid=[[True] * 3, [True, True, False]]).tolist(), 1.0]  # fmt: skip
    assert metrics == pytest.approx(
        {
            "reward/status/correct": 2,
            "reward/status/wrong": 2,
            "reward/status/unparsable": 1,
            "reward/status/timed_out": 1,
            "reward/status/crashed": 1,
            "reward/status/ungraded": 1,
            "reward/pass_rate": 2 / 5,
            "reward/zero_variance_groups": 1 / 3,
            "reward/groups/none": 0,
            "reward/groups/first_quarter": 0,
            "reward/groups/second_quarter": 1,
            "reward/groups/third_quarter": 0,
            "reward/groups/last_quarter": 0,
            "reward/groups/all": 0,
            "reward/focal_weight": sum(weights) / 3,
            "reward/focal_weight_active": sum(weights[:2]) / 2,
            "advantage/abs_mean": sum(abs(value) for value in expected) / 5,
            "batch/tokens_masked": 0,
            "batch/padding_groups": 0,
        }
    )


def test_distillation_trains_every_rollout_and_asks_for_no_grade() -> None:
    batch, metrics = pack(DistillationObjective(), SUMMARIES[2])
    assert batch.trains.tolist() == [True, True]
    assert batch.advantages.tolist() == [0.0, 0.0]
    assert batch.num_tokens == 14
    assert batch.token_weights.tolist() == pytest.approx([1 / 14, 1 / 14])
    assert metrics == {"reward/status/crashed": 1.0, "reward/status/ungraded": 1.0}


def test_rewards_with_a_teacher_on_top_train_what_has_a_verdict() -> None:
    alone, _ = pack(PolicyGradientObjective(), *SUMMARIES)
    both, _ = pack(PolicyGradientObjective(distillation=DistillationSection()), *SUMMARIES)
    assert both.trains.tolist() == alone.trains.tolist()
    assert both.advantages.tolist() == alone.advantages.tolist()


def test_a_step_without_any_verdict_is_an_error_that_counts_what_came() -> None:
    batcher = Batcher(objective=PolicyGradientObjective(), max_new_tokens=MAX_NEW_TOKENS)
    with pytest.raises(LearnerError, match=r"step 9 needs a completion to learn from, got none of 2 \(crashed 1, ung"):
        batcher.pack(9, [shard()], SUMMARIES[2:])


def test_a_rollout_that_comes_twice_is_refused() -> None:
    with pytest.raises(AssertionError, match=r"learned from once, got prompt_id, sample_index \('a', 0\)"):
        pack(PolicyGradientObjective(), SUMMARIES[0], SUMMARIES[0])


@pytest.mark.parametrize("wrong", [0.0, -1.0, 0.1, 0.3])
def test_grades_of_zero_and_one_are_exactly_the_rewards_of_the_recipe(wrong: float) -> None:
    objective = PolicyGradientObjective(focal_gamma=0.5, reward_wrong=wrong, reward_correct=0.7)
    batch, _ = pack(objective, *SUMMARIES[:2])
    assert np.isfinite(batch.advantages).all()


def test_a_partial_grade_is_refused_with_a_focal_weight_and_interpolated_without() -> None:
    rows: list[Row] = [("a", 0, 0.5, "correct", 1), ("a", 1, 0.0, "wrong", 1)]
    with pytest.raises(ValueError, match=r"got 0.5 in group 0, rollout 0; set learner.objective.correct_at"):
        pack(PolicyGradientObjective(), make_summary(rows))
    objective = PolicyGradientObjective(method="dr_grpo", focal_gamma=0.0, reward_wrong=-1.0)
    assert pack(objective, make_summary(rows))[0].advantages.tolist() == [0.5, -0.5]


@pytest.mark.parametrize("threshold", [0.3, 0.5, 0.7, 0.9])
@pytest.mark.parametrize(("wrong", "correct"), [(0.0, 1.0), (-1.0, 1.0), (0.1, 0.7)])
def test_a_grade_equal_to_the_threshold_is_correct(threshold: float, wrong: float, correct: float) -> None:
    rows: list[Row] = [("a", 0, threshold, "correct", 1), ("a", 1, threshold - 0.01, "wrong", 1)]
    objective = PolicyGradientObjective(
        method="dr_grpo", focal_gamma=1.0, correct_at=threshold, reward_wrong=wrong, reward_correct=correct
    )
    batch, metrics = pack(objective, make_summary(rows))
    half_the_difference = 0.01 * (correct - wrong) / 2
    assert batch.advantages[0] == pytest.approx(half_the_difference * 0.5, rel=1e-4)
    assert metrics["reward/focal_weight"] == 0.5
    assert metrics["reward/groups/second_quarter"] == 1


def test_a_blend_has_no_focal_weight_unless_the_recipe_says_so() -> None:
    summary = make_summary(PAIR)
    plain = pack(PolicyGradientObjective(focal_gamma=0.0), summary)[0].advantages.tolist()
    focal = pack(PolicyGradientObjective(focal_gamma=1.0), summary)[0].advantages.tolist()
    assert focal == pytest.approx([value / 2 for value in plain])
    blended, metrics = pack(PolicyGradientObjective(focal_gamma=1.0), summary, blended=True)
    assert blended.advantages.tolist() == plain
    assert metrics["reward/focal_weight"] == metrics["reward/focal_weight_active"] == 1
    on = PolicyGradientObjective(focal_gamma=1.0, focal_while_blending="on")
    assert pack(on, summary, blended=True)[0].advantages.tolist() == focal


def test_long_completions_are_punished_in_the_advantage_and_not_in_the_pass_rate() -> None:
    rows: list[Row] = [("a", 0, 1.0, "correct", 4), ("a", 1, 1.0, "correct", 7), ("a", 2, 0.0, "wrong", 8)]
    objective = PolicyGradientObjective(
        method="dr_grpo", focal_gamma=1.0, overlong=OverlongSection(buffer_tokens=4, penalty=1.0)
    )
    batch, metrics = pack(objective, make_summary(rows))
    shaped = np.array([1.0, 1 - 0.75, 0.0 - 1.0])
    assert batch.advantages.tolist() == pytest.approx((shaped - shaped.mean()) / 3)
    assert metrics["reward/overlong_penalty"] == pytest.approx(-1.75 / 3)
    assert metrics["reward/pass_rate"] == pytest.approx(2 / 3)
    assert metrics["reward/focal_weight"] == pytest.approx(1 / 3)
    equal_grades: list[Row] = [("a", 0, 1.0, "correct", 4), ("a", 1, 1.0, "correct", 8)]
    equal, metrics = pack(objective.model_copy(update={"focal_gamma": 0.0}), make_summary(equal_grades))
    assert equal.advantages.tolist() == [0.5, -0.5]
    assert metrics["reward/zero_variance_groups"] == 0


def test_a_truncated_completion_can_be_left_out_but_stays_in_its_group() -> None:
    summary = make_summary(PAIR, finish_reasons=["stop", "length"])
    whole, _ = pack(PolicyGradientObjective(), summary)
    masked, metrics = pack(PolicyGradientObjective(truncated="mask"), summary)
    assert whole.trains.tolist() == [True, True]
    assert masked.trains.tolist() == [True, False]
    assert masked.advantages.tolist() == whole.advantages.tolist()
    assert masked.token_weights.tolist() == [0.5, 0.0]
    assert masked.num_tokens == 2
    assert metrics["batch/tokens_masked"] == 8 / 10
    assert metrics["advantage/abs_mean"] == pytest.approx(masked.advantages[0])


def test_a_batch_that_is_masked_whole_is_a_step_that_learns_nothing() -> None:
    objective = PolicyGradientObjective(truncated="mask", method="gspo")
    batch, metrics = pack(objective, make_summary(PAIR, finish_reasons=["length", "length"]))
    assert batch.num_tokens == 0
    assert not batch.trains.any()
    assert not batch.token_weights.any()
    assert metrics["batch/tokens_masked"] == 1
    assert metrics["advantage/abs_mean"] == 0
    assert all(math.isfinite(value) for value in metrics.values())


def test_padding_counts_as_rollouts_and_neither_trains_nor_counts_as_a_group() -> None:
    padding: list[Row] = [("p", 0, 1.0, "correct", 4), ("p", 1, 1.0, "correct", 6)]
    alone, expected = pack(PolicyGradientObjective(), make_summary(PAIR))
    batch, metrics = pack(
        PolicyGradientObjective(), make_summary(padding[:1]), make_summary(PAIR), make_summary(padding[1:]),
        padding=frozenset({"p"}),
    )  # fmt: skip
    assert batch.trains.tolist() == [False, True, True, False]
    assert batch.advantages.tolist() == [0.0, *alone.advantages.tolist(), 0.0]
    assert batch.token_weights.tolist() == [0.0, *alone.token_weights.tolist(), 0.0]
    assert batch.num_tokens == alone.num_tokens
    changed = {
        "reward/status/correct": 3.0,
        "reward/pass_rate": 3 / 4,
        "batch/padding_groups": 1.0,
        "batch/tokens_masked": 10 / 20,
    }
    assert metrics == pytest.approx(expected | changed)
    distilled, _ = pack(DistillationObjective(), make_summary(padding), make_summary(PAIR), padding={"p"})
    assert distilled.trains.tolist() == [False, False, True, True]


@pytest.mark.parametrize(
    ("values", "method", "aggregation_tokens"),
    [
        ({"method": "grpo"}, "token_mean", 1),
        ({"method": "gspo"}, "sequence_mean", 1),
        ({"method": "dr_grpo"}, "fixed", MAX_NEW_TOKENS),
        ({"method": "dr_grpo", "aggregation_tokens": 5}, "fixed", 5),
        ({"method": "dr_grpo", "aggregation": "sequence_mean"}, "sequence_mean", 1),
    ],
)
def test_the_aggregation_of_the_method_or_of_the_recipe_weighs_the_tokens(
    values: dict[str, Any], method: str, aggregation_tokens: int
) -> None:
    batch, _ = pack(PolicyGradientObjective(**values), *SUMMARIES)
    lengths = np.array([row[4] for rows in ROWS for row in rows])
    expected = token_weights(lengths, batch.trains, method=method, aggregation_tokens=aggregation_tokens)
    assert batch.token_weights.tolist() == pytest.approx(expected.tolist())


def test_each_setting_of_the_recipe_reaches_the_advantages() -> None:
    rewards = [[1.0, 0.0, 0.0]]
    rows: list[Row] = [("a", 0, 1.0, "correct", 1), ("a", 1, 0.0, "wrong", 1), ("a", 2, 0.0, "wrong", 1)]
    logprobs = [-0.5, -1.5, -2.0]
    summary = make_summary(rows, mean_logprobs=logprobs)
    for values, arguments in (
        ({"std_ddof": 0}, {"std_ddof": 0}),
        ({"method": "maxrl"}, {"method": "maxrl"}),
        ({"method": "gspo", "advantage": "rloo"}, {"method": "rloo"}),
        ({"method": "reinforce"}, {"method": "reinforce"}),
        ({"method": "ds_grpo", "ds_coef": 0.3}, {"method": "ds_grpo", "ds_coef": 0.3, "mean_logprobs": [logprobs]}),
    ):
        expected = group_advantages(rewards, focal_gamma=0.5, **arguments)  # type: ignore[arg-type]
        batch, _ = pack(PolicyGradientObjective(**values), summary)  # type: ignore[arg-type]
        assert batch.advantages.tolist() == pytest.approx(expected[0].tolist(), abs=1e-6)


def test_groups_are_counted_by_their_pass_rate() -> None:
    correct_of_four = {"none": 0, "one": 1, "two": 2, "three": 3, "all": 4}
    rows: list[Row] = [
        (name, i, float(i < num_correct), "correct" if i < num_correct else "wrong", 1)
        for name, num_correct in correct_of_four.items()
        for i in range(4)
    ]
    rows += [("most", i, float(i < 4), "correct" if i < 4 else "wrong", 1) for i in range(5)]
    _, metrics = pack(PolicyGradientObjective(focal_gamma=1.0), make_summary(rows))
    shares = [value for name, value in metrics.items() if name.startswith("reward/groups/")]
    assert shares == pytest.approx([1 / 6] * 6)
    assert metrics["reward/zero_variance_groups"] == pytest.approx(2 / 6)
    assert metrics["reward/focal_weight"] == pytest.approx((1 + 0.75 + 0.5 + 0.25 + 0 + 0.2) / 6)
    assert metrics["reward/focal_weight_active"] == pytest.approx((0.75 + 0.5 + 0.25 + 0.2) / 4)


def test_a_group_teaches_if_its_verdicts_differ() -> None:
    rows: list[Row] = [
        ("same", 0, 1.0, "correct", 1),
        ("same", 1, 1.0, "correct", 1),
        ("lost", 0, 1.0, "correct", 1),
        ("lost", 1, 0.0, "crashed", 1),
    ]
    teaching = groups_that_teach([*SUMMARIES, make_summary(rows)])
    assert teaching == {"a": True, "b": True, "c": False, "same": False, "lost": False}
    assert groups_that_teach([]) == {}
