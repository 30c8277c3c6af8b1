"""Which loss each step of a run minimises."""

import pickle
from typing import Any

import pytest
import torch

from actors.head import Head
from learner.config import DistillationObjective, DistillationSection, Objective, PolicyGradientObjective, VetoSection
from learner.distillation import FullDistillation, SampledReverseKL, SupervisedFineTuning, SupportDistillation
from learner.errors import NonFiniteLossError
from learner.losses import WeightedSum
from learner.objective import LossPlan
from learner.policy_losses import build_policy_loss
from learner.tiles import OutputHead

TEACHER_HEAD = OutputHead(weight=torch.zeros(100, 2), head=Head(stop_token_ids=()))


def make_plan(objective: Objective, **more: Any) -> LossPlan:
    defaults = {"num_steps": 5, "signal": "support", "temperature": 1.0, "vocab_size": 100}
    return LossPlan(objective, **{**defaults, **more})


def test_the_weight_of_veto_falls_linearly_to_zero_at_the_last_step() -> None:
    plan = make_plan(DistillationObjective(veto=VetoSection(beta=0.8)))
    betas = []
    for step in range(6):
        loss = plan.at(step)
        assert isinstance(loss, SupportDistillation)
        betas.append(loss.veto_beta)
    assert betas == pytest.approx([0.8, 0.6, 0.4, 0.2, 0.0, 0.0])
    only = make_plan(DistillationObjective(veto=VetoSection(beta=0.8)), num_steps=1).at(0)
    assert isinstance(only, SupportDistillation)
    assert only.veto_beta == 0.8


def test_the_first_steps_of_a_warmup_are_supervised() -> None:
    plan = make_plan(DistillationObjective(sft_warmup_steps=2))
    assert [type(plan.at(step)) for step in range(3)] == [
        SupervisedFineTuning,
        SupervisedFineTuning,
        SupportDistillation,
    ]


def test_a_policy_gradient_is_alone_or_with_its_teacher() -> None:
    alone = PolicyGradientObjective(method="gspo", kl_coef=0.1)
    assert make_plan(alone, temperature=0.7).at(0) == build_policy_loss(alone)
    taught = PolicyGradientObjective(distillation=DistillationSection(tail=True), distillation_coef=0.3)
    loss = make_plan(taught).at(0)
    assert isinstance(loss, WeightedSum)
    (one, policy), (coefficient, divergence) = loss.parts
    assert (one, policy) == (1.0, build_policy_loss(taught))
    assert coefficient == 0.3
    assert isinstance(divergence, SupportDistillation)
    assert divergence.tail


@pytest.mark.parametrize(
    ("section", "signal", "expected"),
    [
        (DistillationSection(support_size=4), "support", 4),
        (DistillationSection(support_size=4, support="union"), "support", None),
        (DistillationSection(support_size=4, support="teacher"), "support", None),
        (DistillationSection(), "sampled", None),
        (DistillationSection(), "full", None),
        (DistillationSection(), "hidden", 0),
        (None, "support", 0),
    ],
)
def test_as_much_of_a_stored_support_is_taken_as_the_signal_says(
    section: DistillationSection | None, signal: str, expected: int | None
) -> None:
    plan = make_plan(PolicyGradientObjective(distillation=section), signal=signal, teacher_head=TEACHER_HEAD)
    assert plan.support_size == expected


def test_the_signal_decides_the_loss() -> None:
    assert isinstance(make_plan(DistillationObjective(), signal="sampled").at(0), SampledReverseKL)
    hidden = make_plan(DistillationObjective(), signal="hidden", teacher_head=TEACHER_HEAD).at(0)
    assert isinstance(hidden, FullDistillation)
    assert hidden.teacher is TEACHER_HEAD


def test_what_cannot_be_compared_with_a_teacher_is_refused() -> None:
    for objective in (DistillationObjective(), PolicyGradientObjective(distillation=DistillationSection())):
        with pytest.raises(ValueError, match=r"both laws at temperature 1\.0, got rollouts at 0\.7"):
            make_plan(objective, temperature=0.7)
        with pytest.raises(ValueError, match=r"hidden needs the teacher's folder with its output head, got none"):
            make_plan(objective, signal="hidden")


def test_a_refused_steps_rollouts_survive_pickling() -> None:
    error = pickle.loads(pickle.dumps(NonFiniteLossError("it was not finite", (("p", 1),))))
    assert str(error) == "it was not finite"
    assert error.rollouts == (("p", 1),)
