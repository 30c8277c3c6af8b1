"""The records that flow from prompts to the learner, and their Arrow form.

Every record that crosses a process does so as an Arrow record batch, one row per rollout. The numpy arrays of a
record read from a batch are views of the batch's buffers, so nothing is copied on the way to the learner.
"""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa

from actors.engines.protocol import SequenceRequest, Support
from rewards.grade import Grade, Status

SCHEMA_VERSION = "3"

LEARNED_COLUMNS = frozenset(
    {
        "prompt_id", "sample_index", "prompt_token_ids", "token_ids", "policy_versions", "behaviour_logprobs",
        "student_logprobs", "support_ids", "support_teacher_logprobs", "teacher_tail_logprobs",
    }
)  # fmt: skip
"""What a learner needs of a rollout: of a teacher's scores, the ids and the teacher's side. Where it is told something
else of the teacher, `SignalSpec.learned_columns` (actors/teacher_signal.py) has the columns."""

LEARNER_ONLY_COLUMNS = frozenset({"learned_ids", "learned_logprobs", "learned_tail_logprobs", "teacher_hidden"})
"""What only a learner reads, which is most of a batch where it is there; a batch may lack these columns."""

Ints = npt.NDArray[np.int32]
Floats = npt.NDArray[np.float32]
Bools = npt.NDArray[np.bool_]
Hidden = npt.NDArray[np.float32] | npt.NDArray[np.uint16]


@dataclass(frozen=True, slots=True, kw_only=True)
class Prompt:
    """One prompt of a run.

    Example:
        >>> Prompt(prompt_id="addition-0-17", text="7+5:", token_ids=(1, 10, 13, 8, 20), task="addition",
        ...        reference="12").task
        'addition'
    """

    prompt_id: str
    """Unique within a run: a prompt met again in a later epoch has another id, and so other random numbers."""
    text: str
    token_ids: tuple[int, ...]
    task: str
    """Which grader judges the completions."""
    reference: str
    """What the grader compares with; its form is the grader's."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Completion:
    """Tokens sampled after a prompt; T of them."""

    token_ids: Ints
    """[T]; the stop token is included where one was drawn."""
    behaviour_logprobs: Floats
    """[T] nats, of the law that really drew each token."""
    student_logprobs: Floats
    """[T] nats, of the same tokens under the student that drafted them."""
    finish_reason: str
    """'stop' or 'length'."""
    policy_versions: Ints
    """[T] optimizer steps applied to the student that drew each token."""

    def __post_init__(self) -> None:
        lengths = {
            len(self.token_ids),
            len(self.behaviour_logprobs),
            len(self.student_logprobs),
            len(self.policy_versions),
        }
        assert len(lengths) == 1, f"arrays of one completion have one length, got {sorted(lengths)}"

    @property
    def num_tokens(self) -> int:
        """T."""
        return len(self.token_ids)


@dataclass(frozen=True, slots=True, kw_only=True)
class BlendTrace:
    """How the behaviour policy was made at each of the T positions."""

    epsilon: Floats
    """[T] budget, nats; NaN where the behaviour policy keeps none."""
    beta: Floats
    """[T] blend weight in [0, 1]; 0 is the student, 1 the teacher; NaN where mu is not on the path between them."""
    divergence: Floats
    """[T] KL(mu || student), nats; NaN where mu is made of the student alone and is not its own law."""
    teacher_divergence: Floats
    """[T] KL(mu || teacher), nats; infinite where mu has mass that the teacher lacks."""
    teacher_logprobs: Floats
    """[T] of the emitted tokens under the teacher alone, nats."""
    accepted: Bools
    """[T] True where the student's draft was kept, False where the token was redrawn."""


@dataclass(frozen=True, slots=True, kw_only=True)
class TeacherScores:
    """Both laws on the student's K likeliest ids at each of the T positions, and what lies outside them."""

    support_ids: Ints
    """[T, K], sorted by falling student log-prob, so that a shorter support is a prefix."""
    student_logprobs: Floats
    """[T, K] nats."""
    student_tail_logprobs: Floats
    """[T] log mass outside the support, by logsumexp over the complement; -inf where nothing is outside."""
    teacher_logprobs: Floats | None = None
    """[T, K] nats; none until the teacher has been asked."""
    teacher_tail_logprobs: Floats | None = None
    """[T] as the student's, of the teacher."""

    def kl_to_teacher(self) -> Floats:
        """Return KL(student || teacher) at each position, [T] nats.

        On a support smaller than the vocabulary all that lies outside counts as one outcome, which can only lower the
        divergence; on the full support it is exact.
        """
        assert self.teacher_logprobs is not None
        assert self.teacher_tail_logprobs is not None
        ours = np.concatenate([self.student_logprobs, self.student_tail_logprobs[:, None]], 1).astype(np.float64)
        theirs = np.concatenate([self.teacher_logprobs, self.teacher_tail_logprobs[:, None]], 1).astype(np.float64)
        present = np.isfinite(ours)
        gap = np.where(present, ours - np.where(present, theirs, 0.0), 0.0)
        return np.asarray((np.exp(ours) * gap).sum(1), np.float32)


@dataclass(frozen=True, slots=True, kw_only=True)
class Rollout:
    """A prompt, one completion of it, what the teacher said of it and how it was graded."""

    prompt: Prompt
    sample_index: int
    """Which of the group's G samples this is, from 0."""
    completion: Completion
    text: str = ""
    """The completion as text, without special tokens."""
    blend: BlendTrace | None = None
    teacher: TeacherScores | None = None
    grade: Grade | None = None
    learned: Support | None = None
    """The teacher's log-probs that the learner is told, where they are not those of `teacher`."""
    teacher_hidden: Hidden | None = None
    """[T, H] the teacher's last hidden state at the position that predicts each token: float32, or the bits of
    bfloat16 as uint16."""

    def learner_scores(self) -> tuple[Ints | None, Floats, Floats]:
        """Return what the learner is told of the teacher's law at each position.

        Returns:
            ids: [T, K], all different at each position; None: the whole vocabulary in its order, K = V.
            logprobs: [T, K] nats, the teacher's.
            tail_logprobs: [T] nats, the teacher's mass outside; -inf where nothing is outside.

        Raises:
            ValueError: if the rollout has no scores of a teacher.
        """
        told, scores = self.learned, self.teacher
        if told is None:
            if scores is None or scores.teacher_logprobs is None or scores.teacher_tail_logprobs is None:
                raise ValueError(
                    f"a rollout to distil from must carry a teacher's log-probs, got none for {self.prompt.prompt_id!r}"
                )
            return scores.support_ids, scores.teacher_logprobs, scores.teacher_tail_logprobs
        tails = told.tail_logprobs
        if tails is None:
            tails = np.full(len(told.logprobs), -np.inf, np.float32)
        return told.ids, told.logprobs, tails


_PER_TOKEN: Mapping[str, pa.DataType] = {
    "token_ids": pa.int32(), "policy_versions": pa.int32(), "behaviour_logprobs": pa.float32(),
    "student_logprobs": pa.float32(), "epsilon": pa.float32(), "beta": pa.float32(), "divergence": pa.float32(),
    "teacher_divergence": pa.float32(), "teacher_logprobs": pa.float32(), "accepted": pa.bool_(),
    "student_tail_logprobs": pa.float32(), "teacher_tail_logprobs": pa.float32(),
    "learned_tail_logprobs": pa.float32(),
}  # fmt: skip
_PER_SUPPORT: Mapping[str, pa.DataType] = {
    "support_ids": pa.int32(), "support_student_logprobs": pa.float32(), "support_teacher_logprobs": pa.float32(),
    "learned_ids": pa.int32(),
}  # fmt: skip
_WIDE = ("learned_logprobs", "teacher_hidden")
"""[T, K] as well, with so many values to a token that 32 bits may not count those of a batch."""
_SCALARS: Mapping[str, pa.DataType] = {
    "prompt_id": pa.string(), "sample_index": pa.int32(), "task": pa.string(), "prompt": pa.string(),
    "reference": pa.string(), "text": pa.string(), "finish_reason": pa.string(), "reward": pa.float32(),
    "status": pa.string(), "grade_detail": pa.string(), "grade_s": pa.float32(),
}  # fmt: skip


def requests_to_arrow(prompts: Sequence[Prompt], group_size: int) -> pa.RecordBatch:
    """Return one row per completion to sample: each prompt `group_size` times, its samples side by side."""
    rows = [(prompt, index) for prompt in prompts for index in range(group_size)]
    return pa.RecordBatch.from_pydict(
        {
            "prompt_id": pa.array([p.prompt_id for p, _ in rows], pa.string()),
            "sample_index": pa.array([index for _, index in rows], pa.int32()),
            "prompt": pa.array([p.text for p, _ in rows], pa.string()),
            "prompt_token_ids": _ragged([np.asarray(p.token_ids, np.int32) for p, _ in rows], pa.int32()),
            "task": pa.array([p.task for p, _ in rows], pa.string()),
            "reference": pa.array([p.reference for p, _ in rows], pa.string()),
        }
    )


def requests_from_arrow(batch: pa.RecordBatch) -> list[tuple[Prompt, int]]:
    """Return (prompt, sample index) of each row of a batch made by `requests_to_arrow`."""
    scalars = {name: batch.column(name).to_pylist() for name in ("prompt_id", "prompt", "task", "reference")}
    token_ids = _views(batch.column("prompt_token_ids"))
    return [
        (
            Prompt(
                prompt_id=scalars["prompt_id"][i],
                text=scalars["prompt"][i],
                token_ids=tuple(token_ids[i].tolist()),
                task=scalars["task"][i],
                reference=scalars["reference"][i],
            ),
            index,
        )
        for i, index in enumerate(batch.column("sample_index").to_pylist())
    ]


def sequence_requests_to_arrow(requests: Sequence[SequenceRequest]) -> pa.RecordBatch:
    """Return one row per sequence that an engine is to open."""
    return pa.RecordBatch.from_pydict(
        {
            "prompt_id": pa.array([r.prompt_id for r in requests], pa.string()),
            "sample_index": pa.array([r.sample_index for r in requests], pa.int32()),
            "prompt_token_ids": _ragged([np.asarray(r.prompt_ids, np.int32) for r in requests], pa.int32()),
            "completion_token_ids": _ragged([np.asarray(r.completion_ids, np.int32) for r in requests], pa.int32()),
            "max_new_tokens": pa.array([r.max_new_tokens for r in requests], pa.int32()),
        }
    )


def sequence_requests_from_arrow(batch: pa.RecordBatch) -> list[SequenceRequest]:
    """Return the rows of a batch made by `sequence_requests_to_arrow`."""
    prompts, completions = (_views(batch.column(name)) for name in ("prompt_token_ids", "completion_token_ids"))
    scalars = (batch.column(name).to_pylist() for name in ("prompt_id", "sample_index", "max_new_tokens"))
    return [
        SequenceRequest(
            prompt_id=prompt_id, sample_index=index, prompt_ids=tuple(prompt.tolist()), max_new_tokens=most,
            completion_ids=tuple(completion.tolist()),
        )
        for prompt, completion, prompt_id, index, most in zip(prompts, completions, *scalars, strict=True)
    ]  # fmt: skip


def rollouts_to_arrow(rollouts: Sequence[Rollout]) -> pa.RecordBatch:
    """Return one row per rollout; absent parts (no teacher, not graded yet) are nulls.

    Columns: every scalar and array of the records above under its own name, `support_…` for the [T, K] arrays (nested
    lists), `learned_…` for what the learner alone is told, and `prompt_token_ids`. `teacher_hidden` holds float32, or
    uint16 where a rollout has that.
    """
    columns: dict[str, list[Any]] = {name: [] for name in (*_SCALARS, *_PER_TOKEN, *_PER_SUPPORT, *_WIDE)}
    prompt_ids = [np.asarray(r.prompt.token_ids, dtype=np.int32) for r in rollouts]
    for r in rollouts:
        completion, blend, teacher, grade = r.completion, r.blend, r.teacher, r.grade
        row: dict[str, Any] = {
            "prompt_id": r.prompt.prompt_id,
            "sample_index": r.sample_index,
            "task": r.prompt.task,
            "prompt": r.prompt.text,
            "reference": r.prompt.reference,
            "text": r.text,
            "finish_reason": completion.finish_reason,
            "token_ids": completion.token_ids,
            "policy_versions": completion.policy_versions,
            "behaviour_logprobs": completion.behaviour_logprobs,
            "student_logprobs": completion.student_logprobs,
        }
        if blend is not None:
            row |= {name: getattr(blend, name) for name in BlendTrace.__dataclass_fields__}
        if teacher is not None:
            row |= {
                "support_ids": teacher.support_ids,
                "support_student_logprobs": teacher.student_logprobs,
                "support_teacher_logprobs": teacher.teacher_logprobs,
                "student_tail_logprobs": teacher.student_tail_logprobs,
                "teacher_tail_logprobs": teacher.teacher_tail_logprobs,
            }
        if r.learned is not None:
            row |= {
                "learned_ids": r.learned.ids,
                "learned_logprobs": r.learned.logprobs,
                "learned_tail_logprobs": r.learned.tail_logprobs,
            }
        if r.teacher_hidden is not None:
            row["teacher_hidden"] = r.teacher_hidden
        if grade is not None:
            row |= {"reward": grade.reward, "status": grade.status.value, "grade_detail": grade.detail,
                    "grade_s": grade.seconds}  # fmt: skip
        for name, values in columns.items():
            values.append(row.get(name))
    arrays: dict[str, pa.Array] = {name: pa.array(columns[name], kind) for name, kind in _SCALARS.items()}
    arrays["prompt_token_ids"] = _ragged(prompt_ids, pa.int32())
    arrays |= {name: _ragged(columns[name], kind) for name, kind in _PER_TOKEN.items()}
    arrays |= {name: _ragged_support(columns[name], kind) for name, kind in _PER_SUPPORT.items()}
    arrays |= {name: _ragged_support(columns[name], _wide_kind(columns[name]), wide=True) for name in _WIDE}
    batch = pa.RecordBatch.from_pydict(arrays)
    return batch.replace_schema_metadata({"tutelage_rollouts": SCHEMA_VERSION})


def rollouts_from_arrow(batch: pa.RecordBatch) -> list[Rollout]:
    """Return the rollouts of a batch made by `rollouts_to_arrow`; their arrays are read-only views of it.

    Where of a blend nothing but the teacher's log-probs is left, they are what the learner is told.
    """
    scalars = {name: batch.column(name).to_pylist() for name in _SCALARS}
    arrays: dict[str, list[Any]] = {name: [None] * batch.num_rows for name in LEARNER_ONLY_COLUMNS}
    for name in {"prompt_token_ids", *_PER_TOKEN, *_PER_SUPPORT, *_WIDE} & set(batch.schema.names):
        nested = pa.types.is_nested(batch.schema.field(name).type.value_type)
        arrays[name] = (_support_views if nested else _views)(batch.column(name))
    rollouts = []
    for i in range(batch.num_rows):
        prompt = Prompt(
            prompt_id=scalars["prompt_id"][i],
            text=scalars["prompt"][i],
            token_ids=tuple(arrays["prompt_token_ids"][i].tolist()),
            task=scalars["task"][i],
            reference=scalars["reference"][i],
        )
        completion = Completion(
            token_ids=arrays["token_ids"][i],
            behaviour_logprobs=arrays["behaviour_logprobs"][i],
            student_logprobs=arrays["student_logprobs"][i],
            finish_reason=scalars["finish_reason"][i],
            policy_versions=arrays["policy_versions"][i],
        )
        blend = teacher = grade = learned = None
        if arrays["beta"][i] is not None:
            blend = BlendTrace(**{name: arrays[name][i] for name in BlendTrace.__dataclass_fields__})
        if arrays["support_ids"][i] is not None:
            teacher = TeacherScores(
                support_ids=arrays["support_ids"][i],
                student_logprobs=arrays["support_student_logprobs"][i],
                teacher_logprobs=arrays["support_teacher_logprobs"][i],
                student_tail_logprobs=arrays["student_tail_logprobs"][i],
                teacher_tail_logprobs=arrays["teacher_tail_logprobs"][i],
            )
        if arrays["learned_logprobs"][i] is not None:
            learned = Support(
                ids=arrays["learned_ids"][i],
                logprobs=arrays["learned_logprobs"][i],
                tail_logprobs=arrays["learned_tail_logprobs"][i],
            )
        elif arrays["teacher_logprobs"][i] is not None and blend is None:
            learned = _drawn_alone(completion, arrays["teacher_logprobs"][i])
        if scalars["status"][i] is not None:
            grade = Grade(
                reward=scalars["reward"][i],
                status=Status(scalars["status"][i]),
                detail=scalars["grade_detail"][i],
                seconds=scalars["grade_s"][i],
            )
        rollouts.append(
            Rollout(prompt=prompt, sample_index=scalars["sample_index"][i], completion=completion,
                    text=scalars["text"][i], blend=blend, teacher=teacher, grade=grade, learned=learned,
                    teacher_hidden=arrays["teacher_hidden"][i])
        )  # fmt: skip
    return rollouts


def _drawn_alone(completion: Completion, logprobs: Floats) -> Support:
    """The drawn token as a support of one."""
    with np.errstate(divide="ignore"):
        tails = np.log(-np.expm1(np.minimum(logprobs, 0)))
    return Support(ids=completion.token_ids[:, None], logprobs=logprobs[:, None], tail_logprobs=tails)


def _wide_kind(rows: Iterable[npt.NDArray[Any] | None]) -> pa.DataType:
    return pa.uint16() if any(row is not None and row.dtype == np.uint16 for row in rows) else pa.float32()


def _ragged(rows: Iterable[npt.NDArray[Any] | None], kind: pa.DataType) -> pa.Array:
    """[rows] of 1-D arrays (or None) -> list<kind>."""
    rows = list(rows)
    lengths = np.array([0 if row is None else len(row) for row in rows], dtype=np.int64)
    offsets = np.concatenate([[0], np.cumsum(lengths)]).astype(np.int32)
    present = [row for row in rows if row is not None]
    flat = np.concatenate(present) if present else np.zeros(0)
    values = pa.array(flat.astype(kind.to_pandas_dtype(), copy=False), kind)
    missing = np.array([row is None for row in rows], dtype=bool)
    return pa.ListArray.from_arrays(pa.array(offsets), values, mask=pa.array(missing) if missing.any() else None)


def _ragged_support(rows: Iterable[npt.NDArray[Any] | None], kind: pa.DataType, *, wide: bool = False) -> pa.ListArray:
    """[rows] of [T, K] arrays (or None) -> list<list<kind>>, or list<large_list<kind>>."""
    rows = list(rows)
    inner_lengths = np.concatenate(
        [np.full(row.shape[0], row.shape[1], dtype=np.int64) for row in rows if row is not None]
        or [np.zeros(0, dtype=np.int64)]
    )
    inner_offsets = np.concatenate([[0], np.cumsum(inner_lengths)]).astype(np.int64 if wide else np.int32)
    present = [row.reshape(-1) for row in rows if row is not None]
    flat = np.concatenate(present) if present else np.zeros(0)
    inner = (pa.LargeListArray if wide else pa.ListArray).from_arrays(
        pa.array(inner_offsets), pa.array(flat.astype(kind.to_pandas_dtype(), copy=False), kind)
    )
    lengths = np.array([0 if row is None else row.shape[0] for row in rows], dtype=np.int64)
    offsets = np.concatenate([[0], np.cumsum(lengths)]).astype(np.int32)
    missing = np.array([row is None for row in rows], dtype=bool)
    return pa.ListArray.from_arrays(pa.array(offsets), inner, mask=pa.array(missing) if missing.any() else None)


def _values(array: pa.Array) -> npt.NDArray[Any]:
    """The flat values of a primitive Arrow array; booleans are bit-packed in Arrow and so are copied."""
    return np.asarray(array.to_numpy(zero_copy_only=not pa.types.is_boolean(array.type)))


def _views(column: pa.ListArray) -> list[Any]:
    """list<kind> -> per row a 1-D view, or None where the row is null."""
    flat, offsets = _values(column.values), column.offsets.to_numpy()
    valid = column.is_valid().to_numpy(zero_copy_only=False)
    return [flat[offsets[i] : offsets[i + 1]] if valid[i] else None for i in range(len(column))]


def _support_views(column: pa.ListArray) -> list[Any]:
    """list<list<kind>>, or list<large_list<kind>> -> per row a [T, K] view, or None where the row is null."""
    flat, inner, offsets = _values(column.values.values), column.values.offsets.to_numpy(), column.offsets.to_numpy()
    valid = column.is_valid().to_numpy(zero_copy_only=False)
    rows: list[Any] = []
    for i in range(len(column)):
        if not valid[i]:
            rows.append(None)
            continue
        first, last = offsets[i], offsets[i + 1]
        width = int(inner[first + 1] - inner[first]) if last > first else 0
        rows.append(flat[inner[first] : inner[last]].reshape(last - first, width))
    return rows
