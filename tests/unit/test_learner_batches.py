"""From grades and rollouts to what the ranks compute with: batcher, dealing, padding, learning rate, recipe section."""

import math
from collections.abc import Sequence
from typing import Any

import numpy as np
import pyarrow as pa
import pytest
import ray
import torch
from hypothesis import given
from hypothesis import strategies as st
from pydantic import ValidationError

from actors.experience import Completion, Prompt, Rollout, TeacherScores
from actors.weights import WeightArray, pack_bucket
from learner.advantages import focal_weights, group_advantages
from learner.batcher import Batcher
from learner.config import LearnerSection, PolicyGradientObjective, ReverseKLObjective
from learner.errors import LearnerError
from learner.learning_rate import learning_rate_factor
from learner.micro_batches import TrainRow, build_micro_batch, deal_rows

Row = tuple[str, int, float | None, str | None, int]


def make_summary(rows: Sequence[Row]) -> pa.RecordBatch:
    names = ["prompt_id", "sample_index", "reward", "status", "num_tokens"]
    types = [pa.string(), pa.int32(), pa.float32(), pa.string(), pa.int32()]
    columns = [pa.array(values, kind) for values, kind in zip(zip(*rows, strict=True), types, strict=True)]
    return pa.RecordBatch.from_arrays(columns, names=names)


def shard() -> Any:
    """A reference that nothing follows: packing only hands it on."""
    return ray.ObjectRef.from_random()


# Groups a and b are interleaved over two shards; b lost a member, c both.
ROWS: list[list[Row]] = [
    [("a", 0, 1.0, "correct", 3), ("b", 0, 0.0, "wrong", 5), ("a", 1, 0.0, "unparsable", 2)],
    [("b", 1, 0.0, "timed_out", 7), ("b", 2, 1.0, "correct", 4), ("a", 2, 0.0, "wrong", 1)],
    [("c", 0, 0.0, "crashed", 6), ("c", 1, None, None, 8)],
]


def test_a_rollout_without_a_verdict_does_not_train_and_leaves_its_group() -> None:
    objective = PolicyGradientObjective(method="grpo", focal_gamma=1.0, reward_wrong=-1.0)
    shards = [shard(), shard(), shard()]
    batch, metrics = Batcher(objective=objective).pack(4, shards, [make_summary(rows) for rows in ROWS])
    group_a = group_advantages([[1.0, -1.0, -1.0]], focal_gamma=1.0, reward_wrong=-1.0)[0].tolist()
    group_b = group_advantages([[-1.0, 1.0]], focal_gamma=1.0, reward_wrong=-1.0)[0].tolist()
    expected = [group_a[0], group_b[0], group_a[1], 0.0, group_b[1], group_a[2], 0.0, 0.0]
    assert batch.step == 4
    assert batch.shards == tuple(shards)
    assert batch.advantages.tolist() == pytest.approx(expected, abs=1e-6)
    assert batch.advantages.dtype == np.float32
    assert batch.trains.tolist() == [True, True, True, False, True, True, False, False]
    assert batch.num_tokens == 3 + 5 + 2 + 4 + 1
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
            "reward/focal_weight": sum(weights) / 3,
            "advantage/abs_mean": sum(abs(value) for value in expected) / 5,
        }
    )


def test_distillation_trains_every_rollout_and_asks_for_no_grade() -> None:
    batch, metrics = Batcher(objective=ReverseKLObjective()).pack(0, [shard()], [make_summary(ROWS[2])])
    assert batch.trains.tolist() == [True, True]
    assert batch.advantages.tolist() == [0.0, 0.0]
    assert batch.num_tokens == 14
    assert metrics == {"reward/status/crashed": 1.0, "reward/status/ungraded": 1.0}


def test_a_step_without_any_verdict_is_an_error_that_counts_what_came() -> None:
    with pytest.raises(LearnerError, match=r"step 9 needs a completion to learn from, got none of 2 \(crashed 1, ung"):
        Batcher(objective=PolicyGradientObjective()).pack(9, [shard()], [make_summary(ROWS[2])])


@pytest.mark.parametrize("wrong", [0.0, -1.0, 0.1, 0.3])
def test_grades_of_zero_and_one_are_exactly_the_rewards_of_the_recipe(wrong: float) -> None:
    objective = PolicyGradientObjective(focal_gamma=0.5, reward_wrong=wrong, reward_correct=0.7)
    batch, _ = Batcher(objective=objective).pack(0, [shard(), shard()], [make_summary(rows) for rows in ROWS[:2]])
    assert np.isfinite(batch.advantages).all()


def test_a_partial_grade_is_refused_with_a_focal_weight_and_interpolated_without() -> None:
    rows = [("a", 0, 0.5, "correct", 1), ("a", 1, 0.0, "wrong", 1)]
    with pytest.raises(ValueError, match=r"got 0.5 in group 0, rollout 0"):
        Batcher(objective=PolicyGradientObjective()).pack(0, [shard()], [make_summary(rows)])
    objective = PolicyGradientObjective(method="dr_grpo", focal_gamma=0.0, reward_wrong=-1.0)
    batch, _ = Batcher(objective=objective).pack(0, [shard()], [make_summary(rows)])
    assert batch.advantages.tolist() == [0.5, -0.5]


@given(
    lengths=st.lists(st.integers(1, 20), min_size=1, max_size=6),
    world_size=st.integers(1, 3),
    micro_batch_size=st.integers(1, 3),
)
def test_every_row_is_dealt_once_and_a_round_holds_neighbours_in_length(
    lengths: list[int], world_size: int, micro_batch_size: int
) -> None:
    lengths = (lengths * world_size * micro_batch_size)[: len(lengths) * world_size * micro_batch_size]
    dealt = deal_rows(lengths, world_size=world_size, micro_batch_size=micro_batch_size)
    assert sorted(row for rank in dealt for rows in rank for row in rows) == list(range(len(lengths)))
    rounds = [[lengths[row] for rank in dealt for row in rank[i]] for i in range(len(dealt[0]))]
    assert [length for one in rounds for length in one] == sorted(lengths, reverse=True)


def test_rows_that_do_not_fill_the_ranks_are_refused() -> None:
    with pytest.raises(ValueError, match=r"world_size 2 x learner.micro_batch_size 2, got 6"):
        deal_rows([1] * 6, world_size=2, micro_batch_size=2)


def make_row(
    prompt_ids: Sequence[int], token_ids: Sequence[int], *, trains: bool = True, scored: bool = True
) -> TrainRow:
    num_tokens, tokens = len(token_ids), np.array(token_ids, np.int32)
    logprobs = -np.arange(1, num_tokens + 1, dtype=np.float32)
    support = np.stack([tokens, tokens + 1, tokens + 2], axis=1)
    scores = TeacherScores(
        support_ids=support,
        student_logprobs=-support.astype(np.float32),
        student_tail_logprobs=logprobs,
        teacher_logprobs=-2 * support.astype(np.float32),
        teacher_tail_logprobs=logprobs,
    )
    rollout = Rollout(
        prompt=Prompt(prompt_id="p", text="", token_ids=tuple(prompt_ids), task="none", reference=""),
        sample_index=0,
        completion=Completion(
            token_ids=tokens,
            behaviour_logprobs=logprobs,
            student_logprobs=logprobs,
            finish_reason="stop",
            policy_versions=np.zeros(num_tokens, np.int32),
        ),
        teacher=scores if scored else None,
    )
    return TrainRow(rollout=rollout, advantage=0.5, trains=trains)


def test_the_window_holds_each_token_at_the_input_that_predicts_it() -> None:
    rows = [make_row([1, 2, 3], [4, 5]), make_row([6], [7, 8, 9]), make_row([10, 11], [], trains=False)]
    batch = build_micro_batch(rows, support_size=2)
    assert batch.input_ids.tolist() == [[1, 2, 3, 4], [6, 7, 8, 0], [10, 0, 0, 0]]
    assert batch.attention_mask.tolist() == [[1, 1, 1, 1], [1, 1, 1, 0], [1, 0, 0, 0]]
    assert batch.token_ids.tolist() == [[0, 0, 4, 5], [7, 8, 9, 0], [0, 0, 0, 0]]
    assert batch.loss_mask.tolist() == [[False, False, True, True], [True, True, True, False], [False] * 4]
    assert batch.behaviour_logprobs.tolist() == [[0, 0, -1, -2], [-1, -2, -3, 0], [0, 0, 0, 0]]
    assert batch.support_ids is not None
    assert batch.support_teacher_logprobs is not None
    assert batch.support_ids[0].tolist() == [[0, 0], [0, 0], [4, 5], [5, 6]]
    assert batch.support_teacher_logprobs[1].tolist() == [[-14, -16], [-16, -18], [-18, -20], [0, 0]]


def test_a_row_that_does_not_train_is_masked_and_needs_no_teacher() -> None:
    masked = build_micro_batch([make_row([1], [2, 3], trains=False, scored=False), make_row([1], [2])], support_size=1)
    assert masked.loss_mask.tolist() == [[False, False], [True, False]]
    assert masked.support_ids is not None
    assert build_micro_batch([make_row([1], [2], scored=False)], support_size=1).support_ids is None
    with pytest.raises(ValueError, match="at least one token, got none in p"):
        build_micro_batch([make_row([], [2])], support_size=1)


def test_the_learning_rate_rises_stays_or_falls() -> None:
    def factors(schedule: Any) -> list[float]:
        return [learning_rate_factor(s, schedule=schedule, warmup_steps=2, num_steps=6) for s in range(8)]

    assert factors("constant") == [0.5, 1, 1, 1, 1, 1, 1, 1]
    assert factors("linear") == [0.5, 1, 1, 0.75, 0.5, 0.25, 0, 0]
    half = math.sqrt(0.5)
    assert factors("cosine") == pytest.approx([0.5, 1, 1, (1 + half) / 2, 0.5, (1 - half) / 2, 0, 0])
    assert learning_rate_factor(0, schedule="linear", warmup_steps=0, num_steps=0) == 1.0


def test_tensors_travel_as_arrays_of_the_same_bits() -> None:
    whole, half = torch.randn(2, 3), torch.randn(4).bfloat16()
    packed = pack_bucket([("whole", whole), ("half", half)])
    assert [(w.name, w.dtype, w.array.dtype.name) for w in packed] == [
        ("whole", "float32", "float32"),
        ("half", "bfloat16", "uint16"),
    ]
    assert isinstance(packed[0], WeightArray)
    assert torch.equal(torch.from_numpy(packed[0].array), whole)
    assert torch.equal(torch.from_numpy(packed[1].array).view(torch.bfloat16), half)
    with pytest.raises(ValueError, match=r"float32 or bfloat16, got torch.float64 for odd"):
        pack_bucket([("odd", torch.zeros(1, dtype=torch.float64))])


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"zero_stage": 0}, "without ZeRO, DeepSpeed reports no gradient norm"),
        ({"zero_stage": 4}, "Input should be 1, 2 or 3"),
        ({"adam_betas": [0.9, 1.0]}, r"adam_betas must lie in \[0, 1\), got \[0.9, 1.0\]"),
        ({"adam_betas": ["0.9", 0.99]}, "valid number"),
        ({"learning_rate": math.inf}, "finite number"),
        ({"grad_clip": 0.0}, "greater than 0"),
        ({"world_sise": 2}, "world_sise"),
        ({"objective": {"type": "policy_gradient", "reward_wrong": 1.0}}, "reward_correct must be above reward_wrong"),
        ({"objective": {"type": "reverse_kl", "teacher_logprob_floor": 0.0}}, "less than 0"),
        ({"objective": {"type": "sft"}}, "'reverse_kl', 'policy_gradient'"),
    ],
)
def test_a_bad_learner_section_is_refused(values: dict[str, Any], message: str) -> None:
    with pytest.raises(ValidationError, match=message):
        LearnerSection.model_validate(values)


def test_a_learner_section_survives_its_json() -> None:
    section = LearnerSection.model_validate({"adam_betas": [0.9, 0.95], "objective": {"type": "policy_gradient"}})
    assert section.adam_betas == (0.9, 0.95)
    assert LearnerSection.model_validate_json(section.model_dump_json()) == section
