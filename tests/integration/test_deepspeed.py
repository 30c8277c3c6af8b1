"""The DeepSpeed learner against plain torch, over Ray actors, on a Qwen3 of 4 thousand random weights."""

import math
import re
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import ray
import torch
from torch import Tensor
from torch.nn.utils import parametrize
from transformers import AutoModelForCausalLM, Qwen3Config, Qwen3ForCausalLM

from actors.experience import Completion, Prompt, Rollout, TeacherScores, rollouts_to_arrow
from actors.head import Head
from actors.weights import PolicyWeights, read_weights
from learner.batcher import Batcher, TrainBatch
from learner.config import (
    DistillationObjective,
    DistillationSection,
    LearnerSection,
    LoraSection,
    Objective,
    PolicyGradientObjective,
)
from learner.errors import LearnerError, NonFiniteLossError
from learner.group import LearnerGroup
from learner.learning_rate import learning_rate_factor
from learner.lora import add_adapters
from learner.rank import LearnerRank, StepReport
from rewards.grade import Grade, Status
from rewards.grader_actor import summary, with_grades

pytestmark = pytest.mark.ray

NUM_DRAWABLE = 11
"""The ids that are ever drawn; the one after them is a second stop token, then comes one of padding."""
NUM_ROLLOUTS = 8
NUM_STEPS = 10
HEAD = Head(stop_token_ids=(2, NUM_DRAWABLE), vocab_size=NUM_DRAWABLE + 1)
MAX_NEW_TOKENS = 5
DISTIL_PART = DistillationSection(support_size=NUM_DRAWABLE + 1)
DISTIL = DistillationObjective(support_size=NUM_DRAWABLE + 1)
LORA = {"lora": LoraSection(rank=2)}
REFERENCED = PolicyGradientObjective(method="dr_grpo", kl_coef=0.3)
REINFORCE = PolicyGradientObjective(method="grpo", focal_gamma=0.5)


def tiny_config(*, tied: bool) -> Qwen3Config:
    return Qwen3Config(
        vocab_size=NUM_DRAWABLE + 2,
        hidden_size=16,
        intermediate_size=32,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=1,
        head_dim=8,
        max_position_embeddings=32,
        tie_word_embeddings=tied,
        initializer_range=0.2,
    )


@pytest.fixture(scope="module")
def model_folder(tmp_path_factory: pytest.TempPathFactory) -> str:
    """A student with random weights; large ones, so that its laws are far from uniform."""
    torch.manual_seed(0)
    folder = tmp_path_factory.mktemp("student")
    Qwen3ForCausalLM(tiny_config(tied=True)).save_pretrained(folder)
    (folder / "tokenizer.json").write_text("{}", encoding="utf-8")
    return str(folder)


def make_rollouts(step: int) -> list[Rollout]:
    """Eight rollouts of four prompts, of uneven lengths, with random laws of sampler and teacher and random grades."""
    random = np.random.default_rng(step)

    def random_laws(num_positions: int) -> np.ndarray[Any, Any]:
        logits = torch.from_numpy(random.normal(size=(num_positions, NUM_DRAWABLE)))
        second_stop = np.full((num_positions, 1), -np.inf)
        return np.concatenate([logits.log_softmax(-1).numpy(), second_stop], axis=1).astype(np.float32)

    rollouts = []
    for i in range(NUM_ROLLOUTS):
        num_tokens = int(random.integers(1, MAX_NEW_TOKENS + 1))
        laws = random_laws(num_tokens)
        token_ids = random.integers(NUM_DRAWABLE, size=num_tokens).astype(np.int32)
        order = np.argsort(-laws, axis=1).astype(np.int32)
        chosen = np.take_along_axis(laws, token_ids[:, None], axis=1)[:, 0]
        rollouts.append(
            Rollout(
                prompt=Prompt(
                    prompt_id=f"{step}-{i // 2}",
                    text="",
                    token_ids=tuple(random.integers(NUM_DRAWABLE, size=1 + (i // 2) % 3).tolist()),
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
    return Batcher(objective=objective, max_new_tokens=MAX_NEW_TOKENS).pack(step, shards, summaries)[0]


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
        "start_timeout_s": 240.0,
    }
    return LearnerSection(**{**values, **more})


class RankHost:
    """A process that is one rank of one learner after another; the imports of each process take many seconds."""

    def address(self) -> tuple[str, int]:
        return LearnerRank.address(self)  # type: ignore[arg-type]

    def open(self, address: tuple[str, int], **arguments: Any) -> None:
        self._rank = LearnerRank(
            name="hosted", rollouts_per_step=NUM_ROLLOUTS, num_steps=NUM_STEPS, head=HEAD, **arguments
        )
        self._rank.connect(*address, one_machine=True)

    def call(self, method: str, *arguments: Any) -> Any:
        return getattr(self._rank, method)(*arguments)

    def first_moments(self) -> dict[str, Tensor]:
        """AdamW's mean of gradients, put together from all ranks; after one step a multiple of the gradient."""
        from deepspeed.utils import safe_get_full_optimizer_state

        parameters = self._rank._connected._model.named_parameters()
        return {name: safe_get_full_optimizer_state(parameter, "exp_avg").cpu() for name, parameter in parameters}


class Ranks:
    """The ranks of one learner in hosts."""

    def __init__(self, hosts: Sequence[Any], section: LearnerSection, model_folder: str, **more: Any) -> None:
        self._hosts = hosts
        _, port = ray.get(hosts[0].address.remote())
        arguments = {"section": section, "world_size": len(hosts), "model_folder": model_folder, **more}
        opened = [host.open.remote(("127.0.0.1", port), rank=i, **arguments) for i, host in enumerate(hosts)]
        ray.get(opened, timeout=240)

    def all(self, method: str, *arguments: Any) -> list[Any]:
        return list(ray.get([host.call.remote(method, *arguments) for host in self._hosts], timeout=60))

    def step(self, batch: TrainBatch) -> StepReport:
        reports: list[StepReport] = self.all("step", batch)
        assert all(report == reports[0] for report in reports), "all ranks report the same"
        return reports[0]

    def first_moments(self) -> dict[str, Tensor]:
        moments: dict[str, Tensor] = ray.get([host.first_moments.remote() for host in self._hosts], timeout=60)[0]
        return moments

    def weights(self, policy_version: int) -> dict[str, Tensor]:
        policy, *others = self.all("publish")
        assert others == [None] * len(others)
        assert policy.policy_version == policy_version
        return weights_of(policy)


OpenRanks = Callable[..., Ranks]


@pytest.fixture(scope="module")
def open_ranks(ray_cluster: str, model_folder: str) -> Iterator[OpenRanks]:
    """Yield what makes a new learner in processes that were ranks of an earlier one of the same world size."""
    environment = {"OMP_NUM_THREADS": "1", "DS_ACCELERATOR": "cpu"}
    host_class = ray.remote(RankHost).options(num_cpus=0.5, runtime_env={"env_vars": environment})
    hosts: dict[int, list[Any]] = {1: [host_class.remote()], 2: [host_class.remote(), host_class.remote()]}
    yield lambda section, **more: Ranks(hosts[section.world_size], section, model_folder, **more)
    for host in [*hosts[1], *hosts[2]]:
        ray.kill(host)


def weights_of(policy: PolicyWeights) -> dict[str, Tensor]:
    return {name: tensor.clone() for name, tensor in read_weights(policy)}


def largest_difference(one: dict[str, Tensor], other: dict[str, Tensor]) -> float:
    return max((one[name] - other[name]).abs().max().item() for name in one | other)


def same(one: dict[str, Tensor], other: dict[str, Tensor]) -> bool:
    return one.keys() == other.keys() and all(torch.equal(one[name], other[name]) for name in one)


def spoil(rollouts: list[Rollout], number: int) -> list[Rollout]:
    """Put a NaN into the teacher's log-probs of one rollout."""
    scores = rollouts[number].teacher
    assert scores is not None
    assert scores.teacher_logprobs is not None
    spoiled = scores.teacher_logprobs.copy()
    spoiled[0, 0] = math.nan
    rollouts[number] = replace(rollouts[number], teacher=replace(scores, teacher_logprobs=spoiled))
    return rollouts


@dataclass(frozen=True, kw_only=True)
class PlainStep:
    loss: float
    grad_norm: float
    learning_rate: float
    weights: dict[str, Tensor]
    first_moments: dict[str, Tensor]
    """AdamW's mean of the clipped gradients; empty with adapters."""


def plain_steps(section: LearnerSection, model_folder: str, batches: Sequence[TrainBatch]) -> list[PlainStep]:
    """The slow obvious twin: one process, one padded batch, the logits of all of it."""
    model = plain_model(model_folder, section.lora)
    reference = plain_model(model_folder, None)
    names = [name for name, _ in reference.named_parameters()]
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    optimizer = torch.optim.AdamW(
        trained, lr=section.learning_rate, betas=section.adam_betas, weight_decay=section.weight_decay
    )
    steps = []
    for number, batch in enumerate(batches):
        factor = learning_rate_factor(number, schedule="linear", warmup_steps=2, num_steps=NUM_STEPS)
        for parameters in optimizer.param_groups:
            parameters["lr"] = section.learning_rate * factor
        loss = plain_loss(model, reference, batch, section.objective)
        optimizer.zero_grad()
        loss.backward()
        grad_norm = torch.nn.utils.clip_grad_norm_(trained, section.grad_clip)
        optimizer.step()
        steps.append(
            PlainStep(
                loss=loss.item(),
                grad_norm=grad_norm.item(),
                learning_rate=section.learning_rate * factor,
                weights={name: weight_named(model, name).detach().clone() for name in names},
                first_moments={name: optimizer.state[p]["exp_avg"].clone() for name, p in model.named_parameters()}
                if section.lora is None
                else {},
            )
        )
    return steps


class LowRank(torch.nn.Module):
    """W -> W + scale B A."""

    def __init__(self, down: Tensor, up: Tensor, scale: float) -> None:
        super().__init__()
        self.down, self.up = torch.nn.Parameter(down.clone()), torch.nn.Parameter(up.clone())
        self._scale = scale

    def forward(self, weight: Tensor) -> Tensor:
        return weight + self._scale * self.up @ self.down


def plain_model(model_folder: str, lora: LoraSection | None) -> Any:
    """The student; with adapters that begin where the learner's do, but are computed without their library."""
    model = AutoModelForCausalLM.from_pretrained(model_folder, dtype=torch.float32)
    if lora is not None:
        adapted = AutoModelForCausalLM.from_pretrained(model_folder, dtype=torch.float32)
        add_adapters(adapted, lora)
        model.requires_grad_(False)
        for name, layer in adapted.named_modules():
            if hasattr(layer, "lora_A"):
                down, up = layer.lora_A["default"].weight.detach(), layer.lora_B["default"].weight.detach()
                change = LowRank(down, up, lora.alpha / lora.rank)
                parametrize.register_parametrization(model.get_submodule(name), "weight", change)
    return model


def weight_named(model: Any, name: str) -> Tensor:
    module, attribute = name.rsplit(".", 1)
    weight: Tensor = getattr(model.get_submodule(module), attribute)
    return weight


def plain_loss(model: Any, reference: Any, batch: TrainBatch, objective: Objective) -> Tensor:
    """The loss of a whole step, rollout by rollout from one padded batch."""
    rollouts = make_rollouts(batch.step)
    trained = [(r, float(a)) for r, a, t in zip(rollouts, batch.advantages, batch.trains, strict=True) if t]
    laws, reference_laws = (plain_laws(one, [rollout for rollout, _ in trained]) for one in (model, reference))
    num_tokens = sum(rollout.completion.num_tokens for rollout, _ in trained)
    total = torch.zeros((), dtype=torch.float64)
    for (rollout, advantage), logprobs, reference_logprobs in zip(trained, laws, reference_laws, strict=True):
        completion = rollout.completion
        if isinstance(objective, DistillationObjective):
            total = total + plain_kl(logprobs, rollout).sum() / num_tokens
            continue
        places = range(completion.num_tokens), completion.token_ids.tolist()
        log_ratios = logprobs[places] - torch.tensor(completion.behaviour_logprobs)
        if objective.method == "gspo":
            ratio = log_ratios.mean().exp()
            per_token = -torch.minimum(ratio * advantage, ratio.clamp(1 - 3e-4, 1 + 4e-4) * advantage)
            total = total + per_token / len(trained)
            continue
        ratios = log_ratios.exp()
        per_token = -torch.minimum(ratios * advantage, ratios.clamp(0.8, 1.2) * advantage)
        gaps = reference_logprobs[places].detach() - logprobs[places]
        per_token = per_token + objective.kl_coef * (gaps.exp() - gaps - 1)
        if objective.distillation is not None:
            per_token = per_token + objective.distillation_coef * plain_kl(logprobs, rollout)
        divisor = len(trained) * MAX_NEW_TOKENS if objective.method == "dr_grpo" else num_tokens
        total = total + per_token.sum() / divisor
    return total


def plain_laws(model: Any, rollouts: Sequence[Rollout]) -> list[Tensor]:
    """The laws [T, NUM_DRAWABLE] at each rollout's completion, float64, from one padded batch."""
    sequences = [torch.tensor([*r.prompt.token_ids, *r.completion.token_ids.tolist()]) for r in rollouts]
    tokens = torch.nn.utils.rnn.pad_sequence(sequences, batch_first=True)
    mask = torch.nn.utils.rnn.pad_sequence([torch.ones_like(sequence) for sequence in sequences], batch_first=True)
    wide = model(tokens, attention_mask=mask).logits[..., : HEAD.vocab_size].double().softmax(-1)
    both_stops = wide[..., [2, NUM_DRAWABLE]].sum(-1, keepdim=True)
    laws = torch.cat([wide[..., :2], both_stops, wide[..., 3:NUM_DRAWABLE]], dim=-1).log()
    return [
        law[len(rollout.prompt.token_ids) - 1 : len(sequence) - 1]
        for law, rollout, sequence in zip(laws, rollouts, sequences, strict=True)
    ]


def plain_kl(logprobs: Tensor, rollout: Rollout) -> Tensor:
    """KL(student || teacher) [T] from laws [T, NUM_DRAWABLE]."""
    assert rollout.teacher is not None
    assert rollout.teacher.teacher_logprobs is not None
    ids = torch.tensor(rollout.teacher.support_ids.astype(np.int64))
    teacher = torch.empty(ids.shape).scatter(-1, ids, torch.tensor(rollout.teacher.teacher_logprobs))
    return (logprobs.exp() * (logprobs - teacher[:, :NUM_DRAWABLE])).sum(-1)


def assert_learns_the_same(ranks: Ranks, section: LearnerSection, model_folder: str) -> None:
    """Take all steps and compare with plain torch's."""
    batches = [make_batch(step, section.objective) for step in range(NUM_STEPS)]
    expected = plain_steps(section, model_folder, batches)
    for number, (batch, plain) in enumerate(zip(batches, expected, strict=True)):
        report = ranks.step(batch)
        assert report.policy_version == number + 1
        assert report.num_tokens == batch.num_tokens
        assert report.loss == pytest.approx(plain.loss, rel=1e-4, abs=1e-5)
        assert report.grad_norm == pytest.approx(plain.grad_norm, rel=1e-5 if number == 0 else 1e-3)
        assert report.learning_rate == pytest.approx(plain.learning_rate)
        if number == 0 and section.lora is None:
            moments = ranks.first_moments()
            largest = max(float(moment.abs().max()) for moment in plain.first_moments.values())
            assert largest_difference(moments, plain.first_moments) < 1e-5 * largest, "the averaged gradient"
        if section.objective is DISTIL:
            assert report.metrics["kl_to_teacher"] == pytest.approx(report.loss, rel=1e-4)
    weights = ranks.weights(NUM_STEPS)
    assert largest_difference(weights, expected[-1].weights) < 5e-5
    assert largest_difference(weights, expected[0].weights) > 1e-3, "the steps move more than the tolerance"


@pytest.mark.parametrize("stage", [1, 2, 3])
@pytest.mark.parametrize("world_size", [1, 2])
@pytest.mark.parametrize(
    ("micro_batch_size", "packing"), [(1, True), (4, True), (4, False)], ids=["alone", "packed", "padded"]
)
def test_every_stage_world_size_and_split_learns_what_plain_torch_learns(
    open_ranks: OpenRanks, model_folder: str, stage: int, world_size: int, micro_batch_size: int, packing: bool
) -> None:
    section = make_section(stage=stage, world_size=world_size, micro_batch_size=micro_batch_size, packing=packing)
    assert_learns_the_same(open_ranks(section), section, model_folder)


@pytest.mark.parametrize(
    "objective",
    [
        REINFORCE,
        PolicyGradientObjective(method="gspo"),
        REFERENCED,
        PolicyGradientObjective(method="grpo", distillation=DISTIL_PART, distillation_coef=0.7),
    ],
    ids=["grpo", "gspo", "dr_grpo with a reference", "grpo with a teacher"],
)
def test_every_objective_learns_what_plain_torch_learns(
    open_ranks: OpenRanks, model_folder: str, objective: Objective
) -> None:
    # One rollout at a time: of a lost one, a micro-batch without a token.
    section = make_section(objective=objective, stage=3, world_size=2, micro_batch_size=1)
    assert_learns_the_same(open_ranks(section), section, model_folder)


@pytest.mark.parametrize("stage", [1, 2, 3])
def test_an_offloaded_optimizer_learns_the_same(open_ranks: OpenRanks, model_folder: str, stage: int) -> None:
    section = make_section(stage=stage, world_size=2, micro_batch_size=2, offload_optimizer="cpu")
    assert_learns_the_same(open_ranks(section), section, model_folder)


@pytest.mark.parametrize("stage", [1, 2, 3])
def test_merged_adapters_are_what_plain_torch_learns(open_ranks: OpenRanks, model_folder: str, stage: int) -> None:
    pytest.importorskip("peft")
    objective = DISTIL if stage == 1 else REFERENCED
    section = make_section(
        objective=objective,
        stage=stage,
        world_size=2,
        micro_batch_size=2,
        activation_checkpointing=stage == 2,
        learning_rate=3e-3,
        **LORA,
    )
    assert_learns_the_same(open_ranks(section), section, model_folder)


def test_the_hidden_signal_is_the_full_law(open_ranks: OpenRanks, tmp_path: Path) -> None:
    torch.manual_seed(1)
    teacher = Qwen3ForCausalLM(tiny_config(tied=False))
    teacher.save_pretrained(tmp_path)
    random = np.random.default_rng(0)
    told, hidden = make_rollouts(0), make_rollouts(0)
    for i, rollout in enumerate(told):
        num_tokens = rollout.completion.num_tokens
        states = random.normal(size=(num_tokens, 16)).astype(np.float32)
        with torch.no_grad():
            law = HEAD.logprobs(teacher.lm_head(torch.from_numpy(states))).numpy()
        assert rollout.teacher is not None
        order = np.asarray(rollout.teacher.support_ids, np.int64)
        scores = replace(rollout.teacher, teacher_logprobs=np.take_along_axis(law, order, axis=1))
        told[i] = replace(rollout, teacher=scores)
        hidden[i] = replace(rollout, teacher=None, teacher_hidden=states)
    section = make_section(stage=3, world_size=2, micro_batch_size=2)
    reports = [
        open_ranks(section, signal=signal, teacher_folder=str(tmp_path)).step(make_batch(0, DISTIL, rollouts))
        for signal, rollouts in (("full", told), ("hidden", hidden))
    ]
    assert reports[1].loss == pytest.approx(reports[0].loss, rel=1e-5)
    assert reports[1].grad_norm == pytest.approx(reports[0].grad_norm, rel=1e-5)


@pytest.mark.parametrize(
    ("stage", "world_size", "dtype", "more"),
    [
        (1, 2, "float32", {}),
        (2, 1, "bfloat16", {}),
        (3, 2, "float32", {}),
        (1, 1, "bfloat16", LORA),
        (3, 2, "float32", LORA),
        (2, 2, "float32", {"offload_optimizer": "cpu"}),
    ],
    ids=str,
)
def test_a_refused_step_changes_nothing_and_a_checkpoint_continues_the_same(
    open_ranks: OpenRanks,
    model_folder: str,
    tmp_path: Path,
    stage: int,
    world_size: int,
    dtype: str,
    more: dict[str, Any],
) -> None:
    section = make_section(stage=stage, world_size=world_size, micro_batch_size=2, dtype=dtype, **more)
    checkpoint = str(tmp_path / "checkpoint")
    ranks = open_ranks(section)
    for step in range(2):
        ranks.step(make_batch(step, DISTIL))
    ranks.all("save", checkpoint, {"position": 17})
    before = ranks.weights(2)

    refusal = r"the loss of prompt_id/sample_index 2-2/1 was not;.* version 2 "
    with pytest.raises(NonFiniteLossError, match=refusal) as error:
        ranks.step(make_batch(2, DISTIL, spoil(make_rollouts(2), 5)))
    assert error.value.cause.rollouts == (("2-2", 1),)
    assert same(ranks.weights(2), before)

    later = [ranks.step(make_batch(step, DISTIL)) for step in (2, 3)]
    after = ranks.weights(4)
    assert {str(tensor.dtype) for tensor in after.values()} == {f"torch.{dtype}"}
    ranks.all("save_hf", str(tmp_path / "hf"))

    # The refused step is not in this history, so equality also says that it left no trace in the optimizer.
    ranks = open_ranks(section)
    assert ranks.all("load", checkpoint) == [{"position": 17}] * world_size
    assert [ranks.step(make_batch(step, DISTIL)) for step in (2, 3)] == later
    assert same(ranks.weights(4), after)

    reloaded = AutoModelForCausalLM.from_pretrained(tmp_path / "hf", dtype="auto")
    assert same({name: p.detach() for name, p in reloaded.named_parameters()}, after)
    assert (tmp_path / "hf" / "tokenizer.json").is_file()


def test_a_checkpoint_is_refused_by_another_world_size_and_by_adapters(open_ranks: OpenRanks, tmp_path: Path) -> None:
    ranks = open_ranks(make_section(world_size=1))
    ranks.all("save", str(tmp_path / "checkpoint"), {})
    with pytest.raises(FileNotFoundError, match=r"must hold learner.json, got none in"):
        ranks.all("load", str(tmp_path))
    pytest.importorskip("peft")
    with pytest.raises(
        ValueError, match=r"lora must be as it was when the checkpoint was written, None, got {'rank': 2"
    ):
        open_ranks(make_section(world_size=1, **LORA)).all("load", str(tmp_path / "checkpoint"))
    with pytest.raises(ValueError, match=r"world_size must be as it was when the checkpoint was written, 1, got 2"):
        open_ranks(make_section(world_size=2)).all("load", str(tmp_path / "checkpoint"))


@pytest.mark.parametrize("stage", [1, 3])
def test_a_batch_that_is_masked_whole_moves_nothing_and_reports_zeros(open_ranks: OpenRanks, stage: int) -> None:
    objective = PolicyGradientObjective(method="gspo", truncated="mask", kl_coef=0.1)
    ranks = open_ranks(make_section(stage=stage, world_size=2, objective=objective, weight_decay=0.0))
    before = ranks.weights(0)
    cut_off = [
        replace(rollout, completion=replace(rollout.completion, finish_reason="length")) for rollout in make_rollouts(0)
    ]
    report = ranks.step(make_batch(0, objective, cut_off))
    assert report.num_tokens == report.loss == report.grad_norm == 0
    assert set(report.metrics.values()) == {0.0}
    assert same(ranks.weights(1), before)


def test_recomputed_activations_change_nothing(open_ranks: OpenRanks) -> None:
    kept, recomputed = (
        open_ranks(make_section(stage=3, activation_checkpointing=value)).step(make_batch(0, DISTIL))
        for value in (False, True)
    )
    assert recomputed == kept


def test_a_group_learns_survives_a_refused_step_and_dies_with_its_first_rank(
    ray_cluster: str, model_folder: str
) -> None:
    section = make_section(world_size=2, micro_batch_size=2)
    with LearnerGroup(
        section,
        model_folder=model_folder,
        rollouts_per_step=NUM_ROLLOUTS,
        num_steps=NUM_STEPS,
        namespace="tests",
        head=HEAD,
    ) as group:
        first = group.publish()
        assert group.step(make_batch(0, DISTIL)).policy_version == 1
        second = group.publish()
        assert not same(weights_of(first), weights_of(second))
        with pytest.raises(NonFiniteLossError, match="2-2/1") as refused:
            group.step(make_batch(2, DISTIL, spoil(make_rollouts(2), 5)))
        assert refused.value.rollouts == (("2-2", 1),)
        assert same(weights_of(group.publish()), weights_of(second))
        assert group.step(make_batch(1, DISTIL)).policy_version == 2
        ray.kill(ray.get_actor("learner-1", namespace="tests"))
        with pytest.raises(LearnerError) as failure:
            group.step(make_batch(2, DISTIL))
        assert str(failure.value).splitlines()[0].startswith("learner-1 failed to step: ActorDiedError")
        with pytest.raises(ValueError, match="learner-0"):
            ray.get_actor("learner-0", namespace="tests")
        with pytest.raises(LearnerError, match="ranks are gone; cannot publish"):
            group.publish()


def test_a_model_folder_that_is_missing_is_told_in_the_first_line(ray_cluster: str, tmp_path: Path) -> None:
    with pytest.raises(LearnerError) as failure:
        LearnerGroup(
            make_section(),
            model_folder=str(tmp_path / "nothing"),
            rollouts_per_step=8,
            num_steps=1,
            namespace="tests",
            head=HEAD,
        )
    assert re.match(r"learner-0 failed to start: .*nothing", str(failure.value).splitlines()[0])


def test_ranks_that_take_too_long_are_stopped(ray_cluster: str, model_folder: str) -> None:
    hurried = make_section(start_timeout_s=0.01)
    with pytest.raises(LearnerError, match=r"start must end within 0.01 s, but learner-0 had not"):
        LearnerGroup(hurried, model_folder=model_folder, rollouts_per_step=8, num_steps=1, namespace="tests", head=HEAD)


def test_a_batch_that_does_not_divide_over_the_ranks_is_refused_before_any_rank_starts(model_folder: str) -> None:
    section = make_section(world_size=2, micro_batch_size=3)
    with pytest.raises(ValueError, match=r"world_size 2 x learner.micro_batch_size 3, got 8"):
        LearnerGroup(section, model_folder=model_folder, rollouts_per_step=8, num_steps=1, namespace="tests", head=HEAD)
