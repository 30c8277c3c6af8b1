"""The grader as an actor: Arrow rollouts in, the same rollouts with their grades out."""

from collections.abc import Collection, Sequence

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.compute as pc

from rewards.config import GradersSection
from rewards.grade import Grade
from rewards.graders import Graders


def with_grades(batch: pa.RecordBatch, grades: Sequence[Grade]) -> pa.RecordBatch:
    """Return the batch with its columns reward, status, grade_detail and grade_s filled; the others are shared."""
    assert batch.num_rows == len(grades), f"{batch.num_rows} rollouts, {len(grades)} grades"
    filled = {
        "reward": pa.array([grade.reward for grade in grades], pa.float32()),
        "status": pa.array([grade.status.value for grade in grades], pa.string()),
        "grade_detail": pa.array([grade.detail for grade in grades], pa.string()),
        "grade_s": pa.array([grade.seconds for grade in grades], pa.float32()),
    }
    columns = [filled.get(name, batch.column(name)) for name in batch.schema.names]
    return pa.RecordBatch.from_arrays(columns, schema=batch.schema)


def summary(batch: pa.RecordBatch) -> pa.RecordBatch:
    """Return what a scheduler needs of graded rollouts.

    The columns prompt_id, sample_index, reward, status and finish_reason as they are; num_tokens (T); mean_logprob
    (float32, nats per token): the mean over the completion of student_logprobs, 0 for an empty one.
    """
    columns = {name: batch.column(name) for name in ("prompt_id", "sample_index", "reward", "status", "finish_reason")}
    columns["num_tokens"] = pc.list_value_length(batch.column("token_ids"))
    columns["mean_logprob"] = pa.array(_means(batch.column("student_logprobs")), pa.float32())
    return pa.RecordBatch.from_pydict(columns)


def _means(lists: pa.ListArray) -> npt.NDArray[np.float64]:
    """Return the mean of each list; 0 of an empty one and of none."""
    num_values = pc.fill_null(pc.list_value_length(lists), 0).to_numpy()
    rows = np.repeat(np.arange(len(lists)), num_values)
    sums = np.bincount(rows, weights=lists.flatten().to_numpy(), minlength=len(lists))
    means: npt.NDArray[np.float64] = sums / num_values.clip(min=1)
    return means


def with_only(batch: pa.RecordBatch, columns: Collection[str]) -> pa.RecordBatch:
    """Return the batch with nulls in all other columns, so that only these are sent to whoever reads it."""
    kept = [
        batch.column(name) if name in columns else pa.nulls(batch.num_rows, batch.schema.field(name).type)
        for name in batch.schema.names
    ]
    return pa.RecordBatch.from_arrays(kept, schema=batch.schema)


class GraderActor:
    """Grades batches of rollouts; `ray.remote` is applied where the actors are placed."""

    def __init__(self, name: str, section: GradersSection) -> None:
        self._name = name
        self._graders = Graders(section)

    def __repr__(self) -> str:
        return self._name

    def ready(self) -> str:
        """Return the actor's name."""
        return self._name

    def grade(
        self, batch: pa.RecordBatch, learned: Collection[str] = (), learner_only: Collection[str] = ()
    ) -> tuple[pa.RecordBatch, pa.RecordBatch, pa.RecordBatch]:
        """Return the batch with its grades, the part of it that is learned from, and its `summary`.

        They are apart so that each is sent only to whoever needs it.

        Args:
            batch: has the columns text, task and reference to read, the four of `with_grades` to fill, and those of
                `summary`.
            learned: the columns of the learned part.
            learner_only: columns that the first of the three is returned without.

        Raises:
            ValueError: if no grader judges a rollout's task.
        """
        columns = (batch.column(name).to_pylist() for name in ("text", "task", "reference"))
        graded = with_grades(batch, self._graders.grade(list(zip(*columns, strict=True))))
        kept = graded.select([name for name in graded.schema.names if name not in learner_only])
        return kept, with_only(graded, learned), summary(graded)

    def close(self) -> None:
        """End the worker processes."""
        self._graders.close()
