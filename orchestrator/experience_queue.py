"""The bounded queue between rollouts and learner. It owns the experience: its calls make it, so it outlives samplers.

A batch is requested with the weights and the behaviour policy it is to be sampled with, and taken when the learner
needs it:

    request(i)  ->  sampler (students, blenders, teachers)  ->  graders  ->  take(i)

Nothing waits in `request`; `take` waits for batch i. The caller requests batch i only when the policy is at most
`max_staleness` versions behind i, so the queue holds at most `max_staleness + 1` batches and none is ever staler.
"""

import time
from collections.abc import Collection, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field, replace
from typing import Any

import pyarrow as pa
import pyarrow.compute as pc
import ray
from ray.exceptions import RayError

from actors.behaviours import Behaviour, StudentAlone
from actors.config import BlenderSection, ModelPoolSection
from actors.engines.build import EngineSpec
from actors.experience import LEARNER_ONLY_COLUMNS
from actors.failures import is_loss, root_cause
from actors.head import Head
from actors.pools import Pool
from actors.sampling import (
    AnnealedSampler,
    BlendedSampler,
    OneEngineSampler,
    PlainSampler,
    RolloutRef,
    SampleJob,
    Sampler,
)
from actors.speculation import SideLostError
from actors.weights import PolicyWeights
from learner.batcher import groups_that_teach, verdict_metrics
from orchestrator.cold_start import cold_start
from orchestrator.dynamic_sampling import refill_size, refill_start, select
from orchestrator.models import model_location
from orchestrator.prompts import build_source
from orchestrator.recipe import Recipe
from orchestrator.schedules import behaviour_plan
from orchestrator.teacher_signal import signal_spec
from orchestrator.tokenization import PromptEncoder, shared_head
from rewards.grader_actor import GraderActor

COLD_START_PROMPTS = 8
_ATTEMPTS = 4
_RETRY_S = 1.0


@dataclass(frozen=True, slots=True, kw_only=True)
class Experience:
    """One batch of graded rollouts, in the order of its prompts."""

    shards: tuple[RolloutRef, ...]
    """Graded rollouts (actors/experience.py), owned by the queue."""
    learned: tuple[RolloutRef, ...]
    """What is learned from: the learner's columns of the groups that dynamic sampling keeps, of all without it."""
    summaries: tuple[pa.RecordBatch, ...]
    """`rewards.grader_actor.summary` of each row of `learned`."""
    padding: frozenset[str] = frozenset()
    """prompt_ids of groups among them that teach nothing and only fill the batch up."""
    sampling: Mapping[str, float] = field(default_factory=dict)
    """Metrics of dynamic sampling, and those of the grades over all that was sampled; empty without it."""
    num_retries: int
    """How often a shard had to be sampled again because an actor died."""
    sampling_s: float
    """From the request until all shards were graded."""
    changeover_s: float | None
    """Seconds that the change from blended to plain rollouts took, once it has happened."""


@dataclass(slots=True, kw_only=True)
class _Shard:
    job: SampleJob
    graded: RolloutRef
    learned: RolloutRef
    summary: RolloutRef
    num_retries: int = 0


class ExperienceQueue:
    """Turns requests into graded rollouts; the body of the actor `experience-queue`."""

    def __init__(self, name: str, recipe: Recipe) -> None:
        self._name, self._recipe = name, recipe
        self._signal = signal_spec(recipe.distillation, recipe.rollouts.support_size)
        self._graders: Pool | None = None
        self._batches: dict[int, tuple[float, list[_Shard]]] = {}
        self._num_resent = 0

    def __repr__(self) -> str:
        return self._name

    def start(self) -> Head:
        """Check the prompts, start samplers and graders; return how logits are read when they are ready.

        Raises:
            UserError: for models or prompts that cannot be used.
        """
        recipe = self._recipe
        self._encoder = PromptEncoder(
            recipe.students.model,
            stop_token=recipe.rollouts.stop_token,
            max_prompt_tokens=recipe.rollouts.max_prompt_tokens,
        )
        head = shared_head(recipe, self._encoder)
        self._source = build_source(recipe.data, recipe.seed)
        self._encoder.encode(list(self._source.everything()))
        self._sampler = build_sampler(recipe, head)
        section = self._recipe.graders
        self._graders = Pool(
            "grader",
            lambda name: (GraderActor, (name, section), {}),
            num_actors=section.num_actors,
            num_cpus=section.num_cpus,
            environment={"OMP_NUM_THREADS": "1"},
        )
        self._sampler.start()
        self._graders.wait()
        return head

    def compare_models(self, weights: PolicyWeights) -> str:
        """Sample a few prompts and say how near student and teacher are before the first step."""
        prompts = self._encoder.encode(self._source.training(0, COLD_START_PROMPTS))
        return cold_start(self._sampler, prompts, weights, self._recipe.rollouts.max_new_tokens)

    def request(self, index: int, weights: PolicyWeights, behaviour: Behaviour) -> None:
        """Send batch `index` to be sampled with these weights by this behaviour policy."""
        rollouts = self._recipe.rollouts
        prompts = self._source.training(index * rollouts.prompts_per_step, rollouts.prompts_per_step)
        job = SampleJob(
            prompts=self._encoder.encode(prompts),
            group_size=rollouts.group_size,
            weights=weights,
            behaviour=behaviour,
            max_new_tokens=rollouts.max_new_tokens,
            least_shards=self._recipe.graders.num_actors,
        )
        oldest = min(self._batches, default=index)
        assert index - oldest <= rollouts.max_staleness, f"batch {index} is requested while {oldest} is not taken"
        self._batches[index] = (time.monotonic(), self._send(job, self._sampler.sample))

    def take(self, index: int) -> Experience:
        """Wait for batch `index`, hand it over and forget it."""
        began, shards = self._batches.pop(index)
        section = self._recipe.rollouts.dynamic_sampling
        self._num_resent = 0
        if section is None:
            return self._collect(began, self._all_finished(shards, self._sampler.sample))
        return self._refilled(index, began, shards, section.max_refills)

    def evaluate(self, weights: PolicyWeights) -> Experience:
        """Sample the held-out prompts from the student alone, and grade them."""
        section, rollouts = self._recipe.evaluation, self._recipe.rollouts
        job = SampleJob(
            prompts=self._encoder.encode(self._source.held_out(section.num_prompts)),
            group_size=section.num_samples,
            weights=weights,
            behaviour=StudentAlone(),
            max_new_tokens=rollouts.max_new_tokens,
        )
        began = time.monotonic()
        self._num_resent = 0
        shards = self._send(job, self._sampler.sample_student)
        return self._collect(began, self._all_finished(shards, self._sampler.sample_student))

    def close(self) -> None:
        """End samplers and graders."""
        self._sampler.close()
        if self._graders is not None:
            with suppress(RayError):  # a grader that is dead has no workers left to end
                ray.get([grader.close.remote() for grader in self._graders.actors], timeout=10)
            self._graders.close()

    def _send(self, job: SampleJob, sample: Any) -> list[_Shard]:
        assert self._graders is not None
        refs = sample(job)
        shards = []
        for i, (part, rollouts) in enumerate(zip(job.split(len(refs)), refs, strict=True)):
            grade = self._graders[i].grade.options(num_returns=3)
            graded, learned, summary = grade.remote(rollouts, self._signal.learned_columns, LEARNER_ONLY_COLUMNS)
            shards.append(_Shard(job=part, graded=graded, learned=learned, summary=summary))
        return shards

    def _refilled(self, index: int, began: float, shards: Sequence[_Shard], max_refills: int) -> Experience:
        """Sample other prompts for groups that teach nothing, under the same weights; keep those that teach."""
        num_prompts, job = self._recipe.rollouts.prompts_per_step, shards[0].job
        done, teaches = [], dict[str, bool]()
        for refill in range(max_refills + 1):
            pieces = self._all_finished(shards, self._sampler.sample)
            done += pieces
            teaches |= groups_that_teach([summary for _, summary in pieces])
            if sum(teaches.values()) >= num_prompts or refill == max_refills:
                break
            start = refill_start(index, refill, max_refills=max_refills, num_prompts=num_prompts)
            prompts = self._encoder.encode(self._source.training(start, refill_size(teaches, num_prompts)))
            shards = self._send(replace(job, prompts=prompts), self._sampler.sample)
        selection = select(teaches, num_prompts)
        learned, summaries = _only(done, {*selection.learned, *selection.padding})
        experience = self._collect(began, done)
        return replace(
            experience,
            learned=learned,
            summaries=summaries,
            # With nothing to learn from at all, the step is one of advantages 0, as without dynamic sampling.
            padding=frozenset(selection.padding if selection.learned else ()),
            sampling={
                **verdict_metrics([summary for _, summary in done]),
                "sampling/refills": float(refill),
                "sampling/groups": float(len(teaches)),
                "sampling/groups_dropped": float(selection.num_dropped),
                "sampling/groups_surplus": float(selection.num_surplus),
                "sampling/groups_missing": float(len(selection.padding)),
            },
        )

    def _collect(self, began: float, done: Sequence[tuple[_Shard, pa.RecordBatch]]) -> Experience:
        return Experience(
            shards=tuple(shard.graded for shard, _ in done),
            learned=tuple(shard.learned for shard, _ in done),
            summaries=tuple(summary for _, summary in done),
            num_retries=self._num_resent,
            sampling_s=time.monotonic() - began,
            changeover_s=self._sampler.changeover_s,
        )

    def _all_finished(self, shards: Sequence[_Shard], sample: Any) -> list[tuple[_Shard, pa.RecordBatch]]:
        return [piece for shard in shards for piece in self._finished(shard, sample)]

    def _finished(self, shard: _Shard, sample: Any) -> list[tuple[_Shard, pa.RecordBatch]]:
        """Wait for a shard; sample it again where an actor died on the way. The draws are the same again."""
        try:
            return [(shard, ray.get(shard.summary))]
        except Exception as error:
            lost = is_loss(error) or isinstance(root_cause(error), SideLostError)
            if not lost or shard.num_retries + 1 >= _ATTEMPTS:
                raise
            time.sleep(_RETRY_S)
            self._num_resent += 1
            again = [replace(part, num_retries=shard.num_retries + 1) for part in self._send(shard.job, sample)]
            return [piece for part in again for piece in self._finished(part, sample)]


def _only(
    done: Sequence[tuple[_Shard, pa.RecordBatch]], prompt_ids: Collection[str]
) -> tuple[tuple[RolloutRef, ...], tuple[pa.RecordBatch, ...]]:
    """Return the learned parts and summaries of the rows with those prompts."""
    learned, summaries = [], []
    wanted = pa.array(sorted(prompt_ids), pa.string())
    for shard, summary in done:
        kept = pc.is_in(summary.column("prompt_id"), wanted)
        if not pc.any(kept).as_py():
            continue
        summaries.append(summary.filter(kept))
        all_kept = pc.all(kept).as_py()
        learned.append(shard.learned if all_kept else ray.put(ray.get(shard.learned).filter(kept)))
    return tuple(learned), tuple(summaries)


def build_sampler(recipe: Recipe, head: Head) -> Sampler:
    """Return the sampler that the recipe describes."""
    student = _engine_spec(recipe, recipe.students, head)
    if recipe.teachers is None:
        return PlainSampler(recipe.students, student)
    teacher = _engine_spec(recipe, recipe.teachers, head)
    signal = signal_spec(recipe.distillation, recipe.rollouts.support_size)
    plain = PlainSampler(recipe.students, student, recipe.teachers, teacher, signal)
    section = recipe.blending
    if not isinstance(section, BlenderSection) or isinstance(behaviour_plan(section, recipe.rollouts)(0), StudentAlone):
        return plain
    if section.layout == "one_engine":
        return AnnealedSampler(OneEngineSampler(recipe.students, student, teacher.model, section, signal), plain)
    return AnnealedSampler(BlendedSampler(plain, section, student, signal), plain)


def _engine_spec(recipe: Recipe, pool: ModelPoolSection, head: Head) -> EngineSpec:
    rollouts = recipe.rollouts
    size = None if rollouts.support_size == "full" else rollouts.support_size
    return EngineSpec(
        section=recipe.engine,
        model=model_location(pool.model),
        seed=recipe.seed,
        head=head,
        support_size=size if recipe.teachers is not None else 0,
        max_model_len=rollouts.max_prompt_tokens + rollouts.max_new_tokens,
        on_gpu=pool.num_gpus > 0,
    )
