"""Laws of distillation: values and gradients are those of the plain formulas by float64 autograd, for every signal."""

import itertools
import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from actors.head import Head
from learner.config import DistillationSection
from learner.distillation import (
    FullDistillation,
    SampledReverseKL,
    SupervisedFineTuning,
    SupportDistillation,
    build_distillation,
)
from learner.divergences import Divergence, ForwardKL, JensenShannon, ReverseKL
from learner.losses import Loss, Tokens
from learner.tiles import OutputHead, TiledLoss, loss_in_tiles

seeds = st.integers(0, 2**31 - 1)
HIDDEN_SIZE = 6
PLAIN_HEAD = Head(stop_token_ids=(1,))
MERGING_HEAD = Head(stop_token_ids=(4, 2), vocab_size=7, temperature=0.7)
DIVERGENCES: list[Divergence] = [ReverseKL(), ForwardKL(), JensenShannon(0.5), JensenShannon(0.1)]


class Case:
    """A student, a teacher and the tokens of some rollouts, with the laws worked out plainly in float64."""

    def __init__(
        self,
        seed: int,
        *,
        num_tokens: int = 4,
        vocab_size: int = 9,
        support_size: int = 3,
        head: Head = PLAIN_HEAD,
        dtype: torch.dtype = torch.float64,
    ) -> None:
        random = torch.Generator().manual_seed(seed)

        def normal(*shape: int) -> Tensor:
            # Rounded to the type that is tested, so that the plain formulas are of the same numbers.
            return 0.7 * torch.randn(shape, generator=random, dtype=torch.float64).to(dtype)

        self.hidden = normal(num_tokens, HIDDEN_SIZE).requires_grad_()
        self.weight = normal(vocab_size, HIDDEN_SIZE).requires_grad_()
        self.bias = normal(vocab_size).requires_grad_()
        self.teacher = OutputHead(weight=normal(vocab_size, HIDDEN_SIZE), bias=normal(vocab_size), head=head)
        self.teacher_hidden = normal(num_tokens, HIDDEN_SIZE)
        self.head = head
        with torch.no_grad():
            law, teacher = self.law(), self.teacher_law()
        support_ids = torch.rand(law.shape, generator=random).argsort(-1)[:, :support_size]
        token_ids = torch.multinomial(law, 1, generator=random)[:, 0] if num_tokens else torch.empty(0).long()
        outside = 1 - teacher.gather(-1, support_ids).sum(-1)
        self.tokens = Tokens(
            token_ids=token_ids,
            weights=normal(num_tokens).exp(),
            rollouts=torch.arange(num_tokens),
            behaviour_logprobs=-normal(num_tokens).abs(),
            advantages=normal(num_tokens),
            support_ids=support_ids,
            support_teacher_logprobs=teacher.gather(-1, support_ids).log().to(dtype),
            support_teacher_tails=outside.clamp(min=0).log().to(dtype),
            teacher_hidden=self.teacher_hidden,
        )

    @property
    def parameters(self) -> list[Tensor]:
        return [self.hidden, self.weight, self.bias]

    @property
    def output(self) -> OutputHead:
        return OutputHead(weight=self.weight, bias=self.bias, head=self.head)

    def law(self) -> Tensor:
        """[N, V] float64 of the student."""
        return merged(self.hidden.double() @ self.weight.double().T + self.bias.double(), self.head)

    def teacher_law(self) -> Tensor:
        """[N, V] float64 of the teacher."""
        logits = self.teacher_hidden.double() @ self.teacher.weight.double().T + self.teacher.bias.double()
        return merged(logits, self.head)

    def tiled(self, loss: Loss, tokens: Tokens | None = None, *, tile: int = 2) -> TiledLoss:
        tile_bytes = tile * 3 * 8 * self.output.vocab_size
        return loss_in_tiles(self.hidden, self.output, loss, tokens or self.tokens, tile_bytes=tile_bytes)

    def with_tokens(self, **values: Tensor | None) -> Tokens:
        fields = {name: getattr(self.tokens, name) for name in Tokens.__dataclass_fields__}
        return Tokens(**{**fields, **values})


def merged(logits: Tensor, head: Head) -> Tensor:
    """The law by hand: cut, tempered, the mass of all stop tokens moved to the first."""
    law = (logits[:, : head.vocab_size] / head.temperature).softmax(-1)
    first, *others = head.stop_token_ids
    moved = law.clone()
    moved[:, first] = law[:, [first, *others]].sum(-1)
    moved[:, others] = 0
    return moved


def times_log(p: Tensor, q: Tensor) -> Tensor:
    """p log q, which is 0 where p is 0; with a gradient to both."""
    return torch.where(p > 0, p * torch.where(q > 0, q, 1).log(), 0)


def plain_divergence(divergence: Divergence, s: Tensor, t: Tensor) -> Tensor:
    """Of laws [N, V] as their definitions have it."""
    match divergence:
        case ReverseKL():
            return (times_log(s, s) - times_log(s, t)).sum(-1)
        case ForwardKL():
            return (times_log(t, t) - times_log(t, s)).sum(-1)
        case JensenShannon(jsd_beta=b):
            m = b * t + (1 - b) * s
            from_teacher = (times_log(t, t) - times_log(t, m)).sum(-1)
            return b * from_teacher + (1 - b) * (times_log(s, s) - times_log(s, m)).sum(-1)
    raise AssertionError(divergence)


def with_veto(s: Tensor, t: Tensor, beta: float) -> Tensor:
    target = t * s.detach() ** beta
    return target / target.sum(-1, keepdim=True) * t.sum(-1, keepdim=True)


def plain_loss(loss: Loss, case: Case) -> tuple[Tensor, Tensor]:
    """Values [N], and [N] of which the gradient is taken."""
    s, t, tokens = case.law(), case.teacher_law(), case.tokens
    chosen = s.gather(-1, tokens.token_ids[:, None])[:, 0].log()
    match loss:
        case SupervisedFineTuning():
            return -chosen, -chosen
        case SampledReverseKL():
            value = chosen - t.gather(-1, tokens.token_ids[:, None])[:, 0].log()
            ratio = (chosen - tokens.behaviour_logprobs.double()).exp()
            return value, (ratio * value).detach() * chosen
        case FullDistillation(divergence=divergence, veto_beta=beta):
            value = plain_divergence(divergence, s, with_veto(s, t, beta))
            return value, value
        case SupportDistillation(divergence=divergence, veto_beta=beta, tail=tail):
            assert tokens.support_ids is not None
            s, t = s.gather(-1, tokens.support_ids), t.gather(-1, tokens.support_ids)
            if tail:
                s, t = (torch.cat([law, 1 - law.sum(-1, keepdim=True)], -1) for law in (s, t))
                value = plain_divergence(divergence, s, with_veto(s, t, beta))
                return value, value
            t = with_veto(s, t, beta)
            return plain_truncated(divergence, s, t)
    raise AssertionError(loss)


def plain_truncated(divergence: Divergence, s: Tensor, t: Tensor) -> tuple[Tensor, Tensor]:
    """On a support without a tail."""
    w, u = s / s.sum(-1, keepdim=True), t / t.sum(-1, keepdim=True)
    match divergence:
        case ReverseKL():
            bracket = torch.where(s > 0, s, 1).log() - torch.where(t > 0, t, 1).log()
            return (w * bracket).sum(-1), ((w * bracket).detach() * torch.where(s > 0, s, 1).log()).sum(-1)
        case ForwardKL():
            return (times_log(u, u) - times_log(u, s)).sum(-1), -times_log(u, s).sum(-1)
        case JensenShannon():
            value = plain_divergence(divergence, w, u)
            return value, value
    raise AssertionError(divergence)


def gradients(total: Tensor, case: Case) -> list[Tensor]:
    return list(torch.autograd.grad(total, case.parameters))


def assert_close(ours: Tensor, theirs: Tensor, tolerance: float) -> None:
    """Relative to the largest element, and to 1 where all are small: there differences of logarithms are rounded."""
    assert (ours.double() - theirs).abs().max() <= tolerance * theirs.abs().max().clamp(min=1)


DISTILLATIONS: list[Loss] = [
    loss
    for divergence, beta in itertools.product(DIVERGENCES, [0.0, 0.4])
    for loss in (
        SupportDistillation(divergence=divergence, veto_beta=beta),
        SupportDistillation(divergence=divergence, veto_beta=beta, tail=True),
        FullDistillation(divergence=divergence, veto_beta=beta),
    )
]


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("head", [PLAIN_HEAD, MERGING_HEAD], ids=["plain", "merging"])
@pytest.mark.parametrize("loss", [*DISTILLATIONS, SampledReverseKL(), SupervisedFineTuning()], ids=repr)
@settings(max_examples=20)
@given(seed=seeds)
def test_values_and_gradients_are_those_of_the_plain_formulas(
    loss: Loss, head: Head, dtype: torch.dtype, seed: int
) -> None:
    case = Case(seed, head=head, dtype=dtype)
    tokens = case.tokens
    if isinstance(loss, FullDistillation):
        loss = FullDistillation(divergence=loss.divergence, veto_beta=loss.veto_beta, teacher=case.teacher)
    if isinstance(loss, SampledReverseKL):
        logprobs = case.teacher_law().gather(-1, tokens.token_ids[:, None]).log().to(dtype)
        tokens = case.with_tokens(support_ids=tokens.token_ids[:, None], support_teacher_logprobs=logprobs)
    value, surrogate = plain_loss(loss, case)
    outcome = case.tiled(loss, tokens)
    tolerance = 1e-5 if dtype == torch.float32 else 1e-9
    assert outcome.per_token.dtype == dtype
    assert_close(outcome.per_token, value, tolerance)
    expected = gradients((surrogate * tokens.weights).sum(), case)
    for ours, theirs in zip(gradients(outcome.total, case), expected, strict=True):
        assert_close(ours, theirs, tolerance)


@pytest.mark.parametrize("beta", [0.0, 0.4])
@pytest.mark.parametrize("divergence", DIVERGENCES, ids=repr)
@settings(max_examples=20)
@given(seed=seeds)
def test_a_support_of_the_whole_vocabulary_is_the_full_divergence(
    divergence: Divergence, beta: float, seed: int
) -> None:
    case = Case(seed, support_size=9)
    full = case.tiled(FullDistillation(divergence=divergence, teacher=case.teacher, veto_beta=beta))
    in_order = case.with_tokens(
        support_ids=None, support_teacher_logprobs=case.teacher_law().log(), support_teacher_tails=None
    )
    others: list[tuple[Loss, Tokens]] = [
        (FullDistillation(divergence=divergence, veto_beta=beta), in_order),
        (FullDistillation(divergence=divergence, veto_beta=beta), case.tokens),
        (SupportDistillation(divergence=divergence, veto_beta=beta), case.tokens),
        (SupportDistillation(divergence=divergence, veto_beta=beta, tail=True), case.tokens),
    ]
    expected = gradients(full.total, case)
    # The last one's tail is what 1 - sum leaves of rounding.
    for loss, tokens in others:
        outcome = case.tiled(loss, tokens)
        assert_close(outcome.per_token, full.per_token, 1e-9)
        for ours, theirs in zip(gradients(outcome.total, case), expected, strict=True):
            assert_close(ours, theirs, 1e-9)
        for name, value in full.metrics.items():
            assert_close(outcome.metrics[name], value, 1e-9)
    assert_close(full.metrics["support_mass"], torch.tensor(4.0), 1e-9)


@given(seed=seeds, small=st.sampled_from([1e-5, 1e-6]))
def test_jensen_shannon_goes_to_the_forward_and_the_reverse_kl(seed: int, small: float) -> None:
    case = Case(seed)
    for jsd_beta, factor, limit in [(small, small, ForwardKL()), (1 - small, small, ReverseKL())]:
        near = case.tiled(FullDistillation(divergence=JensenShannon(jsd_beta), teacher=case.teacher))
        exact = case.tiled(FullDistillation(divergence=limit, teacher=case.teacher))
        size = 100 * exact.per_token.max() ** 2 + 1000
        assert (near.per_token / factor - exact.per_token).abs().max() <= small * size
        ours, theirs = gradients(near.total, case), gradients(exact.total, case)
        for one, other in zip(ours, theirs, strict=True):
            assert (one / factor - other).abs().max() <= small * size


@given(seed=seeds)
def test_the_even_jensen_shannon_is_symmetric_and_at_most_log_two(seed: int) -> None:
    case = Case(seed)
    swapped = OutputHead(weight=case.weight.detach(), bias=case.bias.detach(), head=case.head)
    loss = FullDistillation(divergence=JensenShannon(0.5), teacher=case.teacher)
    mirrored = FullDistillation(divergence=JensenShannon(0.5), teacher=swapped)
    tokens = case.with_tokens(teacher_hidden=case.hidden.detach())
    ours = case.tiled(loss).per_token
    theirs = loss_in_tiles(case.teacher_hidden, case.teacher, mirrored, tokens, tile_bytes=1).per_token
    assert torch.allclose(ours, theirs, atol=1e-12)
    assert (ours >= 0).all()
    assert (ours <= math.log(2)).all()


@pytest.mark.parametrize("loss", DISTILLATIONS, ids=repr)
@settings(max_examples=20)
@given(seed=seeds)
def test_no_score_rises_but_by_what_others_fall(loss: Loss, seed: int) -> None:
    """The gradient to all scores of a law sums to 0: a constant added to them changes no law."""
    case = Case(seed)
    if isinstance(loss, FullDistillation):
        loss = FullDistillation(divergence=loss.divergence, veto_beta=loss.veto_beta, teacher=case.teacher)
    (gradient,) = torch.autograd.grad(case.tiled(loss).total, case.bias)
    assert abs(gradient.sum().item()) < 1e-12 < gradient.abs().max().item()


@settings(max_examples=20)
@given(seed=seeds, order=st.permutations(range(3)))
def test_the_order_of_the_support_does_not_matter(seed: int, order: list[int]) -> None:
    case = Case(seed)
    assert case.tokens.support_ids is not None
    assert case.tokens.support_teacher_logprobs is not None
    shuffled = case.with_tokens(
        support_ids=case.tokens.support_ids[:, order],
        support_teacher_logprobs=case.tokens.support_teacher_logprobs[:, order],
    )
    for divergence, tail in itertools.product(DIVERGENCES, [True, False]):
        loss = SupportDistillation(divergence=divergence, tail=tail)
        ours, theirs = case.tiled(loss), case.tiled(loss, shuffled)
        assert torch.allclose(ours.per_token, theirs.per_token, atol=1e-12)
        for one, other in zip(gradients(ours.total, case), gradients(theirs.total, case), strict=True):
            assert torch.allclose(one, other, atol=1e-12)


def equal_case(seed: int, **settings: int) -> Case:
    """The teacher is the student, over a large vocabulary in float32."""
    case = Case(seed, vocab_size=5000, dtype=torch.float32, **settings)
    case.teacher = OutputHead(weight=case.weight.detach(), bias=case.bias.detach(), head=case.head)
    laws = (case.hidden @ case.weight.T + case.bias).detach().log_softmax(-1)
    ids = case.tokens.support_ids
    assert ids is not None
    case.tokens = case.with_tokens(
        teacher_hidden=case.hidden.detach(),
        support_teacher_logprobs=laws.gather(-1, ids),
        support_teacher_tails=laws.scatter(-1, ids, -math.inf).logsumexp(-1),
        weights=torch.ones(len(case.tokens)),
    )
    return case


@pytest.mark.parametrize("divergence", DIVERGENCES, ids=repr)
@pytest.mark.parametrize("support_size", [1, 50])
def test_a_student_that_equals_its_teacher_has_nothing_to_learn(divergence: Divergence, support_size: int) -> None:
    case = equal_case(7, support_size=support_size)
    losses: list[Loss] = [
        FullDistillation(divergence=divergence, teacher=case.teacher),
        SupportDistillation(divergence=divergence, tail=True),
    ]
    if divergence != ForwardKL():
        losses.append(SupportDistillation(divergence=divergence))
    for loss in losses:
        outcome = case.tiled(loss)
        assert outcome.per_token.abs().max() <= 1e-6
        assert outcome.metrics["kl_to_teacher"].abs() <= 1e-6 * len(outcome.per_token)
        # Of the biases: the scores' own, before weights amplify its rounding.
        assert torch.autograd.grad(outcome.total, case.bias)[0].abs().max() <= 1e-6


def test_forward_kl_without_a_tail_moves_mass_into_the_support_even_then() -> None:
    case = equal_case(7, support_size=50)
    (gradient,) = torch.autograd.grad(case.tiled(SupportDistillation(divergence=ForwardKL())).total, case.bias)
    mass = case.law().gather(-1, case.tokens.support_ids).sum(-1)
    assert (1 - mass).sum() > 0.1
    # Descent raises the scores that are in a support by what is missing there.
    assert -gradient[gradient < 0].sum().item() > 0.1


def test_the_truncated_surrogate_is_not_the_gradient_of_the_truncated_sum() -> None:
    case = Case(0)
    assert case.tokens.support_ids is not None
    s, t = (law.gather(-1, case.tokens.support_ids) for law in (case.law(), case.teacher_law()))
    truncated = gradients(((s * (s / t).log()).sum(-1) * case.tokens.weights).sum(), case)
    ours = gradients(case.tiled(SupportDistillation(divergence=ReverseKL())).total, case)
    assert not torch.allclose(ours[0], truncated[0], atol=1e-3)


@settings(max_examples=20)
@given(seed=seeds, floor=st.sampled_from([-30.0, -3.0, -1.0]), size=st.sampled_from([3, 9]))
def test_in_reverse_kl_a_token_that_the_teacher_forbids_counts_as_the_floor(seed: int, floor: float, size: int) -> None:
    case = Case(seed, support_size=size)
    assert case.tokens.support_teacher_logprobs is not None
    forbidding = case.tokens.support_teacher_logprobs.clone()
    forbidding[:, 0] = -math.inf
    below = (forbidding < floor).sum()
    losses = [SupportDistillation(divergence=ReverseKL(), teacher_logprob_floor=floor)]
    if size == 3:
        losses.append(SupportDistillation(divergence=ReverseKL(), teacher_logprob_floor=floor, tail=True))
        floored_tail = (case.tokens.support_teacher_tails < floor).sum()
    for loss in losses:
        ours = case.tiled(loss, case.with_tokens(support_teacher_logprobs=forbidding))
        theirs = case.tiled(loss, case.with_tokens(support_teacher_logprobs=forbidding.clamp(min=floor)))
        assert ours.per_token.isfinite().all()
        assert torch.equal(ours.per_token, theirs.per_token)
        for one, other in zip(gradients(ours.total, case), gradients(theirs.total, case), strict=True):
            assert torch.equal(one, other)
        assert ours.metrics["teacher_floored"] == below + (floored_tail if loss.tail else 0)
    assert below >= len(case.tokens)


@settings(max_examples=20)
@given(seed=seeds, floor=st.sampled_from([-30.0, -2.0]))
def test_over_the_whole_vocabulary_the_floor_stands_in_for_lower_log_probs(seed: int, floor: float) -> None:
    case = Case(seed)
    loss = FullDistillation(divergence=ReverseKL(), teacher=case.teacher, teacher_logprob_floor=floor)
    bias = case.teacher.bias.clone()
    bias[3] = -math.inf
    case.teacher = OutputHead(weight=case.teacher.weight, bias=bias, head=case.head)
    loss = FullDistillation(divergence=ReverseKL(), teacher=case.teacher, teacher_logprob_floor=floor)
    s, log_t = case.law(), case.teacher_law().log()
    value = (s * (s.log() - log_t.clamp(min=floor))).sum(-1)
    outcome = case.tiled(loss)
    assert_close(outcome.per_token, value, 1e-9)
    assert outcome.metrics["teacher_floored"] == (log_t < floor).sum()
    assert_close(outcome.metrics["kl_to_teacher"], value.sum(), 1e-9)
    expected = gradients((value * case.tokens.weights).sum(), case)
    for ours, theirs in zip(gradients(outcome.total, case), expected, strict=True):
        assert_close(ours, theirs, 1e-9)
    for divergence in (ForwardKL(), JensenShannon(0.3)):
        other = case.tiled(FullDistillation(divergence=divergence, teacher=case.teacher, teacher_logprob_floor=floor))
        assert_close(other.per_token, plain_divergence(divergence, case.law(), case.teacher_law()), 1e-9)


@pytest.mark.parametrize("loss", DISTILLATIONS, ids=repr)
def test_a_token_that_the_student_forbids_adds_nothing_and_has_no_gradient(loss: Loss) -> None:
    """The teacher forbids it, too, but in reverse KL, where it is free to allow it."""
    case = Case(1, support_size=9)
    assert case.tokens.support_teacher_logprobs is not None
    assert case.tokens.support_ids is not None
    case.bias = case.bias.detach().index_fill(0, torch.tensor([2]), -math.inf).requires_grad_()
    logprobs = case.tokens.support_teacher_logprobs
    if loss.divergence != ReverseKL():
        logprobs = logprobs.masked_fill(case.tokens.support_ids == 2, -math.inf).log_softmax(-1)
    outcome = case.tiled(loss, case.with_tokens(support_teacher_logprobs=logprobs))
    s, t = case.law(), torch.zeros_like(case.law()).scatter(-1, case.tokens.support_ids, logprobs.exp())
    if loss.veto_beta:
        t = with_veto(s, t, loss.veto_beta)
    value = plain_divergence(loss.divergence, s, t)
    if isinstance(loss, SupportDistillation) and loss.tail:
        assert outcome.per_token.isfinite().all()
    else:
        assert_close(outcome.per_token, value, 1e-9)
    gradient = torch.autograd.grad(outcome.total, case.bias)[0]
    assert gradient.isfinite().all()
    assert gradient[2] == 0
    assert gradient.abs().max() > 1e-3


@given(seed=seeds)
def test_the_mean_over_draws_of_the_sampled_gradient_is_that_of_the_exact_kl(seed: int) -> None:
    """Whatever law drew the tokens: one position for each token of the vocabulary, weighted by its probability."""
    case = Case(seed, num_tokens=1)
    behaviour = torch.randn(9, generator=torch.Generator().manual_seed(seed), dtype=torch.float64).log_softmax(-1)
    ids = torch.arange(9)
    exact = case.tiled(FullDistillation(divergence=ReverseKL(), teacher=case.teacher), case.with_tokens(
        weights=torch.ones(1, dtype=torch.float64)
    ))  # fmt: skip
    drawn = Tokens(
        token_ids=ids,
        weights=behaviour.exp(),
        rollouts=ids,
        behaviour_logprobs=behaviour,
        advantages=torch.zeros(9),
        support_ids=ids[:, None],
        support_teacher_logprobs=case.teacher_law()[0].log()[:, None],
    )
    sampled = loss_in_tiles(case.hidden.expand(9, -1), case.output, SampledReverseKL(), drawn, tile_bytes=1)
    for ours, theirs in zip(gradients(sampled.total, case), gradients(exact.total, case), strict=True):
        assert_close(ours, theirs, 1e-9)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_stored_log_probs_are_not_written_over(dtype: torch.dtype) -> None:
    case = Case(0, support_size=9, dtype=dtype)
    in_order = case.with_tokens(support_ids=None, support_teacher_logprobs=case.teacher_law().log().to(dtype))
    for tokens in (in_order, case.tokens):
        before = tokens.support_teacher_logprobs.clone()
        case.tiled(FullDistillation(divergence=JensenShannon(0.3), veto_beta=0.4), tokens).total.backward()
        assert torch.equal(tokens.support_teacher_logprobs, before)


@pytest.mark.parametrize("loss", [*DISTILLATIONS, SampledReverseKL(), SupervisedFineTuning()], ids=repr)
@pytest.mark.parametrize("hidden", [False, True])
def test_without_tokens_there_is_no_loss_and_no_need_of_a_teacher(loss: Loss, hidden: bool) -> None:
    case = Case(0, num_tokens=0)
    if hidden and isinstance(loss, FullDistillation):
        loss = FullDistillation(divergence=loss.divergence, veto_beta=loss.veto_beta, teacher=case.teacher)
    untold = case.with_tokens(
        support_ids=None, support_teacher_logprobs=None, support_teacher_tails=None, teacher_hidden=None
    )
    outcome = case.tiled(loss, untold)
    assert outcome.total == 0
    assert outcome.per_token.shape == (0,)
    assert outcome.metrics
    assert all(value == 0 for value in outcome.metrics.values())
    assert all((gradient == 0).all() for gradient in gradients(outcome.total, case))


def test_a_long_row_is_worked_through_in_blocks(monkeypatch: pytest.MonkeyPatch) -> None:
    case = Case(0, num_tokens=5)
    loss = FullDistillation(divergence=JensenShannon(0.3), teacher=case.teacher, veto_beta=0.4)
    whole = case.tiled(loss, tile=5)
    monkeypatch.setattr("learner.laws._NUM_BLOCKS", 1)
    one = case.tiled(loss, tile=5)
    assert torch.equal(whole.per_token, one.per_token)
    monkeypatch.setattr("learner.laws._ELEMENTS_PER_THREAD", 20)
    blocks = case.tiled(loss, tile=5)
    assert torch.equal(whole.per_token, blocks.per_token)
    for ours, theirs in zip(gradients(whole.total, case), gradients(blocks.total, case), strict=True):
        assert torch.equal(ours, theirs)


def test_tokens_that_lack_what_a_loss_is_made_of_are_refused_with_what_to_change() -> None:
    case = Case(0)
    support = SupportDistillation(divergence=ReverseKL(), tail=True)
    with pytest.raises(ValueError, match="needs the teacher's log-probs on every rollout"):
        case.tiled(support, case.with_tokens(support_teacher_logprobs=None))
    with pytest.raises(ValueError, match=r"needs its ids, .* set signal to full"):
        case.tiled(support, case.with_tokens(support_ids=None))
    with pytest.raises(ValueError, match="mass outside the support, got none; set tail to false"):
        case.tiled(support, case.with_tokens(support_teacher_tails=None))
    with pytest.raises(ValueError, match="needs a stored support of 9 ids, got 3; set signal to support"):
        case.tiled(FullDistillation(divergence=ReverseKL()))
    full, without = (
        FullDistillation(divergence=ReverseKL(), teacher=case.teacher),
        case.with_tokens(teacher_hidden=None),
    )
    with pytest.raises(ValueError, match="last hidden state of every token"):
        case.tiled(full, without)
    narrow = OutputHead(weight=case.teacher.weight[:8], head=case.head)
    with pytest.raises(ValueError, match="the student's 9 tokens, got 8"):
        case.tiled(FullDistillation(divergence=ReverseKL(), teacher=narrow))
    with pytest.raises(ValueError, match="that token alone, got 3 ids"):
        case.tiled(SampledReverseKL())


def test_a_section_of_the_recipe_becomes_its_loss() -> None:
    head = Case(0).teacher

    def build(section: DistillationSection, signal: str, veto_beta: float = 0.0, vocab_size: int = 100) -> Loss:
        return build_distillation(section, signal=signal, veto_beta=veto_beta, teacher_head=head, vocab_size=vocab_size)

    section = DistillationSection(divergence="jsd", jsd_beta=0.2, tail=True)
    divergence = JensenShannon(0.2)
    assert build(section, "support", 0.3) == SupportDistillation(divergence=divergence, tail=True, veto_beta=0.3)
    stored = FullDistillation(divergence=divergence)
    assert build(section, "full") == stored
    assert build(section, "support", vocab_size=16) == stored, "a support of all ids is the whole vocabulary"
    assert build(section, "hidden") == FullDistillation(divergence=divergence, teacher=head)
    floored = DistillationSection(teacher_logprob_floor=-9.0)
    for signal, teacher in (("full", None), ("hidden", head)):
        assert build(floored, signal) == FullDistillation(
            divergence=ReverseKL(), teacher=teacher, teacher_logprob_floor=-9.0
        )
    assert build(floored, "support") == SupportDistillation(divergence=ReverseKL(), teacher_logprob_floor=-9.0)
    assert build(floored, "sampled") == SampledReverseKL(teacher_logprob_floor=-9.0)
    assert build(DistillationSection(), "sampled") == SampledReverseKL()
    assert build(DistillationSection(), "support") == SupportDistillation(divergence=ReverseKL())
    assert build(DistillationSection(divergence="forward_kl"), "full") == FullDistillation(divergence=ForwardKL())
    with pytest.raises(ValueError, match="signal must be support, sampled, full or hidden, got auto"):
        build(section, "auto")
    with pytest.raises(ValueError, match="needs the teacher's output head"):
        build_distillation(section, signal="hidden", veto_beta=0, teacher_head=None, vocab_size=9)
