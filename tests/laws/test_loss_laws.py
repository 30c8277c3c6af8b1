"""Laws of the losses: their gradients are those of the plain formulas, in float64 by autograd."""

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from actors.head import Head
from learner.config import PolicyGradientObjective, ReverseKLObjective
from learner.losses import ClippedPolicyGradient, Loss, LossInputs, ReverseKL, build_loss

seeds = st.integers(0, 2**31 - 1)
lengths = st.integers(1, 4)


def make_inputs(
    seed: int, *, num_positions: int = 3, vocabulary_size: int = 7, support_size: int = 7, spread: float = 2.0
) -> LossInputs:
    """Two rollouts of random laws, the second one a token shorter; ids sorted by the student that was sampled."""
    random = torch.Generator().manual_seed(seed)
    shape = (2, num_positions, vocabulary_size)
    logits = (spread * torch.randn(shape, generator=random, dtype=torch.float64)).requires_grad_()
    teacher = (spread * torch.randn(shape, generator=random, dtype=torch.float64)).log_softmax(-1)
    sampled = logits.detach() + 0.3 * torch.randn(shape, generator=random, dtype=torch.float64)
    support_ids = sampled.argsort(dim=-1, descending=True)[..., :support_size]
    token_ids = torch.randint(vocabulary_size, shape[:2], generator=random)
    loss_mask = torch.ones(shape[:2], dtype=torch.bool)
    loss_mask[1, -1] = num_positions == 1
    return LossInputs(
        logits=logits,
        token_ids=token_ids,
        loss_mask=loss_mask,
        behaviour_logprobs=sampled.log_softmax(-1).gather(-1, token_ids[..., None])[..., 0],
        advantages=torch.randn(2, generator=random, dtype=torch.float64),
        support_ids=support_ids,
        support_teacher_logprobs=teacher.gather(-1, support_ids),
        support_teacher_tails=teacher.scatter(-1, support_ids, -math.inf).logsumexp(-1),
    )


def gradient(loss: Loss, inputs: LossInputs) -> Tensor:
    """Of the summed loss with respect to the logits."""
    return torch.autograd.grad(loss(inputs).per_token.sum(), inputs.logits)[0]


def exact_kl(inputs: LossInputs) -> Tensor:
    """KL(student || teacher) at each position, over the whole vocabulary."""
    assert inputs.support_ids is not None
    assert inputs.support_teacher_logprobs is not None
    teacher = torch.empty_like(inputs.logits).scatter(-1, inputs.support_ids, inputs.support_teacher_logprobs)
    student = inputs.logits.log_softmax(-1)
    return (student.exp() * (student - teacher)).sum(-1)


def changed(inputs: LossInputs, **values: object) -> LossInputs:
    fields = {name: getattr(inputs, name) for name in LossInputs.__dataclass_fields__}
    return LossInputs(**{**fields, **values})


@given(seed=seeds, num_positions=lengths)
def test_on_the_whole_vocabulary_reverse_kl_is_the_exact_kl(seed: int, num_positions: int) -> None:
    inputs = make_inputs(seed, num_positions=num_positions)
    masked = exact_kl(inputs).masked_fill(~inputs.loss_mask, 0)
    loss = ReverseKL(support_size=None)
    outputs = loss(inputs)
    assert torch.allclose(outputs.per_token, masked, atol=1e-12)
    assert torch.allclose(outputs.metrics["kl_to_teacher"], masked.sum(), atol=1e-12)
    assert torch.allclose(outputs.metrics["support_mass"], inputs.loss_mask.sum().double(), atol=1e-12)
    assert torch.allclose(gradient(loss, inputs), torch.autograd.grad(masked.sum(), inputs.logits)[0], atol=1e-10)


@given(seed=seeds, support_size=st.integers(1, 6), num_positions=lengths)
def test_on_a_truncated_support_reverse_kl_is_the_naive_surrogate(
    seed: int, support_size: int, num_positions: int
) -> None:
    inputs = make_inputs(seed, support_size=6, num_positions=num_positions)
    assert inputs.support_ids is not None
    assert inputs.support_teacher_logprobs is not None
    total = torch.zeros((), dtype=torch.float64)
    value = 0.0
    for row, position in inputs.loss_mask.nonzero().tolist():
        student = inputs.logits[row, position].log_softmax(-1)
        ids = inputs.support_ids[row, position, :support_size].tolist()
        mass = sum(student[i].exp().item() for i in ids)
        for rank, i in enumerate(ids):
            weight = student[i].exp().item() / mass
            log_ratio = student[i].item() - inputs.support_teacher_logprobs[row, position, rank].item()
            total = total + weight * log_ratio * student[i]
            value += weight * log_ratio
    loss = ReverseKL(support_size=support_size)
    assert loss(inputs).per_token.sum().item() == pytest.approx(value, abs=1e-10)
    assert torch.allclose(gradient(loss, inputs), torch.autograd.grad(total, inputs.logits)[0], atol=1e-10)


@given(seed=seeds, stored=st.integers(1, 6), support_size=st.integers(1, 6), num_positions=lengths)
def test_with_a_tail_it_is_the_exact_kl_of_both_laws_on_the_support_and_one_outcome_more(
    seed: int, stored: int, support_size: int, num_positions: int
) -> None:
    inputs, support_size = (
        make_inputs(seed, support_size=stored, num_positions=num_positions),
        min(support_size, stored),
    )
    assert inputs.support_ids is not None
    assert inputs.support_teacher_tails is not None
    assert inputs.support_teacher_logprobs is not None
    total = torch.zeros((), dtype=torch.float64)
    for row, position in inputs.loss_mask.nonzero().tolist():
        student = inputs.logits[row, position].softmax(-1)
        ids = inputs.support_ids[row, position, :support_size]
        teacher = inputs.support_teacher_logprobs[row, position, :support_size].exp()
        ours, theirs = (torch.cat([law, 1 - law.sum(0, keepdim=True)]) for law in (student[ids], teacher))
        total = total + (ours * (ours.log() - theirs.log())).sum()
    loss = ReverseKL(support_size=support_size, tail=True)
    assert loss(inputs).per_token.sum().item() == pytest.approx(total.item(), abs=1e-9)
    expected = torch.autograd.grad(total, inputs.logits)[0]
    assert torch.allclose(gradient(loss, inputs), expected, rtol=1e-5, atol=1e-9)


@given(seed=seeds)
def test_a_tail_of_nothing_changes_nothing(seed: int) -> None:
    inputs = make_inputs(seed)
    with_tail, without = (ReverseKL(support_size=None, tail=tail) for tail in (True, False))
    assert torch.equal(with_tail(inputs).per_token, without(inputs).per_token)
    assert torch.equal(gradient(with_tail, inputs), gradient(without, inputs))


def test_the_truncated_surrogate_is_not_the_gradient_of_the_truncated_sum() -> None:
    inputs = make_inputs(0, support_size=3)
    assert inputs.support_ids is not None
    assert inputs.support_teacher_logprobs is not None
    student = inputs.logits.log_softmax(-1).gather(-1, inputs.support_ids)
    truncated = (student.exp() * (student - inputs.support_teacher_logprobs)).sum(-1)[inputs.loss_mask].sum()
    naive = torch.autograd.grad(truncated, inputs.logits)[0]
    assert not torch.allclose(gradient(ReverseKL(support_size=3), inputs), naive, atol=1e-3)


@given(seed=seeds, support_size=st.integers(1, 7))
def test_a_student_that_equals_its_teacher_has_nothing_to_learn(seed: int, support_size: int) -> None:
    inputs = make_inputs(seed)
    assert inputs.support_ids is not None
    own = inputs.logits.detach().log_softmax(-1)
    tails = own.scatter(-1, inputs.support_ids, -math.inf).logsumexp(-1)
    same = changed(inputs, support_teacher_logprobs=own.gather(-1, inputs.support_ids), support_teacher_tails=tails)
    for loss in (ReverseKL(support_size=support_size), ReverseKL(support_size=support_size, tail=True)):
        assert loss(same).per_token.abs().max() < 1e-12
        assert gradient(loss, same).abs().max() < 1e-12


LOSSES = [
    ReverseKL(support_size=None),
    ReverseKL(support_size=3),
    ReverseKL(support_size=3, tail=True),
    ClippedPolicyGradient(),
]


@pytest.mark.parametrize("loss", LOSSES)
@given(seed=seeds)
def test_masked_tokens_have_neither_loss_nor_gradient_nor_metrics(loss: Loss, seed: int) -> None:
    inputs = make_inputs(seed)
    assert inputs.support_teacher_logprobs is not None
    hidden = ~inputs.loss_mask
    garbage = changed(
        inputs,
        behaviour_logprobs=inputs.behaviour_logprobs.masked_fill(hidden, math.nan),
        support_teacher_logprobs=inputs.support_teacher_logprobs.masked_fill(hidden[..., None], math.nan),
    )
    clean, spoiled = loss(inputs), loss(garbage)
    assert torch.equal(clean.per_token, spoiled.per_token)
    assert (spoiled.per_token[hidden] == 0).all()
    assert (gradient(loss, garbage)[hidden] == 0).all()
    assert (gradient(loss, garbage)[inputs.loss_mask] != 0).any()
    assert all(torch.equal(clean.metrics[name], spoiled.metrics[name]) for name in clean.metrics)


@given(seed=seeds, floor=st.sampled_from([-30.0, -8.0, -1.0]))
def test_a_token_that_the_teacher_forbids_counts_as_the_floor(seed: int, floor: float) -> None:
    inputs = make_inputs(seed)
    assert inputs.support_teacher_logprobs is not None
    forbidden = inputs.support_teacher_logprobs.clone()
    forbidden[..., 0] = -math.inf
    loss = ReverseKL(support_size=None, teacher_logprob_floor=floor)
    outputs = loss(changed(inputs, support_teacher_logprobs=forbidden))
    floored = loss(changed(inputs, support_teacher_logprobs=forbidden.clamp(min=floor)))
    assert outputs.per_token.isfinite().all()
    assert torch.equal(outputs.per_token, floored.per_token)
    below = (forbidden < floor)[inputs.loss_mask].sum().item()
    assert outputs.metrics["teacher_floored"].item() == below
    assert below >= inputs.loss_mask.sum().item()


def test_a_token_that_the_student_forbids_adds_nothing() -> None:
    inputs = make_inputs(1)
    logits = inputs.logits.detach().clone()
    logits[..., 2] = -math.inf
    forbidding = changed(inputs, logits=logits.requires_grad_())
    loss = ReverseKL(support_size=None)
    without = exact_kl(forbidding).isnan()
    assert without.all(), "the plain formula has no value here"
    assert loss(forbidding).per_token.isfinite().all()
    assert gradient(loss, forbidding).isfinite().all()
    assert (gradient(loss, forbidding)[..., 2] == 0).all()


@pytest.mark.parametrize("loss", LOSSES)
def test_logits_that_are_not_numbers_are_not_hidden(loss: Loss) -> None:
    inputs = make_inputs(2)
    logits = inputs.logits.detach().clone()
    logits[0, 0, 0] = math.nan
    assert loss(changed(inputs, logits=logits)).per_token[0, 0].isnan()


@given(
    seed=seeds,
    clip_low=st.sampled_from([0.0, 0.2, 1.0]),
    clip_high=st.sampled_from([0.0, 0.2, 0.28, 5.0]),
    num_positions=lengths,
)
def test_the_clipped_surrogate_is_the_naive_one(
    seed: int, clip_low: float, clip_high: float, num_positions: int
) -> None:
    inputs = make_inputs(seed, num_positions=num_positions)
    total = torch.zeros((), dtype=torch.float64)
    ratios, clipped, gaps, entropies = [], 0, [], []
    for row, position in inputs.loss_mask.nonzero().tolist():
        law = inputs.logits[row, position].log_softmax(-1)
        policy = law[inputs.token_ids[row, position]]
        behaviour = inputs.behaviour_logprobs[row, position].item()
        advantage = inputs.advantages[row].item()
        ratio = torch.exp(policy - behaviour)
        bound = min(max(ratio.item(), 1 - clip_low), 1 + clip_high)
        is_clipped = bound * advantage < ratio.item() * advantage
        total = total - (bound * advantage if is_clipped else ratio * advantage)
        ratios.append(ratio.item())
        clipped += is_clipped
        gaps.append(abs(policy.item() - behaviour))
        entropies.append(-(law.exp() * law).sum().item())
    loss = ClippedPolicyGradient(clip_low=clip_low, clip_high=clip_high)
    outputs = loss(inputs)
    assert torch.allclose(outputs.per_token.sum(), total, atol=1e-10)
    assert outputs.metrics["ratio"].item() == pytest.approx(sum(ratios))
    assert outputs.metrics["clipped_share"].item() == clipped
    assert outputs.metrics["logprob_gap"].item() == pytest.approx(sum(gaps))
    assert outputs.metrics["entropy"].item() == pytest.approx(sum(entropies))
    expected = torch.zeros_like(inputs.logits)
    if total.requires_grad:
        expected = torch.autograd.grad(total, inputs.logits)[0]
    assert torch.allclose(gradient(loss, inputs), expected, atol=1e-10)


@given(seed=seeds)
def test_on_policy_the_clipped_gradient_is_reinforce(seed: int) -> None:
    inputs = make_inputs(seed)
    logprobs = inputs.logits.log_softmax(-1).gather(-1, inputs.token_ids[..., None])[..., 0]
    on_policy = changed(inputs, behaviour_logprobs=logprobs.detach())
    reinforce = -(inputs.advantages[:, None] * logprobs)[inputs.loss_mask].sum()
    expected = torch.autograd.grad(reinforce, inputs.logits)[0]
    assert torch.allclose(gradient(ClippedPolicyGradient(), on_policy), expected, atol=1e-10)
    assert ClippedPolicyGradient()(on_policy).metrics["logprob_gap"].item() == pytest.approx(0, abs=1e-12)


@pytest.mark.parametrize("loss", LOSSES)
def test_sixteen_bit_logits_are_computed_with_in_float32(loss: Loss) -> None:
    inputs = make_inputs(3)
    half = loss(changed(inputs, logits=inputs.logits.detach().bfloat16()))
    full = loss(changed(inputs, logits=inputs.logits.detach().bfloat16().float()))
    assert half.per_token.dtype == torch.float32
    assert torch.equal(half.per_token, full.per_token)


def test_reverse_kl_refuses_a_support_that_is_absent_or_too_small() -> None:
    inputs = make_inputs(0, support_size=4)
    with pytest.raises(ValueError, match="full vocabulary needs a stored support of 7 ids, got 4"):
        ReverseKL(support_size=None)(inputs)
    with pytest.raises(ValueError, match="on 5 ids needs a stored support at least as large, got 4"):
        ReverseKL(support_size=5)(inputs)
    with pytest.raises(ValueError, match="needs the teacher's log-probs"):
        ReverseKL(support_size=2)(changed(inputs, support_teacher_logprobs=None))


def test_an_objective_of_the_recipe_becomes_its_loss() -> None:
    assert build_loss(ReverseKLObjective(support_size="full")) == ReverseKL(support_size=None)
    assert build_loss(ReverseKLObjective(support_size=4, teacher_logprob_floor=-9.0)) == ReverseKL(
        support_size=4, teacher_logprob_floor=-9.0
    )
    objective = PolicyGradientObjective(clip_high=0.28)
    assert build_loss(objective, temperature=0.7) == ClippedPolicyGradient(clip_high=0.28)
    with pytest.raises(ValueError, match=r"at temperature 1.0, got rollouts at 0.7"):
        build_loss(ReverseKLObjective(), temperature=0.7)


@pytest.mark.parametrize("temperature", [1.0, 0.7])
@given(seed=seeds)
def test_a_loss_of_merged_logits_is_that_of_the_merged_law_computed_by_hand(seed: int, temperature: float) -> None:
    """Stop tokens 2 and 5 are one event, ids from 6 on are padding: both losses and their gradients in float64."""
    wide = make_inputs(seed, vocabulary_size=9, support_size=9)
    head = Head(stop_token_ids=(2, 5), vocab_size=6, temperature=temperature)
    logits = wide.logits.detach().requires_grad_()
    probabilities = (logits[..., :6] / temperature).softmax(-1)
    moved = probabilities * torch.tensor([1.0, 1, 0, 1, 1, 0], dtype=torch.float64)
    law = moved + torch.eye(6, dtype=torch.float64)[2] * (probabilities[..., 2] + probabilities[..., 5])[..., None]
    kept = [0, 1, 2, 3, 4]
    teacher = torch.randn(2, 3, 5, generator=torch.Generator().manual_seed(seed), dtype=torch.float64).log_softmax(-1)
    teacher = torch.cat([teacher, torch.full((2, 3, 1), -math.inf, dtype=torch.float64)], -1)
    token_ids = wide.token_ids % 5
    chosen = law.gather(-1, token_ids[..., None])[..., 0].log()
    by_hand = {
        ReverseKL(support_size=None): (law[..., kept] * (law[..., kept].log() - teacher[..., kept])).sum(-1),
        ClippedPolicyGradient(clip_low=1.0, clip_high=1e9): -(chosen - wide.behaviour_logprobs).exp()
        * wide.advantages[:, None],
    }
    for loss, expected in by_hand.items():
        merged = changed(
            wide, logits=head.scores(logits), token_ids=token_ids, support_ids=torch.arange(6).expand(2, 3, 6),
            support_teacher_logprobs=teacher,
        )  # fmt: skip
        total, masked = loss(merged).per_token, expected.masked_fill(~wide.loss_mask, 0)
        assert torch.allclose(total, masked, atol=1e-10)
        ours, theirs = (torch.autograd.grad(value.sum(), logits, retain_graph=True)[0] for value in (total, masked))
        assert torch.allclose(ours, theirs, atol=1e-9)
        assert (ours[..., 6:] == 0).all()
