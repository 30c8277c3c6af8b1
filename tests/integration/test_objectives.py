"""Whole runs with objectives that no recipe shows: what the learner reports is what the rollouts are worth."""

import json
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import pytest
import torch
from torch import Tensor
from transformers import AutoModelForCausalLM

from actors.experience import Rollout, rollouts_from_arrow
from learner.tiny_models import tiny_folder
from tests.exact_laws import laws_along
from tests.integration.test_run import COUNTDOWN, QUICKSTART, command, finished, lines, run, timeless, wait_until

pytestmark = [pytest.mark.ray, pytest.mark.timeout(600)]

FEW = (
    "rollouts.prompts_per_step=8", "learner.micro_batch_size=4", "training.num_steps=2", "evaluation.num_prompts=0",
    "checkpoints.every_steps=0", "blending.warmup_steps=1", "learner.warmup_steps=1",
)  # fmt: skip
"""Two steps, the first of them blended."""


def rollouts_of(folder: Path, step: int) -> list[Rollout]:
    table = pq.read_table(folder / "rollouts" / f"step_{step:06d}.parquet")
    return [rollout for batch in table.to_batches() for rollout in rollouts_from_arrow(batch)]


def both_laws(rollouts: list[Rollout], teacher: str = "addition-teacher") -> tuple[Tensor, Tensor]:
    """Log-probs [N, V] of student and teacher at every token, in float64, before the first step."""
    models = [
        AutoModelForCausalLM.from_pretrained(tiny_folder(name), dtype=torch.float64)
        for name in ("addition-student", teacher)
    ]
    student, teachers = (
        torch.cat([laws_along(model, r.prompt.token_ids, r.completion.token_ids) for r in rollouts]) for model in models
    )
    return student, teachers


def kl(p: Tensor, q: Tensor) -> Tensor:
    return (p.exp() * (p - q)).sum(-1)


def forward_kl(student: Tensor, teacher: Tensor) -> Tensor:
    return kl(teacher, student)


def jensen_shannon(student: Tensor, teacher: Tensor) -> Tensor:
    mixture = ((student.exp() + teacher.exp()) / 2).log()
    return (kl(teacher, mixture) + kl(student, mixture)) / 2


def on_both_supports(student: Tensor, teacher: Tensor, size: int) -> tuple[Tensor, Tensor]:
    """The laws over the student's likeliest ids, as many of the teacher's that are not among them, and all others."""
    ours = student.topk(size).indices
    theirs = teacher.scatter(-1, ours, -torch.inf).topk(size).indices
    ids = torch.cat([ours, theirs], -1)
    coarse = [
        torch.cat([law.gather(-1, ids), law.scatter(-1, ids, -torch.inf).logsumexp(-1, keepdim=True)], -1)
        for law in (student, teacher)
    ]
    return coarse[0], coarse[1]


@pytest.mark.parametrize(
    ("objective", "overrides", "divergence"),
    [
        ("{divergence: jsd, signal: hidden}", [], jensen_shannon),
        ("{divergence: forward_kl, signal: full}", ["blending=null", "rollouts.max_staleness=1"], forward_kl),
        ("{support: union, support_size: 4, tail: true}", ["blending.layout=one_engine"],
         lambda s, t: kl(*on_both_supports(s, t, 4))),
    ],
    ids=["jsd-of-hidden-states", "forward-kl-asynchronous", "union-in-one-engine"],
)  # fmt: skip
def test_the_loss_of_the_first_step_is_the_divergence_of_both_models_where_the_rollouts_went(
    ray_cluster: str, tmp_path: Path, objective: str, overrides: list[str], divergence: object
) -> None:
    assert callable(divergence)
    typed = objective.replace("{", "{type: distillation, ")
    folder, output = run(QUICKSTART, tmp_path, *FEW, *overrides, f"learner.objective={typed}", address=ray_cluster)
    assert "teacher signal: " in output
    student, teacher = both_laws(rollouts_of(folder, 0))
    first, second = lines(folder / "metrics.jsonl")
    assert first["loss/mean"] == pytest.approx(divergence(student, teacher).mean().item(), rel=1e-4)
    assert second["learner/policy_version"] == 2
    assert not {"teacher_hidden", "learned_logprobs"} & set(
        pq.read_schema(folder / "rollouts" / "step_000000.parquet").names
    )


def test_a_student_that_is_its_teacher_has_nothing_to_learn(ray_cluster: str, tmp_path: Path) -> None:
    folder, _ = run(
        QUICKSTART, tmp_path, *FEW, "teachers.model=tiny:addition-student", "training.num_steps=1",
        "learner.objective={type: distillation, signal: hidden}", address=ray_cluster,
    )  # fmt: skip
    (line,) = lines(folder / "metrics.jsonl")
    assert abs(line["loss/mean"]) < 1e-6
    assert line["learner/grad_norm"] < 1e-5


def test_rewards_and_a_teacher_in_one_run_with_adapters_and_a_reference(ray_cluster: str, tmp_path: Path) -> None:
    objective = (
        "{type: policy_gradient, method: gspo, focal_gamma: 1.0, focal_while_blending: 'on', kl_coef: 0.1, "
        "correction: {type: mask, level: sequence, low: 0.1, high: 10.0}, "
        "distillation: {signal: hidden}, distillation_coef: 0.5}"
    )
    folder, output = run(
        QUICKSTART, tmp_path, *FEW, "rollouts.group_size=4", "learner.micro_batch_size=8", "learner.lora={rank: 4}",
        f"learner.objective={objective}", address=ray_cluster,
    )  # fmt: skip
    assert "focal_gamma 1 makes the mean update 0.5 times as large" in output
    first, second = lines(folder / "metrics.jsonl")
    student, teacher = both_laws(rollouts_of(folder, 0))
    assert first["loss/divergence"] == pytest.approx(kl(student, teacher).mean().item(), rel=1e-4)
    assert abs(first["loss/kl_to_reference"]) < 1e-6
    assert second["loss/kl_to_reference"] > 1e-6, "the merged adapters have moved the policy"
    rates = np.array([r.grade.reward for r in rollouts_of(folder, 0) if r.grade is not None]).reshape(8, 4).mean(1)
    assert first["reward/focal_weight"] == pytest.approx((1 - rates).mean(), abs=1e-6)


def test_dynamic_sampling_learns_from_groups_that_differ_and_counts_the_others(
    ray_cluster: str, tmp_path: Path
) -> None:
    overrides = (
        "training.num_steps=2", "evaluation.num_prompts=0", "rollouts.prompts_per_step=8", "rollouts.group_size=4",
        "learner.micro_batch_size=16", "rollouts.dynamic_sampling={max_refills: 2}", "learner.objective.method=dapo",
        "learner.objective.overlong={buffer_tokens: 8}",
    )  # fmt: skip
    folder, _ = run(COUNTDOWN, tmp_path / "a", *overrides, address=ray_cluster)
    for step, line in enumerate(lines(folder / "metrics.jsonl")):
        rollouts = rollouts_of(folder, step)
        rewards = np.array([r.grade.reward for r in rollouts if r.grade is not None]).reshape(-1, 4)
        differ = rewards.min(1) < rewards.max(1)
        assert len({(r.prompt.prompt_id, r.sample_index) for r in rollouts}) == len(rollouts)
        assert line["sampling/groups"] == len(differ) > 8
        assert line["sampling/groups_missing"] == max(0, 8 - differ.sum())
        assert line["sampling/groups_surplus"] == max(0, differ.sum() - 8)
        assert line["sampling/groups_dropped"] == (~differ).sum() - line["sampling/groups_missing"]
        assert line["reward/zero_variance_groups"] == 0
    again, _ = run(COUNTDOWN, tmp_path / "b", *overrides, address=ray_cluster)
    assert timeless(folder / "metrics.jsonl") == timeless(again / "metrics.jsonl")


def test_a_step_in_which_no_group_differs_goes_on(ray_cluster: str, tmp_path: Path) -> None:
    overrides = (
        "training.num_steps=2", "evaluation.num_prompts=0", "rollouts.prompts_per_step=2", "rollouts.group_size=2",
        "learner.micro_batch_size=4", "rollouts.dynamic_sampling={max_refills: 1}", "rollouts.max_new_tokens=1",
    )  # fmt: skip
    folder, _ = run(COUNTDOWN, tmp_path, *overrides, address=ray_cluster)
    for line in lines(folder / "metrics.jsonl"):
        assert line["reward/pass_rate"] == 0, "one token is no answer"
        assert line["sampling/groups_missing"] == 2
        assert line["sampling/refills"] == 1
        assert sum(v for k, v in line.items() if k.startswith("reward/status/")) == 2 * line["sampling/groups"]
        assert line["learner/grad_norm"] == 0


def test_what_changes_from_step_to_step_goes_on_after_a_stop(ray_cluster: str, tmp_path: Path) -> None:
    """Dynamic sampling's prompts, Veto's weight and the fine-tuning before it, killed between two checkpoints."""
    recipes = {
        "dapo": (COUNTDOWN, "rollouts.prompts_per_step=8", "rollouts.group_size=4",
                 "rollouts.dynamic_sampling={max_refills: 1}", "learner.objective.method=dapo"),
        "veto": (QUICKSTART, "rollouts.prompts_per_step=16", "blending={type: fixed_beta, beta: 1, warmup_steps: 2}",
                 "learner.objective={type: distillation, signal: full, veto: {beta: 0.5}, sft_warmup_steps: 2}"),
    }  # fmt: skip
    common = ("training.num_steps=6", "evaluation.num_prompts=0", "learner.micro_batch_size=16",
              "checkpoints.every_steps=2")  # fmt: skip
    for name, (recipe, *overrides) in recipes.items():
        straight, _ = run(recipe, tmp_path / name, *common, *overrides, address=ray_cluster)
        folder = tmp_path / f"{name}-killed"
        process = command("train", recipe, f"training.folder={folder}", *common, *overrides, address=ray_cluster)
        wait_until(lambda folder=folder: any(len(lines(f)) >= 3 for f in folder.glob("*/metrics.jsonl")), process)
        process.kill()
        process.communicate()
        (killed,) = folder.iterdir()
        finished(command("resume", str(killed), address=ray_cluster))
        assert timeless(killed / "metrics.jsonl") == timeless(straight / "metrics.jsonl")


def test_a_step_that_cannot_be_applied_names_its_rollouts_in_the_run_folder(ray_cluster: str, tmp_path: Path) -> None:
    process = command(
        "train", COUNTDOWN, f"training.folder={tmp_path}", "training.num_steps=2", "evaluation.num_prompts=0",
        "learner.objective.method=dr_grpo", "learner.objective.reward_correct=3.4e+38",
        "learner.objective.reward_wrong=-3.4e+38", address=ray_cluster,
    )  # fmt: skip
    output, errors = process.communicate(timeout=500)
    assert process.returncode == 1, output + errors
    assert "Traceback" not in errors
    (folder,) = tmp_path.iterdir()
    refused = json.loads((folder / "refused" / "step_000000.json").read_text())
    assert str(folder / "refused" / "step_000000.json") in errors
    assert "loss and gradient must be finite" in errors
    rollouts = {(r.prompt.prompt_id, r.sample_index) for r in rollouts_of(folder, 0)}
    named = {(each["prompt_id"], each["sample_index"]) for each in refused["rollouts"]}
    assert named
    assert named <= rollouts
