"""The DeepSpeed learner against plain torch, over Ray actors, on a Qwen3 of 4 thousand random weights."""

import math
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import ray
import torch
from torch import Tensor
from transformers import AutoModelForCausalLM, Qwen3Config, Qwen3ForCausalLM

from actors.experience import Completion, Prompt, Rollout, TeacherScores, rollouts_to_arrow
from actors.weights import PolicyWeights, read_weights
from learner.batcher import Batcher, TrainBatch
from learner.config import LearnerSection, Objective, PolicyGradientObjective, ReverseKLObjective
from learner.errors import LearnerError, NonFiniteLossError
from learner.group import LearnerGroup
from learner.learning_rate import learning_rate_factor
from rewards.grade import Grade, Status
from rewards.grader_actor import summary, with_grades

pytestmark = pytest.mark.ray

VOCABULARY_SIZE = 11
NUM_ROLLOUTS = 8
NUM_STEPS = 5
DISTIL = ReverseKLObjective(support_size="full")
REINFORCE = PolicyGradientObjective(method="grpo", focal_gamma=0.5)


@pytest.fixture(scope="module")
def model_folder(tmp_path_factory: pytest.TempPathFactory) -> str:
    """A student with random weights; large ones, so that its laws are far from uniform."""
    torch.manual_seed(0)
    config = Qwen3Config(
        vocab_size=VOCABULARY_SIZE,
        hidden_size=16,
        intermediate_size=32,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=1,
        head_dim=8,
        max_position_embeddings=32,
        tie_word_embeddings=True,
        initializer_range=0.2,
    )
    folder = tmp_path_factory.mktemp("student")
    Qwen3ForCausalLM(config).save_pretrained(folder)
    (folder / "tokenizer.json").write_text("{}", encoding="utf-8")
    return str(folder)


def make_rollouts(step: int) -> list[Rollout]:
    """Eight rollouts of four prompts, of uneven lengths, with random laws of sampler and teacher and random grades."""
    random = np.random.default_rng(step)

    def random_laws(num_positions: int) -> np.ndarray[Any, Any]:
        logits = torch.from_numpy(random.normal(size=(num_positions, VOCABULARY_SIZE)))
        return np.asarray(logits.log_softmax(-1).numpy(), np.float32)

    rollouts = []
    for i in range(NUM_ROLLOUTS):
        num_tokens = int(random.integers(1, 6))
        laws = random_laws(num_tokens)
        token_ids = random.integers(VOCABULARY_SIZE, size=num_tokens).astype(np.int32)
        order = np.argsort(-laws, axis=1).astype(np.int32)
        chosen = np.take_along_axis(laws, token_ids[:, None], axis=1)[:, 0]
        rollouts.append(
            Rollout(
                prompt=Prompt(
                    prompt_id=f"{step}-{i // 2}",
                    text="",
                    token_ids=tuple(random.integers(VOCABULARY_SIZE, size=1 + (i // 2) % 3).tolist()),
                    task="none",
                    reference="",
                ),
                sample_index=i % 2,
                completion=Completion(
                    token_ids=token_ids,
                    behaviour_logprobs=chosen,
                    student_logprobs=chosen,
                    finish_reason="stop",
                    policy_versions=np.full(num_tokens, step, np.int32),
                ),
                teacher=TeacherScores(
                    support_ids=order,
                    student_logprobs=np.take_along_axis(laws, order, axis=1),
                    teacher_logprobs=random_laws(num_tokens),
                    student_tail_logprobs=np.full(num_tokens, -np.inf, np.float32),
                    teacher_tail_logprobs=np.full(num_tokens, -np.inf, np.float32),
                ),
            )
        )
    return rollouts


def make_grades(step: int) -> list[Grade]:
    """One group of each pattern: told apart, all right, a member lost, told apart the other way."""
    reward_pairs = [(1.0, 0.0), (1.0, 1.0), (1.0, None), (0.0, 1.0)]
    turned = reward_pairs[step % 4 :] + reward_pairs[: step % 4]
    return [
        Grade(reward=0.0, status=Status.CRASHED)
        if reward is None
        else Grade(reward=reward, status=Status.CORRECT if reward else Status.WRONG)
        for pair in turned
        for reward in pair
    ]


def make_batch(step: int, objective: Objective, rollouts: Sequence[Rollout] | None = None) -> TrainBatch:
    """Put the rollouts into the store as two shards and pack them."""
    rollouts = make_rollouts(step) if rollouts is None else rollouts
    grades = make_grades(step)
    shards, summaries = [], []
    for rows in (slice(0, 3), slice(3, None)):
        graded = with_grades(rollouts_to_arrow(rollouts[rows]), grades[rows])
        shards.append(ray.put(graded))
        summaries.append(summary(graded))
    return Batcher(objective=objective).pack(step, shards, summaries)[0]


def make_section(
    *, objective: Objective = DISTIL, stage: int = 1, world_size: int = 1, micro_batch_size: int = 4, **more: Any
) -> LearnerSection:
    values: dict[str, Any] = {
        "objective": objective,
        "zero_stage": stage,
        "world_size": world_size,
        "micro_batch_size": micro_batch_size,
        "num_cpus": 0.5,
        "learning_rate": 1e-3,
        "warmup_steps": 2,
        "lr_schedule": "linear",
        "step_timeout_s": 60.0,
        "start_timeout_s": 120.0,
    }
    return LearnerSection(**{**values, **more})


@contextmanager
def learner(section: LearnerSection, model_folder: str) -> Iterator[LearnerGroup]:
    group = LearnerGroup(
        section, model_folder=model_folder, rollouts_per_step=NUM_ROLLOUTS, num_steps=NUM_STEPS, namespace="tests"
    )
    with group:
        yield group


def weights_of(policy: PolicyWeights) -> dict[str, Tensor]:
    return {name: tensor.clone() for name, tensor in read_weights(policy)}


@dataclass(frozen=True, kw_only=True)
class PlainStep:
    loss: float
    grad_norm: float
    learning_rate: float
    weights: dict[str, Tensor]


def plain_steps(section: LearnerSection, model_folder: str, batches: Sequence[TrainBatch]) -> list[PlainStep]:
    """The slow obvious twin: one process, one rollout at a time, no padding, torch's own AdamW and clipping."""
    model = AutoModelForCausalLM.from_pretrained(model_folder, dtype=torch.float32)
    optimizer = torch.optim.AdamW(
        model.parameters(), lr=section.learning_rate, betas=section.adam_betas, weight_decay=section.weight_decay
    )
    steps = []
    for number, batch in enumerate(batches):
        factor = learning_rate_factor(number, schedule="linear", warmup_steps=2, num_steps=NUM_STEPS)
        for parameters in optimizer.param_groups:
            parameters["lr"] = section.learning_rate * factor
        rollouts = make_rollouts(batch.step)
        losses = []
        for rollout, advantage, trains in zip(rollouts, batch.advantages, batch.trains, strict=True):
            if trains:
                losses.append(plain_loss(model, rollout, float(advantage), section.objective))
        loss = torch.cat(losses).mean()
        optimizer.zero_grad()
        loss.backward()  # type: ignore[no-untyped-call]
        grad_norm = torch.nn.utils.clip_grad_norm_(model.parameters(), section.grad_clip)
        optimizer.step()
        steps.append(
            PlainStep(
                loss=loss.item(),
                grad_norm=grad_norm.item(),
                learning_rate=section.learning_rate * factor,
                weights={name: p.detach().clone() for name, p in model.named_parameters()},
            )
        )
    return steps


def plain_loss(model: Any, rollout: Rollout, advantage: float, objective: Objective) -> Tensor:
    """Per-token losses [T] of one rollout."""
    prompt, completion = list(rollout.prompt.token_ids), rollout.completion
    tokens = torch.tensor([[*prompt, *completion.token_ids.tolist()]])
    logprobs = model(tokens).logits[0, len(prompt) - 1 : -1].log_softmax(-1)
    if isinstance(objective, ReverseKLObjective):
        assert rollout.teacher is not None
        assert rollout.teacher.teacher_logprobs is not None
        ids = torch.tensor(rollout.teacher.support_ids.astype(np.int64))
        teacher = torch.empty_like(logprobs).scatter(-1, ids, torch.tensor(rollout.teacher.teacher_logprobs))
        return (logprobs.exp() * (logprobs - teacher)).sum(-1)
    chosen = logprobs[range(completion.num_tokens), completion.token_ids.tolist()]
    ratio = (chosen - torch.tensor(completion.behaviour_logprobs)).exp()
    return -torch.minimum(ratio * advantage, ratio.clamp(0.8, 1.2) * advantage)


@pytest.mark.parametrize(
    ("stage", "world_size", "micro_batch_size", "objective"),
    [
        (1, 1, 8, DISTIL),
        (1, 1, 2, REINFORCE),
        (1, 2, 2, DISTIL),
        (2, 1, 4, DISTIL),
        (2, 2, 1, REINFORCE),
        (3, 1, 2, REINFORCE),
        (3, 2, 2, DISTIL),
    ],
)
def test_every_stage_world_size_and_split_learns_what_plain_torch_learns(
    ray_cluster: str, model_folder: str, stage: int, world_size: int, micro_batch_size: int, objective: Objective
) -> None:
    section = make_section(objective=objective, stage=stage, world_size=world_size, micro_batch_size=micro_batch_size)
    batches = [make_batch(step, objective) for step in range(NUM_STEPS)]
    expected = plain_steps(section, model_folder, batches)
    with learner(section, model_folder) as group:
        for number, (batch, plain) in enumerate(zip(batches, expected, strict=True)):
            report = group.step(batch)
            assert report.policy_version == number + 1
            assert report.num_tokens == batch.num_tokens
            assert report.loss == pytest.approx(plain.loss, abs=1e-5)
            assert report.grad_norm == pytest.approx(plain.grad_norm, rel=1e-4)
            assert report.learning_rate == pytest.approx(plain.learning_rate)
            if objective is DISTIL:
                assert report.metrics["kl_to_teacher"] == pytest.approx(report.loss, rel=1e-4)
            policy = group.publish()
            assert policy.policy_version == number + 1
            weights = weights_of(policy)
            assert weights.keys() == plain.weights.keys()
            apart = max((weights[name] - plain.weights[name]).abs().max().item() for name in weights)
            assert apart < 5e-5, f"{apart} at step {number}"
    moved = max((expected[-1].weights[n] - expected[0].weights[n]).abs().max().item() for n in expected[0].weights)
    assert moved > 1e-3, "five steps move the weights by far more than the tolerance"


@pytest.mark.parametrize(("stage", "world_size"), [(1, 2), (2, 1), (3, 2)])
def test_a_refused_step_changes_nothing_and_a_checkpoint_continues_the_same(
    ray_cluster: str, model_folder: str, tmp_path: Path, stage: int, world_size: int
) -> None:
    section = make_section(stage=stage, world_size=world_size, micro_batch_size=2)
    checkpoint = str(tmp_path / "checkpoint")
    with learner(section, model_folder) as group:
        first = [group.step(make_batch(step, DISTIL)) for step in range(2)]
        group.save(checkpoint, {"position": 17})
        before = weights_of(group.publish())

        rollouts = make_rollouts(2)
        assert rollouts[5].teacher is not None
        assert rollouts[5].teacher.teacher_logprobs is not None
        spoiled = rollouts[5].teacher.teacher_logprobs.copy()
        spoiled[0, 0] = math.nan
        rollouts[5] = replace(rollouts[5], teacher=replace(rollouts[5].teacher, teacher_logprobs=spoiled))
        with pytest.raises(NonFiniteLossError, match=r"the loss of prompt_id/sample_index 2-2/1 was not;.* version 2 "):
            group.step(make_batch(2, DISTIL, rollouts))
        refused = group.publish()
        assert refused.policy_version == 2
        assert all(torch.equal(before[name], tensor) for name, tensor in weights_of(refused).items())

        later = [group.step(make_batch(step, DISTIL)) for step in (2, 3)]
        assert [report.policy_version for report in first + later] == [1, 2, 3, 4]
        after = weights_of(group.publish())

        assert group.load(checkpoint) == {"position": 17}
        assert [group.step(make_batch(step, DISTIL)) for step in (2, 3)] == later
        assert all(torch.equal(after[name], tensor) for name, tensor in weights_of(group.publish()).items())

        group.save_hf(str(tmp_path / "hf"))
    reloaded = AutoModelForCausalLM.from_pretrained(tmp_path / "hf")
    assert all(torch.equal(after[name], p) for name, p in reloaded.named_parameters())
    assert (tmp_path / "hf" / "tokenizer.json").is_file()


def test_a_new_group_continues_from_a_checkpoint_and_refuses_one_of_another_world_size(
    ray_cluster: str, model_folder: str, tmp_path: Path
) -> None:
    checkpoint = str(tmp_path / "checkpoint")
    section = make_section(stage=2, dtype="bfloat16", activation_checkpointing=True)
    with learner(section, model_folder) as group:
        group.step(make_batch(0, DISTIL))
        group.save(checkpoint, {})
        expected = group.step(make_batch(1, DISTIL))
        weights = weights_of(group.publish())
        assert {tensor.dtype for tensor in weights.values()} == {torch.bfloat16}
    with learner(section, model_folder) as group:
        group.load(checkpoint)
        assert group.step(make_batch(1, DISTIL)) == expected
        assert all(torch.equal(weights[name], tensor) for name, tensor in weights_of(group.publish()).items())
        with pytest.raises(LearnerError) as missing:
            group.load(str(tmp_path))
        assert str(missing.value).startswith("learner-0 failed to load: FileNotFoundError: a checkpoint of the learner")
        with pytest.raises(LearnerError, match="ranks are gone; cannot publish"):
            group.publish()
    with learner(make_section(stage=2, world_size=2, dtype="bfloat16"), model_folder) as group:
        message = r"ValueError: learner.world_size must be as it was when the checkpoint was written, 1, got 2"
        with pytest.raises(LearnerError, match=message):
            group.load(checkpoint)


def test_a_rank_that_dies_takes_the_group_with_it_and_is_named(ray_cluster: str, model_folder: str) -> None:
    with learner(make_section(world_size=2, micro_batch_size=2), model_folder) as group:
        group.step(make_batch(0, DISTIL))
        ray.kill(ray.get_actor("learner-1", namespace="tests"))
        with pytest.raises(LearnerError) as failure:
            group.step(make_batch(1, DISTIL))
    assert str(failure.value).splitlines()[0].startswith("learner-1 failed to step: ActorDiedError")
    for name in ("learner-0", "learner-1"):
        with pytest.raises(ValueError, match=name):
            ray.get_actor(name, namespace="tests")


def test_a_step_that_takes_too_long_stops_the_ranks(ray_cluster: str, model_folder: str) -> None:
    with learner(make_section(step_timeout_s=0.001), model_folder) as group:
        with pytest.raises(LearnerError, match=r"step must end within 0.001 s, but learner-0 had not"):
            group.step(make_batch(0, DISTIL))
        with pytest.raises(LearnerError, match="ranks are gone"):
            group.publish()


def test_a_batch_that_does_not_divide_over_the_ranks_is_refused_before_any_rank_starts(model_folder: str) -> None:
    section = make_section(world_size=2, micro_batch_size=3)
    with pytest.raises(ValueError, match=r"world_size 2 x learner.micro_batch_size 3, got 8"):
        LearnerGroup(section, model_folder=model_folder, rollouts_per_step=8, num_steps=1, namespace="tests")


def test_a_model_folder_that_is_missing_is_told_in_the_first_line(ray_cluster: str, tmp_path: Path) -> None:
    with pytest.raises(LearnerError) as failure, learner(make_section(), str(tmp_path / "nothing")):
        pass
    first_line = str(failure.value).splitlines()[0]
    assert first_line.startswith("learner-0 failed to start: ")
    assert "nothing" in first_line
