"""Samplers: each turns prompts into complete rollouts in its own way, and the loop knows only their interface.

A sampler does not wait: it sends calls to its actors and returns the references, one per shard, which whoever
called it then owns.
"""

import time
from collections.abc import Sequence
from dataclasses import dataclass, replace
from itertools import pairwise
from typing import Protocol, TypedDict

import pyarrow as pa
import ray

from actors.behaviours import Behaviour, StudentAlone, TrustRegion
from actors.blending import BlendingService
from actors.config import BlenderSection, ModelPoolSection, PoolSection
from actors.engines.build import EngineSpec
from actors.experience import Prompt, requests_to_arrow
from actors.one_engine import OneEngineActor
from actors.pools import Pool
from actors.student import StudentActor
from actors.teacher import TeacherActor
from actors.teacher_signal import STUDENTS_SUPPORT, SignalSpec
from actors.weights import PolicyWeights

RolloutRef = ray.ObjectRef[pa.RecordBatch]


@dataclass(frozen=True, slots=True, kw_only=True)
class SampleJob:
    """What to sample, and from which weights."""

    prompts: Sequence[Prompt]
    group_size: int
    weights: PolicyWeights
    behaviour: Behaviour
    max_new_tokens: int
    least_shards: int = 1
    """How many parts whoever works on the rollouts afterwards would like."""

    def split(self, count: int) -> list["SampleJob"]:
        """Return at most `count` jobs of neighbouring prompts, as even as can be; groups stay whole."""
        bounds = [len(self.prompts) * i // count for i in range(count + 1)]
        return [replace(self, prompts=self.prompts[a:b]) for a, b in pairwise(bounds) if b > a]

    def shards(self, count: int) -> list[pa.RecordBatch]:
        """The requests of each part of `split`."""
        return [requests_to_arrow(job.prompts, job.group_size) for job in self.split(count)]


class Sampler(Protocol):
    """Prompts in, references to complete ungraded rollouts out."""

    changeover_s: float | None
    """Seconds that the change from blended to plain rollouts took, once it has happened."""

    def start(self) -> None:
        """Start the actors and wait until they are ready."""

    def sample(self, job: SampleJob) -> list[RolloutRef]:
        """Send the job out; one reference to a rollout record batch for each part of `job.split`."""

    def sample_student(self, job: SampleJob) -> list[RolloutRef]:
        """Likewise from the student alone, whatever the job's behaviour: for evaluation."""

    def overlap(self, job: SampleJob) -> float | None:
        """Return the mean share of the student's likeliest K tokens after each prompt that are the teacher's, too.

        None where the sampler cannot tell.
        """

    def close(self) -> None:
        """End the actors."""


class PlainSampler:
    """The student samples alone; the teacher, if there is one, scores the finished completions."""

    changeover_s: float | None = None

    def __init__(
        self,
        students: ModelPoolSection,
        student: EngineSpec,
        teachers: ModelPoolSection | None = None,
        teacher: EngineSpec | None = None,
        signal: SignalSpec = STUDENTS_SUPPORT,
    ) -> None:
        """Nothing is started yet.

        Args:
            students: the pool of students.
            student: their engine.
            teachers: the pool of teachers, if any.
            teacher: their engine.
            signal: what the learner is told of the teacher by `sample`; rollouts of `sample_student` are for the eye.
        """
        self._sections, self._specs, self._signal = (students, teachers), (student, teacher), signal
        self.students: Pool | None = None
        self.teachers: Pool | None = None

    def start(self) -> None:
        """Start students, and teachers if there are any, side by side."""
        if self.students is not None:
            return
        (students, teachers), (student, teacher) = self._sections, self._specs
        self.students = Pool(
            "student",
            lambda name: (StudentActor, (name, student), {}),
            environment=student.environment,
            **_resources(students),
        )
        if teachers is not None and teacher is not None:
            self.teachers = Pool(
                "teacher",
                lambda name: (TeacherActor, (name, teacher), {}),
                environment=teacher.environment,
                **_resources(teachers),
            )
            self.teachers.wait()
        self.students.wait()

    def sample(self, job: SampleJob) -> list[RolloutRef]:
        """Each student samples a shard, a teacher scores it when it is done."""
        return self._sample(job, self._signal)

    def sample_student(self, job: SampleJob) -> list[RolloutRef]:
        """The same from the student's own law, with both laws on the student's support."""
        return self._sample(replace(job, behaviour=StudentAlone()), STUDENTS_SUPPORT)

    def _sample(self, job: SampleJob, signal: SignalSpec) -> list[RolloutRef]:
        assert self.students is not None
        assert isinstance(job.behaviour, StudentAlone)
        refs = []
        count = max(len(self.students), len(self.teachers or ()), job.least_shards)
        for i, shard in enumerate(job.shards(count)):
            rollouts = self.students[i].sample.remote(
                shard, job.weights, job.max_new_tokens, job.behaviour.decoding, signal.needs_student_support
            )
            refs.append(
                rollouts
                if self.teachers is None
                else self.teachers[i].score_rollouts.remote(rollouts, job.behaviour.decoding, signal)
            )
        return refs

    def overlap(self, job: SampleJob) -> float | None:
        """Ask one student and one teacher."""
        if self.students is None or self.teachers is None:
            return None
        (shard,) = job.shards(1)
        refs = [self.students[0].likeliest.remote(shard, job.weights), self.teachers[0].likeliest.remote(shard)]
        ours, theirs = ray.get(refs)
        return share_in_common(ours, theirs)

    def close(self) -> None:
        """End both pools."""
        for pool in (self.students, self.teachers):
            if pool is not None:
                pool.close()
        self.students = self.teachers = None


class BlendedSampler:
    """Students and teachers in their own actors, and the blending service between them."""

    def __init__(
        self,
        plain: PlainSampler,
        section: BlenderSection,
        student: EngineSpec,
        signal: SignalSpec = STUDENTS_SUPPORT,
    ) -> None:
        self._plain, self._section, self._student, self._signal = plain, section, student, signal
        self.blenders: Pool | None = None

    def start(self) -> None:
        """Start the blenders beside the plain sampler's actors."""
        self._plain.start()
        assert self._plain.students is not None
        spec = self._student
        arguments = {"model": spec.model, "seed": spec.seed, "stop_token_id": spec.head.stop_token_id,
                     "threads": spec.section.threads, "section": self._section}  # fmt: skip
        self.blenders = Pool(
            "blending",
            lambda name: (BlendingService, (name,), arguments),
            environment={"OMP_NUM_THREADS": str(spec.section.threads)},
            # A service drives as many students at once as fall to it.
            max_concurrency=-(-len(self._plain.students) // self._section.num_actors),
            **_resources(self._section),
        )
        self.blenders.wait()

    def sample(self, job: SampleJob) -> list[RolloutRef]:
        """A blender drives each shard through one student and one teacher, which adds what the learner is told."""
        students, teachers = self._plain.students, self._plain.teachers
        assert self.blenders is not None
        assert students is not None
        assert teachers is not None
        refs = []
        # One shard for each student: a second one would wait for its turn, and both would be small.
        for i, shard in enumerate(job.shards(len(students))):
            number = i % len(students)
            # A student keeps its blender, where its rollouts take turns.
            rollouts = self.blenders[number].rollout.remote(
                shard, students[i], teachers[i], job.weights, job.behaviour, job.max_new_tokens,
                student_number=number, max_num_sequences=self._student.section.max_num_sequences,
            )  # fmt: skip
            refs.append(
                rollouts if self._signal.is_in_every_rollout else teachers[i].add_signal.remote(rollouts, self._signal)
            )
        return refs

    def sample_student(self, job: SampleJob) -> list[RolloutRef]:
        """The plain sampler, over the same actors."""
        return self._plain.sample_student(job)

    def overlap(self, job: SampleJob) -> float | None:
        """Likewise."""
        return self._plain.overlap(job)

    def close(self) -> None:
        """End the blenders; the plain sampler's actors stay."""
        if self.blenders is not None:
            self.blenders.close()
        self.blenders = None


class OneEngineSampler:
    """Student and teacher together in each actor, as many actors as there are to be students."""

    def __init__(
        self,
        students: ModelPoolSection,
        student: EngineSpec,
        teacher_model: str,
        section: BlenderSection,
        signal: SignalSpec = STUDENTS_SUPPORT,
    ) -> None:
        self._students, self._spec, self._teacher_model, self._section = students, student, teacher_model, section
        self._signal = signal
        self._engines: Pool | None = None

    def start(self) -> None:
        """Start the actors."""
        self._engines = Pool(
            "student-teacher",
            lambda name: (OneEngineActor, (name, self._spec, self._teacher_model, self._section), {}),
            environment=self._spec.environment,
            **_resources(self._students),
        )
        self._engines.wait()

    def sample(self, job: SampleJob) -> list[RolloutRef]:
        """Each actor samples a shard."""
        return self._sample(job, self._signal)

    def sample_student(self, job: SampleJob) -> list[RolloutRef]:
        """With no budget mu is the student, and every draft is kept."""
        return self._sample(replace(job, behaviour=TrustRegion(epsilon=0.0)), STUDENTS_SUPPORT)

    def _sample(self, job: SampleJob, signal: SignalSpec) -> list[RolloutRef]:
        assert self._engines is not None
        return [
            self._engines[i].sample.remote(shard, job.weights, job.behaviour, job.max_new_tokens, signal)
            for i, shard in enumerate(job.shards(len(self._engines)))
        ]

    def overlap(self, job: SampleJob) -> float | None:
        """Ask one actor for both."""
        assert self._engines is not None
        (shard,) = job.shards(1)
        both = ray.get(self._engines[0].likeliest.remote(shard, job.weights))
        return None if both is None else share_in_common(*both)

    def close(self) -> None:
        """End the actors."""
        if self._engines is not None:
            self._engines.close()
        self._engines = None


class AnnealedSampler:
    """Blends until the first training job of the student alone; then steps aside for the plain sampler."""

    def __init__(self, blended: BlendedSampler | OneEngineSampler, plain: PlainSampler) -> None:
        self._blended: BlendedSampler | OneEngineSampler | None = blended
        self._plain = plain
        self._in_flight: list[RolloutRef] = []
        self.changeover_s: float | None = None
        """Seconds that stepping aside took, once it has happened."""

    def start(self) -> None:
        """Start what blends; plain actors of their own follow when they are first needed."""
        assert self._blended is not None
        self._blended.start()

    def sample(self, job: SampleJob) -> list[RolloutRef]:
        """Send the job to whichever sampler its behaviour asks for."""
        if isinstance(job.behaviour, StudentAlone):
            self._step_aside()
            return self._plain.sample(job)
        if self._blended is None:
            # An earlier batch, part of which is sampled again: the student alone can still do it, and records say so.
            return self._plain.sample(replace(job, behaviour=StudentAlone()))
        refs = self._blended.sample(job)
        self._in_flight = [*self._unfinished(), *refs]
        return refs

    def sample_student(self, job: SampleJob) -> list[RolloutRef]:
        """Ask whichever sampler is in charge, when it has nothing else to do: the weights may be other ones."""
        if self._in_flight:
            ray.wait(self._in_flight, num_returns=len(self._in_flight))
        return (self._blended or self._plain).sample_student(job)

    def overlap(self, job: SampleJob) -> float | None:
        """Ask whichever sampler is in charge."""
        return (self._blended or self._plain).overlap(job)

    def close(self) -> None:
        """End everything."""
        if self._blended is not None:
            self._blended.close()
        self._plain.close()

    def _unfinished(self) -> list[RolloutRef]:
        if not self._in_flight:
            return []
        return list(ray.wait(self._in_flight, num_returns=len(self._in_flight), timeout=0)[1])

    def _step_aside(self) -> None:
        if self._blended is None:
            return
        if self._in_flight:
            ray.wait(self._in_flight, num_returns=len(self._in_flight))
        began = time.monotonic()
        self._blended.close()
        self._blended, self._in_flight = None, []
        self._plain.start()
        self.changeover_s = time.monotonic() - began


def share_in_common(ours: Sequence[Sequence[int]], theirs: Sequence[Sequence[int]]) -> float:
    """Return the mean share of each of our sets that is in theirs."""
    return sum(len(set(a) & set(b)) / len(a) for a, b in zip(ours, theirs, strict=True)) / len(ours)


class _Resources(TypedDict):
    num_actors: int
    num_cpus: float
    num_gpus: float


def _resources(section: PoolSection) -> _Resources:
    return {"num_actors": section.num_actors, "num_cpus": section.num_cpus, "num_gpus": section.num_gpus}
