"""Records and their Arrow form."""

import io
from collections.abc import Iterator
from dataclasses import replace
from itertools import product

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import given
from hypothesis import strategies as st

from actors.engines.protocol import Support
from actors.experience import (
    LEARNER_ONLY_COLUMNS,
    BlendTrace,
    Completion,
    Prompt,
    Rollout,
    TeacherScores,
    requests_from_arrow,
    requests_to_arrow,
    rollouts_from_arrow,
    rollouts_to_arrow,
)
from rewards.grade import Grade, Status


def hidden(rng: np.random.Generator, length: int, dtype: type) -> np.ndarray:  # type: ignore[type-arg]
    """States of 5 numbers, or any bits that a bfloat16 may have."""
    if dtype == np.uint16:
        return rng.integers(0, 2**16, (length, 5)).astype(np.uint16)
    return rng.standard_normal((length, 5)).astype(np.float32)


@st.composite
def rollouts(draw: st.DrawFn) -> list[Rollout]:
    """Rollouts of ragged lengths, each with or without blend, teacher and grade."""
    rng = np.random.default_rng(draw(st.integers(0, 2**32 - 1)))
    dtype = draw(st.sampled_from([np.float32, np.uint16]))
    made = []
    for index in range(draw(st.integers(0, 5))):
        length, size = int(rng.integers(1, 7)), 3

        def floats(*shape: int) -> np.ndarray:  # type: ignore[type-arg]
            return rng.standard_normal(shape).astype(np.float32)

        scored, asked, told = draw(st.booleans()), draw(st.booleans()), draw(st.booleans())
        made.append(
            Rollout(
                prompt=Prompt(prompt_id=f"p{index}", text=draw(st.text(max_size=6)), token_ids=tuple(range(index)),
                              task="addition", reference="3"),
                sample_index=index,
                completion=Completion(
                    token_ids=rng.integers(0, 9, length).astype(np.int32), behaviour_logprobs=floats(length),
                    student_logprobs=floats(length), finish_reason="stop",
                    policy_versions=np.full(length, index, np.int32),
                ),
                text=draw(st.text(max_size=6)),
                blend=BlendTrace(epsilon=floats(length), beta=floats(length), divergence=floats(length),
                                 teacher_divergence=floats(length), teacher_logprobs=floats(length),
                                 accepted=rng.random(length) < 0.5)
                if draw(st.booleans()) else None,
                teacher=TeacherScores(
                    support_ids=rng.integers(0, 9, (length, size)).astype(np.int32),
                    student_logprobs=floats(length, size), student_tail_logprobs=floats(length),
                    teacher_logprobs=floats(length, size) if asked else None,
                    teacher_tail_logprobs=floats(length) if asked else None,
                ) if scored else None,
                grade=Grade(reward=1.0, status=Status.CORRECT, detail="x") if draw(st.booleans()) else None,
                learned=Support(
                    ids=rng.integers(0, 9, (length, 2)).astype(np.int32) if draw(st.booleans()) else None,
                    logprobs=floats(length, 2), tail_logprobs=floats(length) if draw(st.booleans()) else None,
                ) if told else None,
                teacher_hidden=hidden(rng, length, dtype) if told else None,
            )
        )  # fmt: skip
    return made


def leaves(value: object) -> Iterator[object]:
    """Every number and word in a record, in order."""
    if hasattr(value, "__dataclass_fields__"):
        for name in value.__dataclass_fields__:
            yield name
            yield from leaves(getattr(value, name))
    else:
        yield (value.dtype, value.tolist()) if isinstance(value, np.ndarray) else value


@given(rollouts())
def test_rollouts_survive_arrow_and_parquet(made: list[Rollout]) -> None:
    batch = rollouts_to_arrow(made)
    file = io.BytesIO()
    pq.write_table(pa.Table.from_batches([batch]), file)
    reread = pq.read_table(file).combine_chunks().to_batches(max_chunksize=None)
    for form in (batch, *reread):
        back = rollouts_from_arrow(form)
        assert [list(leaves(r)) for r in back] == [list(leaves(r)) for r in made]


@given(rollouts())
def test_arrays_read_back_are_views_and_not_copies(made: list[Rollout]) -> None:
    batch = rollouts_to_arrow(made)
    first, second = rollouts_from_arrow(batch), rollouts_from_arrow(batch)
    for one, other in zip(first, second, strict=True):
        assert np.shares_memory(one.completion.token_ids, other.completion.token_ids)
        if one.teacher is not None and other.teacher is not None:
            assert np.shares_memory(one.teacher.support_ids, other.teacher.support_ids)
        if one.teacher_hidden is not None and other.teacher_hidden is not None:
            assert np.shares_memory(one.teacher_hidden, other.teacher_hidden)


@given(rollouts())
def test_a_batch_may_lack_what_only_a_learner_reads(made: list[Rollout]) -> None:
    batch = rollouts_to_arrow(made)
    written = batch.drop_columns(sorted(LEARNER_ONLY_COLUMNS))
    assert not {"teacher_hidden", "learned_logprobs"} & set(written.schema.names)
    expected = [replace(rollout, learned=None, teacher_hidden=None) for rollout in made]
    assert [list(leaves(r)) for r in rollouts_from_arrow(written)] == [list(leaves(r)) for r in expected]


@given(rollouts())
def test_a_learner_hears_what_was_meant_for_it_before_what_was_measured(made: list[Rollout]) -> None:
    for rollout in made:
        told, scores = rollout.learned, rollout.teacher
        if told is None and (scores is None or scores.teacher_logprobs is None):
            with pytest.raises(ValueError, match="must carry a teacher's log-probs"):
                rollout.learner_scores()
            continue
        ids, logprobs, tails = rollout.learner_scores()
        assert ids is None or ids.shape == logprobs.shape
        assert tails.shape == logprobs.shape[:1]
        if told is None:
            assert scores is not None
            assert ids is scores.support_ids
            assert logprobs is scores.teacher_logprobs
            assert tails is scores.teacher_tail_logprobs
        else:
            assert logprobs is told.logprobs
            assert ids is told.ids
            if told.tail_logprobs is None:
                assert np.isneginf(tails).all()


def test_requests_hold_each_prompt_group_size_times_side_by_side() -> None:
    prompts = [Prompt(prompt_id=i, text=i, token_ids=(1, 2), task="addition", reference="3") for i in ("a", "b")]
    asked = requests_from_arrow(requests_to_arrow(prompts, 3))
    assert asked == list(product(prompts, range(3)))


def test_arrays_of_one_completion_have_one_length() -> None:
    with pytest.raises(AssertionError, match="have one length"):
        Completion(token_ids=np.zeros(2, np.int32), behaviour_logprobs=np.zeros(3, np.float32),
                   student_logprobs=np.zeros(2, np.float32), finish_reason="stop",
                   policy_versions=np.zeros(2, np.int32))  # fmt: skip
