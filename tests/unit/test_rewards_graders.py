"""Graders by task, the grader actor's plain class, and their section of the recipe. About 10 s: real math workers."""

import math
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pytest
from pydantic import ValidationError

from actors.experience import Completion, Prompt, Rollout, rollouts_from_arrow, rollouts_to_arrow
from rewards.config import GradersSection
from rewards.grade import Grade, Status, graded, no_reward
from rewards.grader_actor import GraderActor
from rewards.graders import TASKS, Graders, require_task

POWER_TOWER = r"\boxed{9^{9^{9^{9}}}}"


@pytest.fixture(scope="module")
def graders() -> Iterator[Graders]:
    shared = Graders(GradersSection(deadline_s=2.0))
    yield shared
    shared.close()


def test_mixed_tasks_are_graded_in_order_and_a_hostile_answer_costs_no_other_its_grade(graders: Graders) -> None:
    around = [("#12", "addition", "12"), (r"\boxed{1/2}", "math", "0.5"), ("9*5=45,45-3=42", "countdown", "3 5 9>42"),
              ("the answer is 7", "math", "8"), ("#13", "addition", "12"), ("no idea", "math", "8")]  # fmt: skip
    grades = graders.grade([*around, (POWER_TOWER, "math", "1"), *around])
    assert grades.pop(len(around)).status is Status.TIMED_OUT
    expected = [Status.CORRECT, Status.CORRECT, Status.CORRECT, Status.WRONG, Status.WRONG, Status.UNPARSABLE]
    assert [grade.status for grade in grades] == expected * 2
    assert [grade.reward for grade in grades] == [1.0, 1.0, 1.0, 0.0, 0.0, 0.0] * 2


def test_exact_tasks_start_no_process() -> None:
    folder = Path(f"/proc/{os.getpid()}/task")
    before = "".join(path.read_text() for path in folder.glob("*/children"))
    graders = Graders(GradersSection())
    graders.grade([("#12", "addition", "12"), ("", "countdown", "3 5 9>42")])
    assert "".join(path.read_text() for path in folder.glob("*/children")) == before
    graders.close()


def test_an_unknown_task_is_refused_with_the_one_probably_meant(graders: Graders) -> None:
    with pytest.raises(ValueError, match=r"got 'adition' \(did you mean 'addition'\?\)"):
        graders.grade([("#12", "addition", "12"), ("#12", "adition", "12")])
    with pytest.raises(ValueError, match=r"task must be one of addition, countdown, math, got 'zzz'$"):
        require_task("zzz")
    for task in TASKS:
        require_task(task)


def test_workers_that_cannot_start_crash_their_grades_and_no_others() -> None:
    graders = Graders(GradersSection(memory_gib=0.01))
    exact, pooled = graders.grade([("#12", "addition", "12"), (r"\boxed{1}", "math", "1")])
    graders.close()
    assert exact.status is Status.CORRECT
    assert pooled.status is Status.CRASHED
    assert "rewards.math_answers:check" in pooled.detail


def test_nothing_to_grade_gives_nothing(graders: Graders) -> None:
    assert graders.grade([]) == []


def test_a_checker_that_raises_is_data() -> None:
    def raises(text: str, reference: str) -> Grade:
        raise KeyError(text)

    grade = graded(raises, "\u00e9" * 1000, "")
    assert grade.status is Status.CRASHED
    assert not grade.status.is_verdict
    assert grade.detail.isascii()
    assert len(grade.detail) < 300
    assert graded(lambda text, reference: no_reward(Status.WRONG, text), "w", "").detail == "w"


def rollout(text: str, *, reference: str, sample_index: int, num_tokens: int) -> Rollout:
    zeros = np.zeros(num_tokens, dtype=np.float32)
    falling = -np.arange(num_tokens, dtype=np.float32)
    completion = Completion(
        token_ids=np.arange(num_tokens, dtype=np.int32),
        behaviour_logprobs=zeros,
        student_logprobs=falling,
        finish_reason="stop",
        policy_versions=np.zeros(num_tokens, dtype=np.int32),
    )
    prompt = Prompt(prompt_id="p-1", text="7+5:", token_ids=(1, 2), task="addition", reference=reference)
    return Rollout(prompt=prompt, sample_index=sample_index, completion=completion, text=text)


def test_the_grader_actor_fills_the_grades_of_a_batch_and_sums_it_up() -> None:
    texts = ["#12", "#13", "x"]
    batch = rollouts_to_arrow(
        [rollout(text, reference="12", sample_index=i, num_tokens=i + 2) for i, text in enumerate(texts)]
    )
    actor = GraderActor("grader-0", GradersSection())
    assert repr(actor) == "grader-0"
    full, _, short = actor.grade(batch)
    without, _, _ = actor.grade(batch, learner_only=["token_ids", "support_ids"])
    actor.close()
    assert full.schema.equals(batch.schema, check_metadata=True)
    unchanged = set(batch.schema.names) - {"reward", "status", "grade_detail", "grade_s"}
    assert all(full.column(name).equals(batch.column(name)) for name in unchanged)
    grades = [graded_rollout.grade for graded_rollout in rollouts_from_arrow(full)]
    assert [grade.status for grade in grades if grade] == [Status.CORRECT, Status.WRONG, Status.UNPARSABLE]
    assert [grade.detail for grade in grades if grade][1] == "the answer is 13, not 12"
    assert all(grade.seconds > 0 for grade in grades if grade)
    assert short.to_pydict() == {
        "prompt_id": ["p-1"] * 3, "sample_index": [0, 1, 2], "reward": [1.0, 0.0, 0.0],
        "status": ["correct", "wrong", "unparsable"], "num_tokens": [2, 3, 4],
        "finish_reason": ["stop"] * 3, "mean_logprob": [-0.5, -1.0, -1.5],
    }  # fmt: skip
    assert set(batch.schema.names) - set(without.schema.names) == {"token_ids", "support_ids"}
    assert short.schema.field("reward").type == pa.float32()
    assert short.schema.field("num_tokens").type == pa.int32()


@pytest.mark.parametrize(
    "wrong",
    [{"num_actors": 0}, {"num_cpus": 0.0}, {"deadline_s": math.inf}, {"deadline_s": "5"}, {"num_workers": 0},
     {"memory_gib": -1.0}, {"memory_gib": math.nan}, {"dead_line_s": 1.0}, {"num_workers": 1.5}],
)  # fmt: skip
def test_the_section_refuses_what_cannot_be(wrong: dict[str, Any]) -> None:
    [field] = wrong
    with pytest.raises(ValidationError) as caught:
        GradersSection(**wrong)
    assert caught.value.errors()[0]["loc"] == (field,)


def test_the_section_explains_every_field() -> None:
    assert all(field.description for field in GradersSection.model_fields.values())


def test_reading_the_section_and_the_tasks_imports_nothing_heavy() -> None:
    script = "import sys, rewards.config, rewards.graders; print(*sys.modules)"
    root = Path(__file__).resolve().parents[2]
    modules = subprocess.run(
        [sys.executable, "-c", script], cwd=root, capture_output=True, text=True, check=True
    ).stdout.split()
    assert not set(modules) & {"torch", "ray", "vllm", "deepspeed", "transformers", "sympy", "math_verify"}
