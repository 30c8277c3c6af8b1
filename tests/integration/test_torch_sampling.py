"""The samplers over real Ray actors with torch engines, against exact laws enumerated in float64.

Student, teacher and blending service are processes of their own, as in a run.
"""

import math
import os
import signal
import time
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Literal

import numpy as np
import pyarrow as pa
import pytest
import ray
import torch
from transformers import Qwen3ForCausalLM

from actors.behaviours import Behaviour, FixedBeta, InterleavedInjection, StudentAlone, TrustRegion
from actors.config import ModelPoolSection, TorchEngineSection, TrustRegionSection
from actors.engines.build import EngineSpec
from actors.experience import Prompt, Rollout, rollouts_from_arrow
from actors.head import Decoding, Head
from actors.meter import meter_of
from actors.sampling import AnnealedSampler, BlendedSampler, OneEngineSampler, PlainSampler, SampleJob
from actors.trust_region import blend
from actors.weights import PolicyWeights
from tests.exact_laws import (
    FALSE_ALARM,
    NUM_TOKENS,
    PROMPT,
    STOP,
    NextLaw,
    blend_of,
    law_of,
    laws_along,
    make_model,
    surprise,
    truncated,
    truncated_blend_of,
)

pytestmark = [pytest.mark.ray, pytest.mark.timeout(300)]

NUM_SAMPLES = 10000
BUDGETS = [0.05, 0.5]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("models")


@pytest.fixture(scope="module")
def student(folder: Path) -> Qwen3ForCausalLM:
    return make_model(folder / "student", seed=1, hidden_size=32, tied=True, scale=0.2)


@pytest.fixture(scope="module")
def teacher(folder: Path) -> Qwen3ForCausalLM:
    return make_model(folder / "teacher", seed=2, hidden_size=64, tied=False, scale=0.15)


@dataclass(frozen=True)
class Setting:
    """What the samplers under test are made with."""

    support_size: int | None
    draft_length: int | Literal["adaptive"]
    num_students: int
    num_at_once: int
    """Sequences that an actor has open at a time; the others wait for a place."""
    one_engine: bool = False

    def mu(self, student: NextLaw, teacher: NextLaw, epsilon: float) -> NextLaw:
        if self.support_size is None:
            return blend_of(student, teacher, epsilon)
        return truncated_blend_of(student, teacher, epsilon, self.support_size)


Samplers = tuple[Setting, PlainSampler, BlendedSampler | OneEngineSampler]


@pytest.fixture(
    scope="module",
    params=[
        Setting(support_size=None, draft_length=1, num_students=2, num_at_once=10000),
        Setting(support_size=3, draft_length="adaptive", num_students=1, num_at_once=3000),
        Setting(support_size=3, draft_length=3, num_students=1, num_at_once=3000, one_engine=True),
    ],
    ids=["full-lockstep", "truncated-adaptive-two-lanes", "truncated-one-engine"],
)
def samplers(
    request: pytest.FixtureRequest,
    ray_cluster: str,
    folder: Path,
    student: Qwen3ForCausalLM,
    teacher: Qwen3ForCausalLM,
) -> Iterator[Samplers]:
    setting: Setting = request.param
    spec = EngineSpec(
        section=TorchEngineSection(max_num_sequences=setting.num_at_once), model=str(folder / "student"), seed=3,
        head=Head(stop_token_ids=(STOP,)), support_size=setting.support_size, max_model_len=64, on_gpu=False,
    )  # fmt: skip
    students = ModelPoolSection(model=spec.model, num_actors=setting.num_students, num_cpus=0.2)
    teachers = ModelPoolSection(model=str(folder / "teacher"), num_cpus=0.2)
    plain = PlainSampler(students, spec, teachers, replace(spec, model=teachers.model))
    section = TrustRegionSection(draft_length=setting.draft_length, num_cpus=0.2)
    blended: BlendedSampler | OneEngineSampler = BlendedSampler(plain, section, spec)
    if setting.one_engine:
        plain.start()
        blended = OneEngineSampler(students, spec, teachers.model, section)
    blended.start()
    yield setting, plain, blended
    blended.close()
    plain.close()
    while any(name.startswith(("student", "teacher", "blending")) for name in ray.util.list_named_actors()):
        time.sleep(0.1)  # the next samplers' actors take the same names


def job(
    num_prompts: int, group_size: int, behaviour: Behaviour | float, prompt_id: str, length: int = NUM_TOKENS
) -> SampleJob:
    behaviour = TrustRegion(epsilon=behaviour) if isinstance(behaviour, float) else behaviour
    prompts = [
        Prompt(prompt_id=f"{prompt_id}-{i}", text="", token_ids=(*PROMPT, *([5] * i)), task="addition", reference="1")
        for i in range(num_prompts)
    ]
    return SampleJob(
        prompts=prompts, group_size=group_size, behaviour=behaviour, max_new_tokens=length,
        weights=PolicyWeights(policy_version=0, buckets=()),
    )  # fmt: skip


def rollouts_of(refs: list[ray.ObjectRef]) -> list[Rollout]:  # type: ignore[type-arg]
    return [rollout for batch in ray.get(refs) for rollout in rollouts_from_arrow(batch)]


def sequences(rollouts: list[Rollout]) -> list[tuple[int, ...]]:
    return [tuple(rollout.completion.token_ids.tolist()) for rollout in rollouts]


@pytest.mark.parametrize("epsilon", [0.05, 0.5])
def test_blended_sequences_follow_mu_and_nothing_else(
    samplers: Samplers, student: Qwen3ForCausalLM, teacher: Qwen3ForCausalLM, epsilon: float
) -> None:
    setting, _, blended = samplers
    pi_s, pi_t = law_of(student), law_of(teacher)
    rollouts = rollouts_of(blended.sample(job(1, NUM_SAMPLES, epsilon, f"law-{epsilon}")))
    sampled = sequences(rollouts)
    assert len(sampled) == NUM_SAMPLES
    assert surprise(sampled, setting.mu(pi_s, pi_t, epsilon)) < FALSE_ALARM
    for control in (pi_s, pi_t, setting.mu(pi_s, pi_t, 2 * epsilon)):
        assert surprise(sampled, control) > FALSE_ALARM
    accepted = np.concatenate([rollout.blend.accepted for rollout in rollouts if rollout.blend])
    assert 1 - math.sqrt(epsilon / 2) < accepted.mean() < 1  # Pinsker


def test_plain_sequences_follow_the_student(
    samplers: Samplers, student: Qwen3ForCausalLM, teacher: Qwen3ForCausalLM
) -> None:
    _, plain, _ = samplers
    sampled = sequences(rollouts_of(plain.sample(job(1, NUM_SAMPLES, StudentAlone(), "plain"))))
    assert surprise(sampled, law_of(student)) < FALSE_ALARM
    assert surprise(sampled, law_of(student, temperature=1.15)) > FALSE_ALARM
    assert surprise(sampled, law_of(teacher)) > FALSE_ALARM


def test_no_budget_gives_the_students_own_rollouts_token_for_token(samplers: Samplers) -> None:
    _, plain, blended = samplers
    alone = rollouts_of(plain.sample(job(4, 5, StudentAlone(), "same", 12)))
    through = rollouts_of(blended.sample(job(4, 5, 0.0, "same", 12)))
    assert sequences(alone) == sequences(through)
    for one, other in zip(alone, through, strict=True):
        assert one.text == other.text
        assert one.blend is not None
        assert other.blend is not None
        assert one.teacher is not None
        assert other.teacher is not None
        assert other.blend.accepted.all()
        assert not other.blend.beta.any()
        np.testing.assert_allclose(one.blend.teacher_logprobs, other.blend.teacher_logprobs, atol=2e-5)
        np.testing.assert_allclose(one.completion.behaviour_logprobs, other.completion.behaviour_logprobs, atol=2e-5)
        np.testing.assert_allclose(
            np.asarray(one.teacher.teacher_tail_logprobs), np.asarray(other.teacher.teacher_tail_logprobs), atol=2e-5
        )


def test_every_recorded_number_is_that_of_a_separate_forward(
    samplers: Samplers, student: Qwen3ForCausalLM, teacher: Qwen3ForCausalLM
) -> None:
    setting, _, blended = samplers
    epsilon = 0.2
    rollouts = rollouts_of(blended.sample(job(5, 8, epsilon, "recorded", 15)))
    assert [(r.prompt.prompt_id, r.sample_index) for r in rollouts] == [
        (f"recorded-{i}", j) for i in range(5) for j in range(8)
    ]
    for rollout in rollouts:
        completion, trace, scores = rollout.completion, rollout.blend, rollout.teacher
        assert trace is not None
        assert scores is not None
        pi_s, pi_t = (laws_along(m, rollout.prompt.token_ids, completion.token_ids) for m in (student, teacher))
        mu = truncated(pi_s, pi_t, epsilon, setting.support_size) if setting.support_size else blend(
            pi_s, pi_t, epsilon).logprobs  # fmt: skip
        tokens = torch.from_numpy(completion.token_ids.copy()).long()[:, None]
        for stored, laws in (
            (completion.behaviour_logprobs, mu),
            (completion.student_logprobs, pi_s),
            (trace.teacher_logprobs, pi_t),
        ):
            np.testing.assert_allclose(stored, laws.gather(1, tokens)[:, 0], atol=1e-4)
        spent = torch.where(mu.isfinite(), mu.exp() * (mu - pi_s), 0.0).sum(-1)
        np.testing.assert_allclose(trace.divergence, spent, atol=1e-4)
        assert (spent <= epsilon * (1 + 1e-4)).all()
        support = torch.from_numpy(scores.support_ids.copy()).long()
        for laws, logprobs, tail in (
            (pi_s, scores.student_logprobs, scores.student_tail_logprobs),
            (pi_t, scores.teacher_logprobs, scores.teacher_tail_logprobs),
        ):
            np.testing.assert_allclose(np.asarray(logprobs), laws.gather(1, support), atol=1e-4)
            outside = torch.logsumexp(laws.scatter(1, support, -torch.inf), 1)
            np.testing.assert_allclose(np.asarray(tail), outside, atol=1e-4)
        assert STOP not in completion.token_ids[:-1]
        assert (completion.finish_reason == "stop") == (completion.token_ids[-1] == STOP)
        assert completion.num_tokens == 15 or completion.finish_reason == "stop"


def test_the_teachers_scores_come_with_the_blend_and_it_is_asked_once(samplers: Samplers) -> None:
    setting, _, blended = samplers
    shards = ray.get(blended.sample(job(4, 16, 0.05, "once", 24)))
    meter, rollouts = meter_of(shards), rollouts_of_shards(shards)
    num_tokens = sum(rollout.completion.num_tokens for rollout in rollouts)
    assert meter.num_tokens == num_tokens
    assert meter.num_scored == meter.num_drafted, "no position is scored but the drafted ones"
    for rollout in rollouts:
        assert rollout.teacher is not None
        assert rollout.teacher.teacher_logprobs is not None
        assert len(rollout.teacher.teacher_logprobs) == rollout.completion.num_tokens
    if setting.draft_length == 1:
        assert meter.num_passes == num_tokens
    else:
        assert meter.num_passes < 0.6 * num_tokens
    assert (meter.wire_bytes > 0) != setting.one_engine


@pytest.mark.parametrize(
    "behaviour", [FixedBeta(beta=0.4), InterleavedInjection(top_k=2, temperature=0.7)], ids=["fixed-beta", "skd"]
)
def test_the_baselines_follow_their_laws(
    samplers: Samplers, student: Qwen3ForCausalLM, teacher: Qwen3ForCausalLM, behaviour: FixedBeta
) -> None:
    setting, _, blended = samplers
    if setting.support_size is not None:
        pytest.skip("whole laws are compared")
    pi_s, pi_t = law_of(student), law_of(teacher)
    sampled = sequences(rollouts_of(blended.sample(job(1, NUM_SAMPLES, behaviour, f"baseline-{behaviour}"))))
    assert surprise(sampled, lambda ids: behaviour.target(pi_s(ids), pi_t(ids)).logprobs) < FALSE_ALARM
    for control in (pi_s, pi_t):
        assert surprise(sampled, control) > FALSE_ALARM


def test_a_warm_student_draws_from_its_law_at_that_temperature(samplers: Samplers, student: Qwen3ForCausalLM) -> None:
    _, plain, _ = samplers
    warm = StudentAlone(decoding=Decoding(temperature=0.6))
    rollouts = rollouts_of(plain.sample(job(1, NUM_SAMPLES, warm, "warm")))
    assert surprise(sequences(rollouts), law_of(student, temperature=0.6)) < FALSE_ALARM
    assert surprise(sequences(rollouts), law_of(student)) > FALSE_ALARM
    completion = rollouts[0].completion
    assert (completion.behaviour_logprobs != completion.student_logprobs).any()


def test_student_teacher_and_blending_service_are_different_processes(samplers: Samplers) -> None:
    _, plain, blended = samplers
    if isinstance(blended, OneEngineSampler):
        return
    assert plain.students is not None
    assert plain.teachers is not None
    assert blended.blenders is not None
    actors = [*plain.students.actors, *plain.teachers.actors, *blended.blenders.actors]
    pids = ray.get([actor.__ray_call__.remote(lambda _: os.getpid()) for actor in actors])
    assert len({os.getpid(), *pids}) == 1 + len(actors)


@pytest.mark.parametrize("side", ["student", "teacher"])
def test_sequences_survive_the_loss_of_the_actor_that_holds_them(samplers: Samplers, side: str) -> None:
    setting, plain, blended = samplers
    if not isinstance(blended, BlendedSampler) or setting.num_students > 1:
        pytest.skip("one student, one teacher, and a service that outlives them")
    asked = job(4, 64, 0.05, f"lost-{side}", 48)
    undisturbed = rollouts_of(blended.sample(asked))
    pool = plain.students if side == "student" else plain.teachers
    assert pool is not None
    pid = ray.get(pool[0].__ray_call__.remote(lambda _: os.getpid()))
    refs = blended.sample(asked)
    deadline = time.monotonic() + 60
    while ray.get(pool[0].__ray_call__.remote(lambda actor: len(actor._engine._sequences))) == 0:
        assert time.monotonic() < deadline
    os.kill(pid, signal.SIGKILL)
    shards = ray.get(refs)
    assert meter_of(shards).num_reopened > 0
    again = rollouts_of_shards(shards)
    same = [a == b for a, b in zip(sequences(again), sequences(undisturbed), strict=True)]
    assert np.mean(same) > 0.9, "the draws are the same; only rounding may differ"


def test_a_blended_batch_that_is_asked_for_again_after_the_changeover_comes_from_the_student(
    samplers: Samplers,
) -> None:
    setting, plain, _ = samplers
    if setting.support_size is not None:
        pytest.skip("once is enough")
    spec = plain._specs[0]
    annealed = AnnealedSampler(BlendedSampler(plain, TrustRegionSection(num_cpus=0.1, num_actors=1), spec), plain)
    annealed._blended = None  # as it is when a part of an earlier batch is lost
    blended = job(2, 4, 0.05, "again", 12)
    alone = rollouts_of(plain.sample(replace(blended, behaviour=StudentAlone())))
    again = rollouts_of(annealed.sample(blended))
    assert sequences(again) == sequences(alone)
    assert all(rollout.blend is not None and not rollout.blend.beta.any() for rollout in again)


def rollouts_of_shards(shards: list[pa.RecordBatch]) -> list[Rollout]:
    return [rollout for shard in shards for rollout in rollouts_from_arrow(shard)]
