"""Laws of the policy-gradient losses: their gradients are those of the plain formulas, in float64 by autograd."""

import math
from collections.abc import Callable, Sequence
from dataclasses import replace

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from actors.head import Head
from learner.config import CorrectionSection, PolicyGradientObjective
from learner.laws import Laws
from learner.losses import Loss, Tokens, WeightedSum
from learner.methods import METHODS
from learner.policy_losses import (
    Cispo,
    ClippedSurrogate,
    Correction,
    Gspo,
    ReferenceKL,
    Reinforce,
    build_policy_loss,
)

seeds = st.integers(0, 2**31 - 1)
completions = st.lists(st.integers(1, 4), min_size=1, max_size=3)
bounds = st.tuples(st.sampled_from([0.0, 0.2, 1.0]), st.sampled_from([0.0, 0.28, 5.0]))

TRUNCATE = Correction(type="truncate", level="token", low=0.0, high=1.2)
MASK = Correction(type="mask", level="token", low=0.8, high=1.2)
CORRECTIONS = (None, TRUNCATE, MASK, replace(TRUNCATE, level="sequence"), replace(MASK, level="sequence"))


def make_surrogates(correction: Correction | None, low: float = 0.2, high: float = 0.28) -> tuple[Loss, ...]:
    clipping = (ClippedSurrogate, Cispo, Gspo)
    clipped = (surrogate(clip_low=low, clip_high=high, correction=correction) for surrogate in clipping)
    return (*clipped, Reinforce(correction=correction))


LOSSES = (*(loss for correction in CORRECTIONS for loss in make_surrogates(correction)), ReferenceKL())


def make_tokens(
    seed: int, lengths: Sequence[int], *, vocabulary_size: int = 7, dtype: torch.dtype = torch.float64
) -> tuple[Tensor, Tokens]:
    """Scores [n, V] of rollouts of those lengths, drawn from a law near theirs; weights are those of sequence_mean."""
    random = torch.Generator().manual_seed(seed)
    shape, lengths_of = (sum(lengths), vocabulary_size), torch.tensor(lengths)
    scores = 2 * torch.randn(shape, generator=random, dtype=torch.float64)
    token_ids = torch.randint(vocabulary_size, shape[:1], generator=random)
    others = [scores + spread * torch.randn(shape, generator=random, dtype=torch.float64) for spread in (0.3, 0.5)]
    behaviour, reference = (law.log_softmax(-1).gather(-1, token_ids[:, None])[:, 0] for law in others)
    advantages = torch.randn(len(lengths), generator=random, dtype=torch.float64)
    rollouts = torch.arange(len(lengths)).repeat_interleave(lengths_of)
    log_ratios = scores.log_softmax(-1).gather(-1, token_ids[:, None])[:, 0] - behaviour
    sums = torch.zeros(len(lengths), dtype=torch.float64).index_add(0, rollouts, log_ratios)
    tokens = Tokens(
        token_ids=token_ids,
        weights=1 / (len(lengths) * lengths_of[rollouts].double()),
        rollouts=rollouts,
        behaviour_logprobs=behaviour,
        advantages=advantages[rollouts],
        sequence_log_ratios=sums[rollouts],
        sequence_lengths=lengths_of[rollouts],
        reference_logprobs=reference,
    )
    return scores.to(dtype).requires_grad_(), tokens


def total(loss: Loss, scores: Tensor, tokens: Tokens) -> Tensor:
    return (loss(Laws(scores), tokens).per_token * tokens.weights).sum()


def gradient(value: Tensor, scores: Tensor) -> Tensor:
    return torch.autograd.grad(value, scores)[0] if value.requires_grad else torch.zeros_like(scores)


def chosen(scores: Tensor, tokens: Tokens) -> Tensor:
    """[n] log-probs of the drawn tokens, by the dense formula."""
    return scores.log_softmax(-1).gather(-1, tokens.token_ids[:, None])[:, 0]


def plain_correction(correction: Correction | None, scores: Tensor, tokens: Tokens) -> list[float]:
    """The constant of each token, one by one."""
    gaps = (chosen(scores, tokens) - tokens.behaviour_logprobs).tolist()
    constants = []
    for i, rollout in enumerate(tokens.rollouts.tolist()):
        if correction is None:
            constants.append(1.0)
            continue
        whole = [gap for gap, other in zip(gaps, tokens.rollouts.tolist(), strict=True) if other == rollout]
        weight = math.exp(gaps[i] if correction.level == "token" else sum(whole))
        if correction.type == "truncate":
            constants.append(min(weight, correction.high))
        else:
            constants.append(weight if correction.low <= weight <= correction.high else 0.0)
    return constants


def plain_total(loss: Loss, scores: Tensor, tokens: Tokens) -> Tensor:
    """The formula of the loss token by token, or for GSPO rollout by rollout."""
    assert isinstance(loss, ClippedSurrogate | Cispo | Gspo | Reinforce)
    logprobs, constants = chosen(scores, tokens), plain_correction(loss.correction, scores, tokens)
    if isinstance(loss, Gspo) and loss.correction is None:
        return plain_gspo(loss, logprobs, tokens)
    value = torch.zeros((), dtype=torch.float64)
    for i, logprob in enumerate(logprobs):
        advantage, weight = tokens.advantages[i].item(), tokens.weights[i].item()
        anchor = tokens.behaviour_logprobs[i] if loss.correction is None else logprob.detach()
        ratio = (logprob - anchor).exp()
        if isinstance(loss, Reinforce):
            term = ratio.item() * advantage * logprob
        elif isinstance(loss, Cispo):
            term = min(max(ratio.item(), 1 - loss.clip_low), 1 + loss.clip_high) * advantage * logprob
        else:
            bound = min(max(ratio.item(), 1 - loss.clip_low), 1 + loss.clip_high) * advantage
            term = ratio.new_tensor(bound) if bound < ratio.item() * advantage else ratio * advantage
        value = value - weight * constants[i] * term
    return value


def plain_gspo(loss: Gspo, logprobs: Tensor, tokens: Tokens) -> Tensor:
    """The mean over rollouts of the sequence form, whose one ratio has the gradient of all tokens."""
    terms = []
    for rollout in tokens.rollouts.unique():
        mine = tokens.rollouts == rollout
        ratio = (logprobs[mine] - tokens.behaviour_logprobs[mine]).mean().exp()
        advantage = tokens.advantages[mine][0]
        terms.append(-torch.minimum(ratio * advantage, ratio.clamp(1 - loss.clip_low, 1 + loss.clip_high) * advantage))
    return torch.stack(terms).mean()


@pytest.mark.parametrize("correction", CORRECTIONS)
@given(seed=seeds, lengths=completions, clips=bounds)
def test_each_surrogate_is_its_plain_formula(
    correction: Correction | None, seed: int, lengths: list[int], clips: tuple[float, float]
) -> None:
    scores, tokens = make_tokens(seed, lengths)
    for loss in make_surrogates(correction, *clips):
        ours, expected = total(loss, scores, tokens), plain_total(loss, scores, tokens)
        assert torch.allclose(ours, expected, rtol=1e-10, atol=1e-12)
        assert torch.allclose(gradient(ours, scores), gradient(expected, scores), rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize("loss", LOSSES[:-1], ids=repr)
def test_in_float32_gradients_are_within_a_hundred_thousandth(loss: Loss, seed: int) -> None:
    exact, tokens = make_tokens(seed, [1, 5, 3], vocabulary_size=40)
    rounded = exact.detach().float().requires_grad_()
    expected = gradient(plain_total(loss, exact, tokens), exact)
    value = total(loss, rounded, tokens)
    assert loss(Laws(rounded), tokens).per_token.dtype == torch.float32
    assert (gradient(value, rounded) - expected).norm() <= 1e-5 * expected.norm()


@given(seed=seeds, lengths=completions, clips=bounds)
def test_metrics_are_sums_of_their_plain_formulas(seed: int, lengths: list[int], clips: tuple[float, float]) -> None:
    scores, tokens = make_tokens(seed, lengths)
    low, high = clips
    laws = scores.detach().log_softmax(-1)
    gaps = (chosen(scores, tokens) - tokens.behaviour_logprobs).tolist()
    ratios, advantages = [math.exp(gap) for gap in gaps], tokens.advantages.tolist()
    outside = [not 1 - low <= ratio <= 1 + high for ratio in ratios]
    pessimistic = [
        ratio > 1 + high if advantage > 0 else ratio < 1 - low
        for ratio, advantage in zip(ratios, advantages, strict=True)
    ]
    means = [gap / length for gap, length in zip(tokens.sequence_log_ratios, tokens.sequence_lengths, strict=True)]
    sequences = [
        mean.exp() > 1 + high if advantage > 0 else mean.exp() < 1 - low
        for mean, advantage in zip(means, advantages, strict=True)
    ]
    clipped = (sum(pessimistic), sum(outside), sum(sequences), 0)
    for loss, num_clipped in zip(make_surrogates(None, low, high), clipped, strict=True):
        metrics = loss(Laws(scores), tokens).metrics
        assert metrics["ratio"].item() == pytest.approx(sum(ratios))
        assert metrics["logprob_gap"].item() == pytest.approx(sum(abs(gap) for gap in gaps))
        assert metrics["entropy"].item() == pytest.approx(-(laws.exp() * laws).sum().item())
        assert metrics["abs_advantage"].item() == pytest.approx(sum(abs(a) for a in advantages))
        assert metrics["clipped_share"].item() == num_clipped
        assert "dropped" not in metrics
    for correction in CORRECTIONS[1:]:
        dropped = plain_correction(correction, scores, tokens).count(0.0)
        for loss in make_surrogates(correction):
            metrics = loss(Laws(scores), tokens).metrics
            assert metrics["dropped"].item() == dropped
            assert metrics["ratio"].item() == pytest.approx(sum(ratios))


def one_token(ratio: float, advantage: float) -> tuple[Tensor, Tokens]:
    """A token of probability 1/2 under the policy, drawn by a law under which the ratio is that."""
    one = torch.ones(1, dtype=torch.float64)
    return torch.zeros(1, 2, dtype=torch.float64, requires_grad=True), Tokens(
        token_ids=torch.zeros(1, dtype=torch.int64),
        weights=one,
        rollouts=torch.zeros(1, dtype=torch.int64),
        behaviour_logprobs=math.log(0.5 / ratio) * one,
        advantages=advantage * one,
        sequence_log_ratios=math.log(ratio) * one,
        sequence_lengths=torch.ones(1, dtype=torch.int64),
    )


@pytest.mark.parametrize("surrogate", [ClippedSurrogate, Gspo])
@pytest.mark.parametrize(
    ("ratio", "advantage", "value", "slope"),
    [
        (1.5, 1.0, -1.28, 0.0),
        (1.5, -1.0, 1.5, 1.5),
        (0.5, 1.0, -0.5, -0.5),
        (0.5, -1.0, 0.8, 0.0),
        (1.1, 2.0, -2.2, -2.2),
        (0.9, -2.0, 1.8, 1.8),
    ],
)
def test_a_bound_acts_on_its_own_side_only(
    surrogate: Callable[..., Loss], ratio: float, advantage: float, value: float, slope: float
) -> None:
    """slope: derivative by the token's log-prob, half of which reaches its score at probability 1/2."""
    scores, tokens = one_token(ratio, advantage)
    ours = total(surrogate(clip_low=0.2, clip_high=0.28), scores, tokens)
    assert ours.item() == pytest.approx(value)
    assert gradient(ours, scores)[0].tolist() == pytest.approx([slope / 2, -slope / 2])


@pytest.mark.parametrize(("ratio", "weight"), [(7.0, 6.0), (0.5, 0.5), (1.0, 1.0)])
def test_cispo_keeps_a_gradient_beyond_its_bounds(ratio: float, weight: float) -> None:
    scores, tokens = one_token(ratio, 1.0)
    ours = gradient(total(Cispo(clip_low=1.0, clip_high=5.0), scores, tokens), scores)
    assert ours[0].tolist() == pytest.approx([-weight / 2, weight / 2])


@pytest.mark.parametrize(
    ("ratio", "truncated", "masked"), [(0.5, 0.5, 0.0), (0.79, 0.79, 0.0), (1.1, 1.1, 1.1), (1.3, 1.2, 0.0)]
)
def test_a_correction_multiplies_the_gradient_of_a_ratio_of_one(ratio: float, truncated: float, masked: float) -> None:
    scores, tokens = one_token(ratio, 1.0)
    for correction, constant in ((TRUNCATE, truncated), (MASK, masked)):
        for loss in make_surrogates(correction):
            ours = gradient(total(loss, scores, tokens), scores)
            assert ours[0].tolist() == pytest.approx([-constant / 2, constant / 2])


@pytest.mark.parametrize("correction", CORRECTIONS)
@given(seed=seeds, lengths=completions)
def test_on_policy_every_surrogate_has_the_gradient_of_reinforce(
    correction: Correction | None, seed: int, lengths: list[int]
) -> None:
    scores, tokens = make_tokens(seed, lengths)
    on_policy = replace(
        tokens,
        behaviour_logprobs=chosen(scores, tokens).detach(),
        sequence_log_ratios=torch.zeros_like(tokens.advantages),
    )
    expected = gradient(-(tokens.weights * tokens.advantages * chosen(scores, tokens)).sum(), scores)
    for loss in make_surrogates(correction):
        ours = total(loss, scores, on_policy)
        assert torch.allclose(gradient(ours, scores), expected, rtol=1e-9, atol=1e-12)
        metrics = loss(Laws(scores), on_policy).metrics
        assert metrics["logprob_gap"].item() == pytest.approx(0, abs=1e-12)
        assert metrics["clipped_share"].item() == 0


@pytest.mark.parametrize("correction", CORRECTIONS[1:])
@given(seed=seeds, lengths=completions)
def test_with_a_correction_all_surrogates_are_one_and_no_clip_binds(
    correction: Correction, seed: int, lengths: list[int]
) -> None:
    scores, tokens = make_tokens(seed, lengths)
    constants = torch.tensor(plain_correction(correction, scores, tokens), dtype=torch.float64)
    expected = gradient(-(tokens.weights * constants * tokens.advantages * chosen(scores, tokens)).sum(), scores)
    for loss in make_surrogates(correction, 0.0, 0.0):
        assert torch.allclose(gradient(total(loss, scores, tokens), scores), expected, rtol=1e-9, atol=1e-12)
        assert loss(Laws(scores), tokens).metrics["clipped_share"].item() == 0


@given(seed=seeds)
def test_importance_weights_make_the_expected_gradient_that_of_the_policy(seed: int) -> None:
    """Exactly, by summing over all tokens that the behaviour could have drawn."""
    random = torch.Generator().manual_seed(seed)
    scores = torch.randn(1, 6, generator=random, dtype=torch.float64).requires_grad_()
    behaviour, rewards = (torch.randn(6, generator=random, dtype=torch.float64) for _ in range(2))
    expected = gradient(-(scores.softmax(-1)[0] * rewards).sum(), scores)
    ids = torch.arange(6)
    tokens = Tokens(
        token_ids=ids,
        weights=behaviour.softmax(-1),
        rollouts=ids,
        behaviour_logprobs=behaviour.log_softmax(-1),
        advantages=rewards,
    )
    for loss in (
        Reinforce(),
        ClippedSurrogate(clip_low=1.0, clip_high=1e9),
        Reinforce(correction=Correction(type="truncate", level="token", low=0.0, high=1e9)),
    ):
        ours = gradient(total(loss, scores.expand(6, 6), tokens), scores)
        assert torch.allclose(ours, expected, rtol=1e-9, atol=1e-12)


@given(seed=seeds)
def test_the_expected_estimate_of_the_divergence_from_the_reference_is_exact(seed: int) -> None:
    """KL(policy || reference) is the sum over all tokens, weighted by the policy, of the estimate at each."""
    random = torch.Generator().manual_seed(seed)
    policy, reference = torch.randn(2, 6, generator=random, dtype=torch.float64).log_softmax(-1)
    ids = torch.arange(6)
    tokens = Tokens(
        token_ids=ids,
        weights=policy.exp(),
        rollouts=ids,
        behaviour_logprobs=policy,
        advantages=torch.zeros(6, dtype=torch.float64),
        reference_logprobs=reference,
    )
    outputs = ReferenceKL()(Laws(policy.expand(6, 6)), tokens)
    assert (outputs.per_token >= -1e-15).all()
    kl = (policy.exp() * (policy - reference)).sum()
    assert torch.allclose((outputs.per_token * tokens.weights).sum(), kl, rtol=1e-10, atol=1e-14)
    assert outputs.metrics["kl_to_reference"].item() == pytest.approx(outputs.per_token.sum().item())


@given(seed=seeds, lengths=completions)
def test_the_divergence_from_the_reference_is_its_plain_formula(seed: int, lengths: list[int]) -> None:
    scores, tokens = make_tokens(seed, lengths)
    gap = tokens.reference_logprobs - chosen(scores, tokens)
    expected = (tokens.weights * (gap.exp() - gap - 1)).sum()
    ours = total(ReferenceKL(), scores, tokens)
    assert torch.allclose(ours, expected, rtol=1e-9, atol=1e-13)
    assert torch.allclose(gradient(ours, scores), gradient(expected, scores), rtol=1e-9, atol=1e-12)
    same = replace(tokens, reference_logprobs=Laws(scores).logprobs(tokens.token_ids[:, None])[:, 0].detach())
    nothing = total(ReferenceKL(), scores, same)
    assert nothing.item() == 0
    assert (gradient(nothing, scores) == 0).all()


@pytest.mark.parametrize("loss", LOSSES, ids=repr)
@given(seed=seeds, lengths=completions, data=st.data())
def test_a_part_of_the_tokens_has_its_part_of_the_losses(
    loss: Loss, seed: int, lengths: list[int], data: st.DataObject
) -> None:
    """So that tiles, and rollouts that are left out, change nothing for the others."""
    scores, tokens = make_tokens(seed, lengths)
    start, stop = sorted(data.draw(st.tuples(st.integers(0, len(tokens)), st.integers(0, len(tokens)))))
    whole = loss(Laws(scores), tokens)
    parts = [
        loss(Laws(scores[part]), tokens[part]) for part in (slice(0, start), slice(start, stop), slice(stop, None))
    ]
    assert torch.allclose(torch.cat([part.per_token for part in parts]), whole.per_token, rtol=1e-12, atol=1e-14)
    for name, value in whole.metrics.items():
        assert sum(part.metrics[name].item() for part in parts) == pytest.approx(value.item(), rel=1e-12, abs=1e-14)


@pytest.mark.parametrize("loss", LOSSES, ids=repr)
def test_forbidden_tokens_get_no_gradient_and_break_nothing(loss: Loss) -> None:
    """Of the second token, what was drawn is forbidden; of the third, something else is."""
    scores, tokens = make_tokens(5, [2, 2])
    forbidding = scores.detach().clone()
    forbidding[1, tokens.token_ids[1]] = -math.inf
    other = int(tokens.token_ids[2] + 1) % 7
    forbidding[2, other] = -math.inf
    forbidding.requires_grad_()
    tokens = replace(tokens, sequence_log_ratios=torch.tensor([-math.inf, -math.inf, 0.1, 0.1], dtype=torch.float64))
    outputs = loss(Laws(forbidding), tokens)
    assert outputs.per_token.isfinite().all()
    assert all(torch.as_tensor(value).isfinite() for value in outputs.metrics.values())
    grad = gradient((outputs.per_token * tokens.weights).sum(), forbidding)
    assert grad.isfinite().all()
    assert (grad[1] == 0).all()
    assert grad[2, other] == 0


@pytest.mark.parametrize("loss", LOSSES, ids=repr)
def test_scores_that_are_not_numbers_are_not_hidden(loss: Loss) -> None:
    scores, tokens = make_tokens(2, [3])
    broken = scores.detach().clone()
    broken[1, 0] = math.nan
    sums = torch.full_like(tokens.advantages, math.nan)
    per_token = loss(Laws(broken), replace(tokens, sequence_log_ratios=sums)).per_token
    assert per_token[1].isnan()


@pytest.mark.parametrize("loss", LOSSES, ids=repr)
def test_no_token_has_no_loss(loss: Loss) -> None:
    scores, tokens = make_tokens(0, [2])
    outputs = loss(Laws(scores[:0]), tokens[:0])
    assert outputs.per_token.shape == (0,)
    assert all(value.item() == 0 for value in outputs.metrics.values())


@pytest.mark.parametrize("temperature", [1.0, 0.7])
@given(seed=seeds)
def test_a_loss_of_merged_logits_is_that_of_the_merged_law_computed_by_hand(seed: int, temperature: float) -> None:
    """Stop tokens 2 and 5 are one event, ids from 6 on are padding."""
    logits, tokens = make_tokens(seed, [2, 3], vocabulary_size=9)
    tokens = replace(tokens, token_ids=tokens.token_ids % 5)
    head = Head(stop_token_ids=(2, 5), vocab_size=6, temperature=temperature)
    probabilities = (logits[..., :6] / temperature).softmax(-1)
    merged = [*probabilities[:, :5].unbind(-1)]
    merged[2] = merged[2] + probabilities[:, 5]
    law = torch.stack(merged, -1)
    ratio = law.gather(-1, tokens.token_ids[:, None])[:, 0] / tokens.behaviour_logprobs.exp()
    expected = gradient(-(tokens.weights * tokens.advantages * ratio).sum(), logits)
    loss = ClippedSurrogate(clip_low=1.0, clip_high=1e9)
    ours = gradient(total(loss, head.scores(logits), tokens), logits)
    assert torch.allclose(ours, expected, rtol=1e-9, atol=1e-12)
    assert (ours[:, 6:] == 0).all()


@pytest.mark.parametrize(
    ("loss", "lacking", "message"),
    [
        (Gspo(clip_low=0.1, clip_high=0.1), "sequence_log_ratios", "need sequence_log_ratios of every token, got none"),
        (Gspo(clip_low=0.1, clip_high=0.1), "sequence_lengths", "need sequence_lengths of every token, got none"),
        (Reinforce(correction=CORRECTIONS[3]), "sequence_log_ratios", "need sequence_log_ratios of every token"),
        (ReferenceKL(), "reference_logprobs", "kl_coef above 0 needs the reference policy's log-probs"),
    ],
)
def test_tokens_that_lack_something_are_refused(loss: Loss, lacking: str, message: str) -> None:
    scores, tokens = make_tokens(0, [2])
    with pytest.raises(ValueError, match=message):
        loss(Laws(scores), replace(tokens, **{lacking: None}))


class Operations(TorchDispatchMode):
    """Counts the operations that fill a whole [n, V]."""

    def __init__(self, size: int) -> None:
        super().__init__()
        self._size = size
        self.num_made = 0

    def __torch_dispatch__(
        self, func: Callable[..., object], types: object, args: tuple[object, ...] = (), kwargs: object = None
    ) -> object:
        result = func(*args, **(kwargs or {}))
        made = func is torch.ops.aten.empty_like.default
        self.num_made += made and isinstance(result, Tensor) and result.numel() == self._size
        return result


def test_a_divergence_from_the_reference_takes_no_gradient_of_its_own() -> None:
    scores, tokens = make_tokens(0, [3, 2])
    surrogate = ClippedSurrogate(clip_low=0.2, clip_high=0.2)
    value = total(WeightedSum(parts=((1.0, surrogate), (0.1, ReferenceKL()))), scores, tokens)
    apart = gradient(total(surrogate, scores, tokens), scores) + 0.1 * gradient(
        total(ReferenceKL(), scores, tokens), scores
    )
    with Operations(scores.numel()) as operations:
        ours = gradient(value, scores)
    assert operations.num_made == 1
    assert torch.allclose(ours, apart, rtol=1e-9, atol=1e-12)


def test_sums_over_rollouts_are_asked_for_only_where_they_are_used() -> None:
    assert [loss.needs_sequence_ratios for loss in make_surrogates(None)] == [False, False, True, False]
    assert not any(loss.needs_sequence_ratios for loss in make_surrogates(MASK))
    assert all(loss.needs_sequence_ratios for loss in make_surrogates(CORRECTIONS[4]))
    assert not ReferenceKL().needs_sequence_ratios


def test_an_objective_of_the_recipe_becomes_its_loss() -> None:
    built = {method: build_policy_loss(PolicyGradientObjective(method=method)) for method in METHODS}
    clipped = ClippedSurrogate(clip_low=0.2, clip_high=0.2)
    assert built == {
        "grpo": clipped,
        "dr_grpo": clipped,
        "dapo": ClippedSurrogate(clip_low=0.2, clip_high=0.28),
        "cispo": Cispo(clip_low=1.0, clip_high=5.0),
        "gspo": Gspo(clip_low=3e-4, clip_high=4e-4),
        "rloo": clipped,
        "reinforce": Reinforce(),
        "maxrl": clipped,
        "ds_grpo": clipped,
    }
    objective = PolicyGradientObjective(method="dapo", surrogate="cispo", clip_low=0.1, kl_coef=0.01)
    surrogate = Cispo(clip_low=0.1, clip_high=0.28)
    assert build_policy_loss(objective) == WeightedSum(parts=((1.0, surrogate), (0.01, ReferenceKL())))
    section = CorrectionSection(type="mask", level="sequence", low=0.5, high=1.5)
    correction = Correction(type="mask", level="sequence", low=0.5, high=1.5)
    corrected = build_policy_loss(PolicyGradientObjective(method="dapo", correction=section))
    assert corrected == ClippedSurrogate(clip_low=0.2, clip_high=0.28, correction=correction)
