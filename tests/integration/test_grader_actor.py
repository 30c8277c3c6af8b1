"""The grader as a real Ray actor. About 8 s beyond the start of Ray."""

from pathlib import Path
from typing import Any

import pyarrow as pa
import pytest
import ray

from rewards.config import GradersSection
from rewards.grader_actor import GraderActor

pytestmark = pytest.mark.ray


def workers() -> set[int]:
    """Every living grading worker of the machine."""
    found = set()
    for folder in Path("/proc").glob("[0-9]*"):
        try:
            if b"rewards.math_answers" in (folder / "cmdline").read_bytes():
                found.add(int(folder.name))
        except (FileNotFoundError, ProcessLookupError):
            continue
    return found


def test_a_math_grader_works_in_an_actor_and_close_ends_its_workers(ray_cluster: str) -> None:
    before = workers()
    batch = pa.RecordBatch.from_pydict(
        {
            "prompt_id": ["p"] * 4,
            "sample_index": pa.array(range(4), pa.int32()),
            "text": [r"\boxed{1/2}", r"\boxed{9^{9^{9^{9}}}}", r"\boxed{2}", "#12"],
            "task": ["math", "math", "math", "addition"],
            "reference": ["0.5", "1", "1", "12"],
            "token_ids": pa.array([[1], [1, 2], [], [3]], pa.list_(pa.int32())),
            "student_logprobs": pa.array([[-1.0], [-1.0, -2.0], [], [-0.25]], pa.list_(pa.float32())),
            "finish_reason": ["stop", "length", "stop", "stop"],
            "reward": pa.nulls(4, pa.float32()),
            "status": pa.nulls(4, pa.string()),
            "grade_detail": pa.nulls(4, pa.string()),
            "grade_s": pa.nulls(4, pa.float32()),
        }
    )
    actor: Any = ray.remote(GraderActor).options(num_cpus=0.25).remote("grader-0", GradersSection(deadline_s=2.0))
    graded, learned, summary = actor.grade.options(num_returns=3).remote(batch, ["prompt_id", "token_ids"])
    assert ray.get(summary).to_pydict() == {
        "prompt_id": ["p"] * 4, "sample_index": [0, 1, 2, 3], "reward": [1.0, 0.0, 0.0, 1.0],
        "status": ["correct", "timed_out", "wrong", "correct"], "num_tokens": [1, 2, 0, 1],
        "finish_reason": ["stop", "length", "stop", "stop"], "mean_logprob": [-1.0, -1.5, 0.0, -0.25],
    }  # fmt: skip
    assert ray.get(graded).schema == ray.get(learned).schema == batch.schema
    assert ray.get(learned)["token_ids"] == batch["token_ids"]
    assert ray.get(learned)["text"].null_count == ray.get(learned)["reward"].null_count == 4
    assert len(workers() - before) == 1
    ray.get(actor.close.remote())
    assert workers() == before
    ray.kill(actor)
