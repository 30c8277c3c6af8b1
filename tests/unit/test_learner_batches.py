"""From rollouts to what the ranks compute with: dealing, padding, learning rate, recipe section."""

import math
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from pydantic import ValidationError

from actors.engines.protocol import Support
from actors.experience import Completion, Prompt, Rollout, TeacherScores
from actors.weights import WeightArray, pack_bucket
from learner.config import LearnerSection
from learner.learning_rate import learning_rate_factor
from learner.micro_batches import TrainRow, build_micro_batch, deal_rows


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
    return TrainRow(rollout=rollout, advantage=0.5, trains=trains, token_weight=0.25)


def test_packed_rollouts_lie_one_after_another_and_predictors_point_at_what_reads_before_each_token() -> None:
    rows = [make_row([1, 2, 3], [4, 5]), make_row([6], [7, 8, 9])]
    batch = build_micro_batch(rows, packing=True, support_size=2)
    assert batch.input_ids.tolist() == [[1, 2, 3, 4, 6, 7, 8]]
    assert batch.position_ids.tolist() == [[0, 1, 2, 3, 0, 1, 2]]
    assert batch.segments == ((4, 3),)
    assert batch.predictors.tolist() == [2, 3, 4, 5, 6]
    tokens = batch.tokens
    assert tokens.token_ids.tolist() == [4, 5, 7, 8, 9]
    assert tokens.rollouts.tolist() == [0, 0, 1, 1, 1]
    assert tokens.weights.tolist() == [0.25] * 5
    assert tokens.advantages.tolist() == [0.5] * 5
    assert tokens.behaviour_logprobs.tolist() == [-1, -2, -1, -2, -3]
    assert tokens.support_ids is not None
    assert tokens.support_teacher_logprobs is not None
    assert tokens.support_ids.tolist() == [[4, 5], [5, 6], [7, 8], [8, 9], [9, 10]]
    assert tokens.support_teacher_logprobs[2].tolist() == [-14, -16]


@given(
    lengths=st.lists(st.tuples(st.integers(1, 4), st.integers(0, 4), st.booleans()), min_size=1, max_size=5),
    packing=st.booleans(),
)
def test_every_training_token_is_there_once_behind_the_input_that_predicts_it(
    lengths: list[tuple[int, int, bool]], packing: bool
) -> None:
    ids = iter(range(100))
    rows = [
        make_row([next(ids) for _ in range(prompt)], [next(ids) for _ in range(completion)], trains=trains)
        for prompt, completion, trains in lengths
    ]
    batch = build_micro_batch(rows, packing=packing, support_size=None)
    learned = [token for row in rows if row.trains for token in row.rollout.completion.token_ids.tolist()]
    assert batch.tokens.token_ids.tolist() == learned
    # Ids count up along each rollout, so that the input before a token is the token less one.
    assert (batch.input_ids.flatten()[batch.predictors] == batch.tokens.token_ids - 1).all()
    assert batch.input_ids.numel() > 0
    assert batch.input_ids.shape[0] == (1 if packing else len(batch.rollouts))
    kept = [length for row in batch.segments for length in row]
    assert len(kept) == len(batch.rollouts)
    positions = [position for length in kept for position in range(length)]
    rows_of_positions = zip(batch.position_ids.tolist(), batch.segments, strict=True)
    assert [position for row, row_lengths in rows_of_positions for position in row[: sum(row_lengths)]] == positions


def test_mass_beyond_a_shorter_support_is_in_its_tail() -> None:
    row = make_row([1], [2, 3])
    assert row.rollout.teacher is not None
    whole, cut = (build_micro_batch([row], packing=True, support_size=size).tokens for size in (None, 1))
    assert whole.support_teacher_logprobs is not None
    assert whole.support_teacher_tails is not None
    assert cut.support_teacher_tails is not None
    beyond = torch.cat([whole.support_teacher_logprobs[:, 1:], whole.support_teacher_tails[:, None]], 1).logsumexp(1)
    torch.testing.assert_close(cut.support_teacher_tails, beyond)
    assert build_micro_batch([row], packing=True, support_size=0).tokens.support_ids is None


def test_a_row_that_does_not_train_is_left_out_and_needs_no_teacher() -> None:
    rows = [make_row([1], [2, 3], trains=False, scored=False), make_row([1], [2])]
    batch = build_micro_batch(rows, packing=False, support_size=1)
    assert batch.input_ids.tolist() == [[1]]
    assert batch.tokens.support_ids is not None
    alone = build_micro_batch(rows[:1], packing=True, support_size=1)
    assert alone.input_ids.tolist() == [[1, 2]]
    assert len(alone.tokens) == 0
    unscored = make_row([1], [2], scored=False)
    assert build_micro_batch([unscored], packing=True, support_size=1).tokens.support_ids is None
    with pytest.raises(ValueError, match="must carry the teacher's log-probs, got 1 of 2 with it"):
        build_micro_batch([unscored, rows[1]], packing=True, support_size=1)
    with pytest.raises(ValueError, match="at least one token, got none in p"):
        build_micro_batch([make_row([], [2])], packing=True, support_size=1)


def test_a_law_in_the_vocabularys_order_is_taken_whole_and_needs_no_ids() -> None:
    laws = np.log(np.random.default_rng(0).dirichlet(np.ones(6), 5)).astype(np.float32)
    rows = [
        replace(row, rollout=replace(row.rollout, learned=Support(ids=None, logprobs=part, tail_logprobs=None)))
        for row, part in ((make_row([1], [2, 3]), laws[:2]), (make_row([1], [2, 3, 4]), laws[2:]))
    ]
    tokens = build_micro_batch(rows, packing=True, support_size=None).tokens
    assert tokens.support_ids is None
    assert tokens.support_teacher_tails is None
    assert tokens.support_teacher_logprobs is not None
    assert tokens.support_teacher_logprobs.dtype == torch.float32
    assert (tokens.support_teacher_logprobs.numpy() == laws).all()
    with pytest.raises(ValueError, match="has no 2 first ids; set signal to full"):
        build_micro_batch(rows, packing=True, support_size=2)
    with_ids = Support(ids=np.tile(np.arange(6, dtype=np.int32), (2, 1)), logprobs=laws[:2], tail_logprobs=None)
    mixed = [replace(rows[0], rollout=replace(rows[0].rollout, learned=with_ids)), rows[1]]
    with pytest.raises(ValueError, match="must carry the ids of the teacher's support, got 1 of 2"):
        build_micro_batch(mixed, packing=True, support_size=None)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_hidden_states_keep_their_precision(dtype: torch.dtype) -> None:
    states = torch.randn(5, 3).to(dtype)
    stored = (states if dtype == torch.float32 else states.view(torch.uint16)).numpy()
    rows = [
        replace(row, rollout=replace(row.rollout, teacher_hidden=part))
        for row, part in ((make_row([1], [2, 3]), stored[:2]), (make_row([1], [2, 3, 4]), stored[2:]))
    ]
    hidden = build_micro_batch(rows, packing=True, support_size=0).tokens.teacher_hidden
    assert hidden is not None
    assert hidden.dtype == dtype
    assert torch.equal(hidden, states)


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
        ({"objective": {"type": "distillation", "teacher_logprob_floor": 0.0}}, "less than 0"),
        ({"objective": {"type": "sft"}}, "'distillation', 'policy_gradient'"),
    ],
)
def test_a_bad_learner_section_is_refused(values: dict[str, Any], message: str) -> None:
    with pytest.raises(ValidationError, match=message):
        LearnerSection.model_validate(values)


def test_a_learner_section_survives_its_json() -> None:
    section = LearnerSection.model_validate({"adam_betas": [0.9, 0.95], "objective": {"type": "policy_gradient"}})
    assert section.adam_betas == (0.9, 0.95)
    assert LearnerSection.model_validate_json(section.model_dump_json()) == section
