"""What the learner is told of the teacher, through real Ray actors, against laws enumerated in float64."""

import time
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import pytest
import ray
import torch
from transformers import Qwen3ForCausalLM

from actors.behaviours import Behaviour, StudentAlone, TrustRegion
from actors.config import ModelPoolSection, TorchEngineSection, TrustRegionSection
from actors.engines.build import EngineSpec
from actors.experience import Prompt, Rollout, rollouts_from_arrow
from actors.head import Head
from actors.meter import meter_of
from actors.sampling import AnnealedSampler, BlendedSampler, OneEngineSampler, PlainSampler, SampleJob, Sampler
from actors.teacher_signal import STUDENTS_SUPPORT, SignalSpec
from actors.weights import PolicyWeights
from rewards.grader_actor import with_only
from tests.exact_laws import PROMPT, STOP, VOCABULARY, laws_along, make_model

pytestmark = [pytest.mark.ray, pytest.mark.timeout(300)]

SUPPORT_SIZE = 3
SIGNALS = [
    SignalSpec(support_size=2),
    SignalSpec(support="teacher", support_size=2),
    SignalSpec(support="union", support_size=2),
    SignalSpec(kind="sampled"),
    SignalSpec(kind="full"),
    SignalSpec(kind="hidden"),
]


def named(signal: SignalSpec) -> str:
    return f"{signal.kind}-{signal.support}" if signal.kind == "support" else signal.kind


@dataclass(frozen=True)
class Actors:
    """Running actors, over which samplers of any signal can be made."""

    spec: EngineSpec
    students: ModelPoolSection
    teachers: ModelPoolSection
    plain: PlainSampler
    blended: BlendedSampler
    one_engine: OneEngineSampler
    section: TrustRegionSection

    def sampler(self, layout: str, signal: SignalSpec) -> Sampler:
        """A sampler of the same actors that tells the learner this."""
        plain = PlainSampler(
            self.students, self.spec, self.teachers, replace(self.spec, model=self.teachers.model), signal
        )
        plain.students, plain.teachers = self.plain.students, self.plain.teachers
        if layout == "plain":
            return plain
        if layout == "annealed":  # after the changeover, asked for a batch of before
            annealed = AnnealedSampler(self.blended, plain)
            annealed._blended = None
            return annealed
        if layout == "one_engine":
            one_engine = OneEngineSampler(self.students, self.spec, self.teachers.model, self.section, signal)
            one_engine._engines = self.one_engine._engines
            return one_engine
        blended = BlendedSampler(plain, self.section, self.spec, signal)
        blended.blenders = self.blended.blenders
        return blended


@pytest.fixture(scope="module")
def teacher(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Qwen3ForCausalLM]:
    folder = tmp_path_factory.mktemp("models")
    make_model(folder / "student", seed=1, hidden_size=32, tied=True, scale=0.2)
    return folder, make_model(folder / "teacher", seed=2, hidden_size=64, tied=False, scale=0.15)


@pytest.fixture(scope="module")
def actors(ray_cluster: str, teacher: tuple[Path, Qwen3ForCausalLM]) -> Iterator[Actors]:
    folder, _ = teacher
    spec = EngineSpec(
        section=TorchEngineSection(), model=str(folder / "student"), seed=3, head=Head(stop_token_ids=(STOP,)),
        support_size=SUPPORT_SIZE, max_model_len=64, on_gpu=False,
    )  # fmt: skip
    students = ModelPoolSection(model=spec.model, num_cpus=0.2)
    teachers = ModelPoolSection(model=str(folder / "teacher"), num_cpus=0.2)
    plain = PlainSampler(students, spec, teachers, replace(spec, model=teachers.model))
    section = TrustRegionSection(num_cpus=0.2, draft_length=3)
    made = Actors(
        spec=spec, students=students, teachers=teachers, plain=plain, blended=BlendedSampler(plain, section, spec),
        one_engine=OneEngineSampler(students, spec, teachers.model, section), section=section,
    )  # fmt: skip
    made.blended.start()
    made.one_engine.start()
    yield made
    for sampler in (made.one_engine, made.blended, plain):
        sampler.close()
    while any(name.startswith(("student", "teacher", "blending")) for name in ray.util.list_named_actors()):
        time.sleep(0.1)  # another module's actors may take the same names


def job(layout: str) -> SampleJob:
    behaviour: Behaviour = StudentAlone() if layout == "plain" else TrustRegion(epsilon=0.3)
    prompts = [
        Prompt(prompt_id=f"p{i}", text="", token_ids=(*PROMPT, *([5] * i)), task="addition", reference="1")
        for i in range(3)
    ]
    return SampleJob(
        prompts=prompts, group_size=2, behaviour=behaviour, max_new_tokens=9,
        weights=PolicyWeights(policy_version=0, buckets=()),
    )  # fmt: skip


def check_what_the_learner_is_told(rollout: Rollout, model: Qwen3ForCausalLM, signal: SignalSpec) -> None:
    completion = rollout.completion
    laws = laws_along(model, rollout.prompt.token_ids, completion.token_ids)
    if signal.kind == "hidden":
        assert rollout.teacher_hidden is not None
        states = torch.from_numpy(rollout.teacher_hidden.copy()).double()
        made = torch.log_softmax(states @ model.lm_head.weight.T, -1).detach()
        np.testing.assert_allclose(made, laws, atol=1e-4)
        return
    ids, logprobs, tails = rollout.learner_scores()
    assert (ids is None) == (signal.kind == "full"), "a whole law needs no ids"
    if ids is None:
        ids = np.broadcast_to(np.arange(VOCABULARY), logprobs.shape)
    size = {"full": VOCABULARY, "sampled": 1}.get(signal.kind, 4 if signal.support == "union" else 2)
    assert ids.shape == logprobs.shape == (completion.num_tokens, size)
    assert all(len(set(row)) == size for row in ids.tolist())
    if signal.kind == "sampled":
        assert (ids[:, 0] == completion.token_ids).all()
    if (signal.kind, signal.support) == ("support", "teacher"):
        assert (np.sort(ids, 1) == np.sort(laws.topk(size).indices, 1)).all()
    chosen = torch.from_numpy(ids.copy()).long()
    np.testing.assert_allclose(logprobs, laws.gather(1, chosen), atol=1e-4)
    np.testing.assert_allclose(tails, torch.logsumexp(laws.scatter(1, chosen, -torch.inf), 1), atol=1e-4)


@pytest.mark.parametrize("layout", ["plain", "actors", "one_engine", "annealed"])
@pytest.mark.parametrize("signal", SIGNALS, ids=named)
def test_the_learner_is_told_the_teachers_law(
    actors: Actors, teacher: tuple[Path, Qwen3ForCausalLM], signal: SignalSpec, layout: str
) -> None:
    shards = ray.get(actors.sampler(layout, signal).sample(job(layout)))
    learned = [r for shard in shards for r in rollouts_from_arrow(with_only(shard, signal.learned_columns))]
    assert [(r.prompt.prompt_id, r.sample_index) for r in learned] == [(f"p{i}", j) for i in range(3) for j in range(2)]
    for rollout in learned:
        check_what_the_learner_is_told(rollout, teacher[1], signal)


@pytest.mark.parametrize("layout", ["actors", "one_engine"])
@pytest.mark.parametrize("signal", SIGNALS, ids=named)
def test_the_records_of_a_blend_are_the_same_whatever_the_learner_is_told(
    actors: Actors, signal: SignalSpec, layout: str
) -> None:
    usual = ray.get(actors.sampler(layout, STUDENTS_SUPPORT).sample(job(layout)))
    told = ray.get(actors.sampler(layout, signal).sample(job(layout)))
    for before, after in zip(usual, told, strict=True):
        columns = [name for name in before.schema.names if not name.startswith(("learned_", "teacher_hidden"))]
        assert before.select(columns).equals(after.select(columns))
    for name in ("num_tokens", "num_drafted", "num_passes"):
        assert getattr(meter_of(told), name) == getattr(meter_of(usual), name)
    again = meter_of(told).num_scored - meter_of(usual).num_scored
    assert again == (meter_of(told).num_tokens if signal.needs_model(SUPPORT_SIZE) else 0)


@pytest.mark.parametrize("signal", SIGNALS, ids=named)
def test_plain_rollouts_keep_both_laws_on_the_students_support_except_beside_hidden_states(
    actors: Actors, signal: SignalSpec
) -> None:
    sampler = actors.sampler("plain", signal)
    usual = [r for shard in ray.get(actors.plain.sample(job("plain"))) for r in rollouts_from_arrow(shard)]
    told = [r for shard in ray.get(sampler.sample(job("plain"))) for r in rollouts_from_arrow(shard)]
    for before, after in zip(usual, told, strict=True):
        assert (before.completion.token_ids == after.completion.token_ids).all()
        if signal.kind == "hidden":
            assert after.teacher is None
            assert after.blend is None
            continue
        assert before.teacher is not None
        assert after.teacher is not None
        assert (before.teacher.kl_to_teacher() == after.teacher.kl_to_teacher()).all()


@pytest.mark.parametrize("layout", ["plain", "actors", "one_engine"])
def test_rollouts_for_evaluation_tell_the_divergence_from_the_teacher(actors: Actors, layout: str) -> None:
    sampler = actors.sampler(layout, SignalSpec(kind="hidden"))
    for shard in ray.get(sampler.sample_student(job("plain"))):
        for rollout in rollouts_from_arrow(shard):
            assert rollout.teacher is not None
            assert (rollout.teacher.kl_to_teacher() > 0).all()
            assert rollout.teacher_hidden is None
