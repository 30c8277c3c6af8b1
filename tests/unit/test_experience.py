"""Records and their Arrow form."""

import io
from collections.abc import Iterator
from itertools import product

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import given
from hypothesis import strategies as st

from actors.experience import (
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


@st.composite
def rollouts(draw: st.DrawFn) -> list[Rollout]:
    """Rollouts of ragged lengths, each with or without blend, teacher and grade."""
    rng = np.random.default_rng(draw(st.integers(0, 2**32 - 1)))
    made = []
    for index in range(draw(st.integers(0, 5))):
        length, size = int(rng.integers(1, 7)), 3

        def floats(*shape: int) -> np.ndarray:  # type: ignore[type-arg]
            return rng.standard_normal(shape).astype(np.float32)

        scored, asked = draw(st.booleans()), draw(st.booleans())
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
        yield value.tolist() if isinstance(value, np.ndarray) else value


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


def test_requests_hold_each_prompt_group_size_times_side_by_side() -> None:
    prompts = [Prompt(prompt_id=i, text=i, token_ids=(1, 2), task="addition", reference="3") for i in ("a", "b")]
    asked = requests_from_arrow(requests_to_arrow(prompts, 3))
    assert asked == list(product(prompts, range(3)))


def test_arrays_of_one_completion_have_one_length() -> None:
    with pytest.raises(AssertionError, match="have one length"):
        Completion(token_ids=np.zeros(2, np.int32), behaviour_logprobs=np.zeros(3, np.float32),
                   student_logprobs=np.zeros(2, np.float32), finish_reason="stop",
                   policy_versions=np.zeros(2, np.int32))  # fmt: skip
