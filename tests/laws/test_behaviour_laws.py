"""What each behaviour policy's law is, against the formulas of its paper in float64. Seconds."""

import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from actors.behaviours import BlendedBehaviour, FixedBeta, InterleavedInjection, StudentAlone, TrustRegion
from actors.config import (
    FixedBetaSection,
    InterleavedInjectionSection,
    RolloutsSection,
    TemperatureWarmupSection,
    TrustRegionSection,
)
from actors.head import Decoding
from orchestrator.schedules import behaviour_plan


def laws(seed: int, rows: int, vocab: int) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    logits = torch.randn(2, rows, vocab, dtype=torch.float64, generator=generator) * 2
    student, teacher = torch.log_softmax(logits, -1)
    return student, teacher


@settings(max_examples=50, deadline=None)
@given(seed=st.integers(0, 2**32 - 1), vocab=st.integers(2, 40), top_k=st.integers(1, 45), tau=st.floats(0.2, 2))
def test_injection_keeps_what_the_teacher_ranks_high_and_redraws_the_rest(
    seed: int, vocab: int, top_k: int, tau: float
) -> None:
    student, teacher = laws(seed, 3, vocab)
    mu = InterleavedInjection(top_k=top_k, temperature=tau).target(student, teacher)
    for row in range(3):
        p, q = student[row].exp().numpy(), teacher[row].numpy()
        ranked = set(np.argsort(-q)[:top_k].tolist())
        redrawn = np.exp(q / tau) / np.exp(q / tau).sum()
        outside = sum(p[i] for i in range(vocab) if i not in ranked)
        expected = np.array([(p[i] if i in ranked else 0.0) + outside * redrawn[i] for i in range(vocab)])
        np.testing.assert_allclose(mu.logprobs[row].exp().numpy(), expected, atol=1e-12)
    assert mu.beta.isnan().all()
    if top_k >= vocab:
        np.testing.assert_allclose(mu.logprobs, student, atol=1e-9)


@pytest.mark.parametrize(
    "behaviour",
    [TrustRegion(epsilon=0.03), FixedBeta(beta=0.3), InterleavedInjection(top_k=3, temperature=0.6)],
    ids=lambda behaviour: type(behaviour).__name__,
)
def test_the_divergences_that_are_reported_are_those_of_the_law(behaviour: BlendedBehaviour) -> None:
    student, teacher = laws(5, 20, 30)
    mu = behaviour.target(student, teacher)
    np.testing.assert_allclose(mu.logprobs.exp().sum(-1), 1.0, atol=1e-12)
    for reported, law in ((mu.divergence, student), (mu.teacher_divergence, teacher)):
        np.testing.assert_allclose(reported, (mu.logprobs.exp() * (mu.logprobs - law)).sum(-1), atol=1e-9)
    assert 0 < behaviour.expected_acceptance < 1


def test_a_fixed_beta_is_the_geometric_mean_at_that_weight() -> None:
    student, teacher = laws(1, 4, 10)
    expected = torch.log_softmax(0.75 * student + 0.25 * teacher, -1)
    np.testing.assert_allclose(FixedBeta(beta=0.25).target(student, teacher).logprobs, expected, atol=1e-12)
    assert math.isnan(FixedBeta(beta=0.25).epsilon)


def test_the_acceptance_of_a_budget_is_pinskers() -> None:
    student, teacher = laws(2, 200, 12)
    for epsilon in (0.001, 0.02, 0.3):
        mu = TrustRegion(epsilon=epsilon).target(student, teacher).logprobs
        accepted = torch.minimum(mu.exp(), student.exp()).sum(-1)
        assert (accepted >= TrustRegion(epsilon=epsilon).expected_acceptance - 1e-12).all()


ROLLOUTS = RolloutsSection(top_p=0.9)
ALONE = StudentAlone(decoding=Decoding(top_p=0.9))


def test_every_plan_ends_with_the_student_alone() -> None:
    linear = behaviour_plan(TrustRegionSection(epsilon=0.02, warmup_steps=4), ROLLOUTS)
    budgets = [0.02, 0.015, 0.01, 0.005]
    assert [linear(step) for step in range(6)] == [*(TrustRegion(epsilon=e) for e in budgets), ALONE, ALONE]
    constant = behaviour_plan(TrustRegionSection(epsilon=0.02, schedule="constant", warmup_steps=4), ROLLOUTS)
    assert constant(1000) == TrustRegion(epsilon=0.02)
    beta = behaviour_plan(FixedBetaSection(beta=0.2, warmup_steps=2), ROLLOUTS)
    assert [beta(0), beta(1), beta(2)] == [FixedBeta(beta=0.2), FixedBeta(beta=0.2), ALONE]
    skd = behaviour_plan(InterleavedInjectionSection(top_k=15, temperature=0.2), ROLLOUTS)
    assert skd(0) == skd(500) == InterleavedInjection(top_k=15, temperature=0.2)
    assert behaviour_plan(None, ROLLOUTS)(0) == ALONE
    assert behaviour_plan(TrustRegionSection(epsilon=0.0), ROLLOUTS)(0) == ALONE


def test_a_temperature_warmup_goes_linearly_to_one() -> None:
    plan = behaviour_plan(TemperatureWarmupSection(start=0.8, warmup_steps=4), RolloutsSection())
    temperatures = []
    for step in range(6):
        behaviour = plan(step)
        assert isinstance(behaviour, StudentAlone)
        temperatures.append(behaviour.decoding.temperature)
    np.testing.assert_allclose(temperatures, [0.8, 0.85, 0.9, 0.95, 1.0, 1.0])
    assert plan(5) == StudentAlone()
