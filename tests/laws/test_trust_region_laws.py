"""The blend: golden values, the budget, the path, what happens at the edges, and exactness of verification."""

import math
import re
from collections.abc import Callable

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from actors.random_numbers import sample_from_logprobs
from actors.trust_region import (
    Blend,
    Verdict,
    blend,
    blend_at,
    law_as_blend,
    solve_beta,
    verify_draft,
    verify_target,
)

STUDENT = torch.tensor([0.7, 0.2, 0.1], dtype=torch.float64).log()
TEACHER = torch.tensor([0.1, 0.2, 0.7], dtype=torch.float64).log()

# epsilon, beta, mu, KL(mu || student), KL(mu || teacher)
GOLDEN = [
    (0.0, 0.0, (0.7, 0.2, 0.1), 0.0, 1.167546),
    (0.001, 0.033956, (0.681073, 0.207884, 0.111042), 0.001, 1.110229),
    (0.005, 0.074196, (0.657560, 0.217055, 0.125384), 0.005, 1.040567),
    (0.01, 0.103256, (0.639874, 0.223505, 0.136621), 0.01, 0.989284),
    (0.02, 0.142979, (0.614789, 0.232000, 0.153211), 0.02, 0.918189),
    (0.05, 0.217935, (0.564893, 0.246646, 0.188461), 0.05, 0.782502),
    (0.5, 0.620918, (0.281104, 0.268866, 0.450030), 0.5, 0.171284),
    (1.5, 1.0, (0.1, 0.2, 0.7), 1.167546, 0.0),
]


def divergence(mu: Tensor, base: Tensor) -> Tensor:
    """KL(mu || base) of log-prob rows."""
    return torch.where(mu.isfinite(), mu.exp() * (mu - base), 0.0).sum(-1)


def mixture(student: Tensor, teacher: Tensor, beta: Tensor) -> Tensor:
    """mu_beta in float64 from the definition, after renormalising both rows."""
    s, t = student.double().log_softmax(-1), teacher.double().log_softmax(-1)
    both = s.isfinite() & t.isfinite()
    path = torch.where(both, (1 - beta[..., None]) * s.nan_to_num() + beta[..., None] * t.nan_to_num(), -torch.inf)
    return torch.where((beta > 0)[..., None], path.log_softmax(-1), s)


@st.composite
def laws(draw: st.DrawFn, masked: bool = False) -> tuple[Tensor, Tensor]:
    """Two rows of laws from mild to nearly one-hot, in float32 or float64."""
    rows, vocab = draw(st.integers(1, 5)), draw(st.integers(2, 40))
    dtype = draw(st.sampled_from([torch.float32, torch.float64]))
    generator = torch.Generator().manual_seed(draw(st.integers(0, 2**32 - 1)))
    pair = []
    for _ in range(2):
        scale = draw(st.sampled_from([1e-3, 0.3, 1.0, 5.0, 40.0]))
        logits = torch.randn(rows, vocab, generator=generator, dtype=torch.float64) * scale
        if masked:
            hidden = torch.rand(rows, vocab, generator=generator) < draw(st.sampled_from([0.0, 0.3, 0.8]))
            hidden[torch.arange(rows), logits.argmax(-1)] = False
            logits[hidden] = -torch.inf
        pair.append(logits.log_softmax(-1).to(dtype))
    return pair[0], pair[1]


epsilons = st.floats(1e-9, 20.0) | st.sampled_from([0.001, 0.005, 0.02, 0.05])


@pytest.mark.parametrize(("epsilon", "beta", "mu", "to_student", "to_teacher"), GOLDEN)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_the_blend_has_its_golden_values(
    epsilon: float, beta: float, mu: tuple[float, ...], to_student: float, to_teacher: float, dtype: torch.dtype
) -> None:
    result = blend(STUDENT.to(dtype), TEACHER.to(dtype), epsilon)
    assert result.beta.item() == pytest.approx(beta, abs=1e-6)
    assert result.logprobs.exp().tolist() == pytest.approx(mu, abs=1e-6)
    assert result.divergence.item() == pytest.approx(to_student, abs=1e-6)
    assert divergence(result.logprobs.double(), TEACHER).item() == pytest.approx(to_teacher, abs=1e-5)


@given(laws(masked=True), epsilons)
def test_the_budget_holds_and_is_used(pair: tuple[Tensor, Tensor], epsilon: float) -> None:
    student, teacher = pair
    beta = solve_beta(student, teacher, epsilon)
    assert beta.dtype == student.dtype
    spent = divergence(mixture(student, teacher, beta.double()), student.double().log_softmax(-1))
    relative = 1e-4 if student.dtype == torch.float32 else 1e-5
    assert (spent <= epsilon * (1 + relative) + 1e-9).all()
    inside = (beta > 0) & (beta < 1)
    assert (spent[inside] >= 0.999 * epsilon - 1e-9).all()


def heavy_rows(rows: int, vocab: int, scale: float, seed: int, tail: float = 3.0) -> Tensor:
    """Log-probs of rows whose logits follow Student's t, float64."""
    torch.manual_seed(seed)
    return (torch.distributions.StudentT(tail).sample((rows, vocab)).double() * scale).log_softmax(-1)


def spent_and_share(student: Tensor, teacher: Tensor, beta: Tensor, epsilon: float | Tensor) -> tuple[Tensor, Tensor]:
    """The divergence at beta in float64, and the share of the budget that it is, 1 where beta is 0 or 1."""
    spent = divergence(mixture(student, teacher, beta.double()), student.double().log_softmax(-1))
    return spent, torch.where((beta > 0) & (beta < 1), spent / epsilon, 1.0)


@settings(max_examples=40)
@given(
    st.integers(2, 20_000),
    st.sampled_from([0.3, 1.0, 4.0]),
    st.sampled_from([0.3, 1.0, 4.0]),
    st.integers(0, 2**31 - 1),
    st.sampled_from([torch.float32, torch.float64]),
    st.booleans(),
)
def test_the_budget_of_each_row_holds_and_is_used_on_heavy_tailed_rows(
    vocab: int, first: float, second: float, seed: int, dtype: torch.dtype, masked: bool
) -> None:
    student, teacher = heavy_rows(5, vocab, first, seed), heavy_rows(5, vocab, second, seed + 1)
    if masked:
        for law in (student, teacher):
            hidden = torch.rand(law.shape) < 0.01
            hidden[torch.arange(5), law.argmax(-1)] = False
            law[hidden] = -torch.inf
    student, teacher = student.to(dtype), teacher.to(dtype)
    epsilon = torch.tensor([1e-6, 0.001, 0.02, 0.5, 4.0], dtype=torch.float64)
    relative = 1e-4 if dtype == torch.float32 else 1e-5
    result = blend(student, teacher, epsilon)
    assert torch.equal(result.beta, solve_beta(student, teacher, epsilon))
    spent, share = spent_and_share(student, teacher, result.beta, epsilon)
    own = student.double().log_softmax(-1)
    returned = divergence(result.logprobs.double().log_softmax(-1), own)
    for figure in (spent, returned):
        assert (figure <= epsilon * (1 + relative) + 1e-9).all()
    assert (share[1:] >= 0.999).all()
    assert share[0] >= 0.99
    assert result.divergence.tolist() == pytest.approx(spent.tolist(), rel=1e-5, abs=1e-9)


@pytest.mark.parametrize("vocab", [151_936, 262_144])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_the_budget_holds_and_is_used_on_whole_vocabularies(vocab: int, dtype: torch.dtype) -> None:
    student, teacher = heavy_rows(3, vocab, 1.5, 0).to(dtype), heavy_rows(3, vocab, 1.5, 1).to(dtype)
    epsilon = torch.tensor([0.001, 0.02, 0.05], dtype=torch.float64)
    spent, share = spent_and_share(student, teacher, solve_beta(student, teacher, epsilon), epsilon)
    assert (spent <= epsilon * (1 + 1e-5) + 1e-9).all()
    assert (share >= 0.999).all()


@pytest.mark.parametrize("vocab", [5, 40_000])
@pytest.mark.parametrize("never", [-1e4, -1e9, torch.finfo(torch.float32).min])
def test_log_probs_so_low_that_they_mean_never_keep_the_budget(vocab: int, never: float) -> None:
    """As some engines mask. The divergence jumps almost as with -inf, within a beta of 1e-8 at -1e9."""
    student, teacher = heavy_rows(4, vocab, 1.0, 0).float(), heavy_rows(4, vocab, 1.0, 1).float()
    teacher[:, 0] = never
    spent, share = spent_and_share(student, teacher, solve_beta(student, teacher, 0.3), 0.3)
    assert (spent <= 0.3 * (1 + 1e-4)).all()
    assert (share >= 0.999).all()


@given(laws(masked=True), epsilons)
def test_no_larger_beta_is_feasible(pair: tuple[Tensor, Tensor], epsilon: float) -> None:
    student, teacher = pair
    beta = solve_beta(student, teacher, epsilon).double()
    further = (beta + 1e-3).clamp(max=1.0)
    spent = divergence(mixture(student, teacher, further), student.double().log_softmax(-1))
    same_law = divergence(teacher.double().log_softmax(-1), student.double().log_softmax(-1)) < 1e-8
    nothing_shared = ~(student.isfinite() & teacher.isfinite()).any(-1)
    assert ((further == beta) | (spent > epsilon * (1 - 1e-3)) | same_law | nothing_shared).all()


@given(laws(), epsilons, epsilons)
def test_beta_grows_with_epsilon(pair: tuple[Tensor, Tensor], first: float, second: float) -> None:
    low, high = sorted((first, second))
    assert (solve_beta(*pair, low) <= solve_beta(*pair, high)).all()


@given(laws(masked=True), epsilons)
def test_the_blend_is_the_mixture_at_its_beta(pair: tuple[Tensor, Tensor], epsilon: float) -> None:
    student, teacher = pair
    result = blend(student, teacher, epsilon)
    expected = mixture(student, teacher, result.beta.double())
    assert result.logprobs.exp().double().tolist() == pytest.approx(np.asarray(expected.exp()), abs=1e-6)
    assert result.logprobs.double().exp().sum(-1).tolist() == pytest.approx([1.0] * len(student), abs=1e-5)


@given(laws(masked=True))
def test_no_budget_gives_the_student_bit_for_bit(pair: tuple[Tensor, Tensor]) -> None:
    student, teacher = pair
    result = blend(student, teacher, 0.0)
    assert torch.equal(result.logprobs, student)
    assert not result.beta.any()
    assert not result.divergence.any()


@given(laws())
def test_a_budget_beyond_the_teacher_gives_the_teacher(pair: tuple[Tensor, Tensor]) -> None:
    student, teacher = pair
    enough = float(divergence(teacher.double().log_softmax(-1), student.double().log_softmax(-1)).max()) + 1e-6
    result = blend(student, teacher, enough)
    assert (result.beta == 1).all()
    assert result.logprobs.double().exp().tolist() == pytest.approx(np.asarray(teacher.double().exp()), abs=1e-6)


@given(laws(), epsilons, st.floats(-50, 50))
def test_a_constant_added_to_either_side_changes_nothing(
    pair: tuple[Tensor, Tensor], epsilon: float, shift: float
) -> None:
    student, teacher = (law.double() for law in pair)
    beta = solve_beta(student, teacher, epsilon)
    assert solve_beta(student + shift, teacher - shift, epsilon).tolist() == pytest.approx(beta.tolist(), abs=1e-5)


@given(laws(), epsilons)
def test_identical_rows_blend_into_themselves(pair: tuple[Tensor, Tensor], epsilon: float) -> None:
    student, _ = pair
    result = blend(student, student.clone(), epsilon)
    assert (result.beta == 1).all()
    assert result.logprobs.exp().tolist() == pytest.approx(np.asarray(student.exp()), abs=1e-6)
    assert (result.divergence.abs() < 1e-6).all()


def test_a_budget_per_row_is_that_of_each_row_alone() -> None:
    student, teacher = STUDENT.expand(4, 2, 3), TEACHER.expand(4, 2, 3)
    epsilon = torch.tensor([[0.0, 0.001], [0.005, 0.01], [0.02, 0.05], [0.5, 1.5]])
    together = solve_beta(student, teacher, epsilon)
    assert together.shape == (4, 2)
    for i in range(4):
        for j in range(2):
            assert together[i, j] == solve_beta(STUDENT, TEACHER, float(epsilon[i, j]))


def test_a_token_of_one_side_alone_has_no_mass_in_the_blend() -> None:
    student = torch.tensor([0.6, 0.39, 0.01, 0.0]).log()
    teacher = torch.tensor([0.2, 0.5, 0.0, 0.3]).log()
    result = blend(student, teacher, 0.05)
    assert 0 < result.beta < 1
    assert result.logprobs[2] == result.logprobs[3] == -torch.inf
    whole = blend(student, teacher, 10.0)
    assert whole.beta == 1
    assert whole.logprobs.exp().tolist() == pytest.approx([0.2 / 0.7, 0.5 / 0.7, 0, 0], abs=1e-6)


def test_a_teacher_that_forbids_too_much_leaves_the_student() -> None:
    """The divergence jumps to -log 0.5 as beta leaves 0, which is more than the budget."""
    student = torch.tensor([0.5, 0.25, 0.25]).log()
    teacher = torch.tensor([0.0, 0.5, 0.5]).log()
    assert torch.equal(blend(student, teacher, 0.69).logprobs, student)
    assert blend(student, teacher, 0.70).beta > 0


def test_rows_that_share_nothing_leave_the_student() -> None:
    student, teacher = torch.tensor([1.0, 0.0]).log(), torch.tensor([0.0, 1.0]).log()
    assert torch.equal(blend(student, teacher, 5.0).logprobs, student)


def test_one_hot_rows_are_ordinary() -> None:
    one_hot, other = torch.tensor([0.0, 1.0, 0.0]).log(), torch.tensor([0.1, 0.8, 0.1]).log()
    assert blend(one_hot, other, 0.02).logprobs.exp().tolist() == [0.0, 1.0, 0.0]
    assert blend(other, one_hot, 1.0).logprobs.exp().tolist() == pytest.approx([0.0, 1.0, 0.0])


@pytest.mark.parametrize(
    ("student", "teacher", "epsilon", "message"),
    [
        ([[0.0, 0.0], [math.nan, 0.0]], [[0.0, 0.0]] * 2, 0.1, r"student_logprobs .* got nan in row 1"),
        ([[0.0, 0.0]] * 2, [[0.0, 0.0], [math.inf, 0.0]], 0.1, r"teacher_logprobs .* got inf in row 1"),
        ([[-math.inf] * 2, [0.0, 0.0]], [[0.0, 0.0]] * 2, 0.1, r"student_logprobs .* no mass .* in row 0"),
        ([[0.0, 0.0]] * 2, [[0.0, 0.0]] * 2, -0.1, r"epsilon must be .* >= 0 nats, got -0.1 in row 0"),
        ([[0.0, 0.0]] * 2, [[0.0, 0.0]] * 2, [0.1, -1.0], r"epsilon .* got -1.0 in row 1"),
        ([[0.0, 0.0]] * 2, [[0.0, 0.0]] * 2, math.nan, r"epsilon .* got nan in row 0"),
        ([[0.0, 0.0]] * 2, [[0.0, 0.0]] * 2, [0.1, 0.1, 0.1], r"epsilon must be one number or one per row"),
        ([[0.0, 0.0]] * 2, [[0.0, 0.0, 0.0]] * 2, 0.1, r"one shape"),
        ([[]], [[]], 0.1, r"at least one token"),
    ],
)
def test_what_is_no_law_or_no_budget_is_refused_by_row(
    student: list[list[float]], teacher: list[list[float]], epsilon: float | list[float], message: str
) -> None:
    budget = torch.tensor(epsilon) if isinstance(epsilon, list) else epsilon
    for function in (blend, solve_beta):
        with pytest.raises(ValueError, match=message):
            function(torch.tensor(student), torch.tensor(teacher), budget)


def test_a_row_of_a_deeper_shape_is_named_by_its_indices() -> None:
    student = torch.zeros(2, 3, 4)
    student[1, 2, 0] = math.nan
    with pytest.raises(ValueError, match=re.escape("row (1, 2)")):
        blend(student, torch.zeros(2, 3, 4), 0.1)


@given(laws(masked=True), epsilons)
def test_the_divergence_from_the_teacher_is_that_of_the_law_returned(
    pair: tuple[Tensor, Tensor], epsilon: float
) -> None:
    student, teacher = pair
    result = blend(student, teacher, epsilon)
    mu = mixture(student, teacher, result.beta.double())
    expected = divergence(mu, teacher.double().log_softmax(-1))
    assert result.teacher_divergence.tolist() == pytest.approx(expected.tolist(), rel=1e-5, abs=1e-6)


def test_the_divergence_from_a_teacher_that_lacks_a_token_is_infinite() -> None:
    student, teacher = torch.tensor([0.5, 0.5]).log(), torch.tensor([0.0, 1.0]).log()
    assert blend(student, teacher, 0.1).teacher_divergence == math.inf
    assert blend(student, teacher, 1.0).teacher_divergence == pytest.approx(0, abs=1e-6)
    assert blend(teacher, student, 0.0).teacher_divergence == pytest.approx(math.log(2))


@given(laws(masked=True), st.floats(0, 1))
def test_a_blend_at_a_beta_is_the_mixture_there(pair: tuple[Tensor, Tensor], beta: float) -> None:
    student, teacher = pair
    result = blend_at(student, teacher, beta)
    nothing_shared = ~(student.isfinite() & teacher.isfinite()).any(-1)
    at = torch.where(nothing_shared, 0.0, torch.tensor(beta, dtype=torch.float64))
    expected = mixture(student, teacher, at)
    assert result.logprobs.exp().double().tolist() == pytest.approx(np.asarray(expected.exp()), abs=1e-6)
    assert result.beta.tolist() == pytest.approx(at.tolist(), rel=1e-6)
    for figure, base in ((result.divergence, student), (result.teacher_divergence, teacher)):
        own = divergence(expected, base.double().log_softmax(-1))
        assert figure.tolist() == pytest.approx(own.tolist(), rel=1e-5, abs=1e-6)
    assert torch.equal(result.logprobs[at == 0], student[at == 0])


@pytest.mark.parametrize("beta", [-0.1, 1.1, math.nan, [0.5, 2.0]])
def test_a_beta_outside_its_range_is_refused(beta: float | list[float]) -> None:
    given = torch.tensor(beta) if isinstance(beta, list) else beta
    with pytest.raises(ValueError, match=r"beta must be in \[0, 1\], got .* in row"):
        blend_at(STUDENT.expand(2, 3), TEACHER.expand(2, 3), given)


@given(laws(masked=True), st.floats(0, 1))
def test_a_law_as_a_blend_has_its_divergences(pair: tuple[Tensor, Tensor], beta: float) -> None:
    at = blend_at(*pair, beta)
    result = law_as_blend(at.logprobs, *pair)
    assert result.beta.isnan().all()
    assert torch.equal(result.logprobs, at.logprobs)
    assert result.divergence.tolist() == pytest.approx(at.divergence.tolist(), rel=1e-4, abs=1e-5)
    assert result.teacher_divergence.tolist() == pytest.approx(at.teacher_divergence.tolist(), rel=1e-4, abs=1e-5)


Verifier = Callable[[Tensor, Tensor, Blend, Tensor], Verdict]


def correct(ids: Tensor, student: Tensor, target: Blend, uniforms: Tensor) -> Verdict:
    return verify_target(ids, student, target, uniforms=uniforms)


def forgets_the_residual(ids: Tensor, student: Tensor, target: Blend, uniforms: Tensor) -> Verdict:
    """Redraws from mu itself."""
    verdict = correct(ids, student, target, uniforms)
    redrawn = sample_from_logprobs(target.logprobs[:, 0], uniforms[:, 0, 1])
    return verdict._replace(replacement_ids=torch.where(verdict.replacement_ids >= 0, redrawn, -1))


def keeps_everything(ids: Tensor, student: Tensor, target: Blend, uniforms: Tensor) -> Verdict:
    verdict = correct(ids, student, target, uniforms)
    return verdict._replace(
        num_accepted=torch.ones_like(verdict.num_accepted), replacement_ids=torch.full_like(verdict.num_accepted, -1)
    )


def emission_law(verify: Verifier, student: Tensor, target: Blend) -> Tensor:
    """Integrate a verifier over its uniforms for one position: the exact law of what it emits.

    Draft x is kept up to a threshold of the first uniform, and an id of at most y is redrawn up to a threshold of the
    second; both are found by bisection on the verifier itself, for all x or y at once.
    """
    vocab = len(student)
    rows = Blend(*(field.expand(vocab, 1, *field.shape) for field in target))

    def verdicts(drafts: Tensor, first: Tensor, second: Tensor) -> Verdict:
        return verify(drafts[:, None], student.expand(vocab, 1, vocab), rows, torch.stack([first, second], -1)[:, None])

    def thresholds(holds: Callable[[Tensor], Tensor]) -> Tensor:
        low, high = torch.zeros(2, vocab, dtype=torch.float64)
        high = high + 1
        for _ in range(45):
            middle = (low + high) / 2
            up = holds(middle)
            low, high = torch.where(up, middle, low), torch.where(up, high, middle)
        return low

    each, zeros = torch.arange(vocab), torch.zeros(vocab, dtype=torch.float64)
    last = zeros + 1 - 2**-53
    kept = thresholds(lambda u: verdicts(each, u, zeros).num_accepted == 1)
    drafted = student.double().softmax(-1)
    law = drafted * kept
    for x in range(vocab):
        if verdicts(each, last, zeros).num_accepted[x] == 0:
            cumulative = thresholds(lambda u, x=x: verdicts(each * 0 + x, last, u).replacement_ids <= each)
            law += drafted[x] * (1 - kept[x]) * cumulative.diff(prepend=torch.zeros(1, dtype=torch.float64))
    return law


def targets(seed: int, epsilon: float) -> tuple[Tensor, list[Blend]]:
    """A student's row, and three laws to be emitted: within a budget, at a beta, and any law."""
    generator = torch.Generator().manual_seed(seed)
    student, teacher, other = torch.randn(3, 6, generator=generator, dtype=torch.float64).mul(2).log_softmax(-1)
    other[1] = -torch.inf
    return student, [
        blend(student, teacher, epsilon),
        blend_at(student, teacher, 0.4),
        law_as_blend(other.log_softmax(-1), student, teacher),
    ]


@pytest.mark.parametrize("epsilon", [0.0, 0.02, 0.3, 5.0])
@pytest.mark.parametrize("seed", [0, 1])
def test_what_verification_emits_is_distributed_exactly_as_its_target(epsilon: float, seed: int) -> None:
    student, laws_to_emit = targets(seed, epsilon)
    for target in laws_to_emit:
        law = emission_law(correct, student, target)
        assert law.tolist() == pytest.approx(target.logprobs.exp().tolist(), abs=1e-9)


@pytest.mark.parametrize("wrong", [forgets_the_residual, keeps_everything])
def test_a_wrong_verification_emits_another_law(wrong: Verifier) -> None:
    """The control of the test above."""
    student, laws_to_emit = targets(0, 0.3)
    for target in laws_to_emit:
        law = emission_law(wrong, student, target)
        assert law.sum() == pytest.approx(1)
        assert (law - target.logprobs.exp()).abs().max() > 1e-3


def surprise(counts: Tensor, law: Tensor) -> float:
    """Pearson's chi-square as a standard normal (Wilson and Hilferty)."""
    expected, freedom = law * counts.sum(), law.numel() - 1
    statistic = float(((counts - expected) ** 2 / expected).sum())
    return ((statistic / freedom) ** (1 / 3) - (1 - 2 / (9 * freedom))) / math.sqrt(2 / (9 * freedom))


@pytest.mark.parametrize("bonus", [False, True])
def test_two_tokens_follow_mu_unless_a_bonus_token_is_added(bonus: bool) -> None:
    """Ragged drafts of two tokens, the rest in a second round; a bonus from the teacher, after a draft that was kept
    whole, is the control. The laws of the second position depend on the first token."""
    number, vocab, epsilon = 200_000, 4, 0.1
    generator = torch.Generator().manual_seed(0)
    student, teacher = torch.randn(2, 1 + vocab, vocab, generator=generator, dtype=torch.float64).log_softmax(-1)
    mu = blend(student, teacher, epsilon).logprobs

    def draw(rows: Tensor, law: Tensor) -> Tensor:
        return sample_from_logprobs(law[rows], torch.rand(len(rows), generator=generator, dtype=torch.float64))

    def verified(drafts: Tensor, rows: Tensor, num_drafted: Tensor) -> Verdict:
        return verify_draft(drafts, student[rows], teacher[rows], epsilon, num_drafted=num_drafted, generator=generator)

    start = torch.zeros(number, dtype=torch.long)
    first = draw(start, student)
    second = draw(1 + first, student)
    num_drafted = torch.randint(1, 3, (number,), generator=generator)
    verdict = verified(torch.stack([first, second], 1), torch.stack([start, 1 + first], 1), num_drafted)
    one = torch.where(verdict.num_accepted >= 1, first, verdict.replacement_ids)
    again = draw(1 + one, student)
    later = verified(again[:, None], 1 + one[:, None], torch.ones(number, dtype=torch.long))
    two = torch.where(later.num_accepted == 1, again, later.replacement_ids)
    two = torch.where((verdict.num_accepted == 1) & (num_drafted == 2), verdict.replacement_ids, two)
    two = torch.where(verdict.num_accepted == 2, second, two)
    if bonus:
        kept_whole = (verdict.num_accepted == 1) & (num_drafted == 1)
        two = torch.where(kept_whole, draw(1 + one, teacher), two)
    counts = torch.bincount(one * vocab + two, minlength=vocab**2).double()
    law = (mu[0][:, None] + mu[1:]).exp().flatten()
    assert (surprise(counts, law) > 6) == bonus  # 6 deviations: a false alarm in 1e9


@given(laws(), epsilons, st.integers(1, 5), st.integers(0, 2**32 - 1))
def test_a_verdict_is_a_prefix_and_at_most_one_redrawn_token(
    pair: tuple[Tensor, Tensor], epsilon: float, length: int, seed: int
) -> None:
    generator = torch.Generator().manual_seed(seed)
    rows, vocab = pair[0].shape
    student, teacher = (law[:, None].expand(rows, length, vocab) for law in pair)
    drafts = torch.stack([torch.multinomial(pair[0].double().exp(), 1, generator=generator)[:, 0]
                          for _ in range(length)], 1)  # fmt: skip
    num_drafted = torch.randint(1, length + 1, (rows,), generator=generator)
    verdict = verify_draft(drafts, student, teacher, epsilon, num_drafted=num_drafted, generator=generator)
    assert (verdict.num_accepted <= num_drafted).all()
    assert ((verdict.replacement_ids == -1) == (verdict.num_accepted == num_drafted)).all()
    mu = blend(student, teacher, epsilon).logprobs
    for row in range(rows):
        accepted, redrawn = int(verdict.num_accepted[row]), int(verdict.replacement_ids[row])
        emitted = drafts[row, :accepted].tolist() + ([redrawn] if redrawn >= 0 else [])
        assert len(emitted) >= 1
        for position, token in enumerate(emitted):
            assert verdict.behaviour_logprobs[row, position] == mu[row, position, token]
            assert mu[row, position, token] > -torch.inf


@pytest.mark.parametrize("epsilon", [0.001, 0.005, 0.01, 0.02, 0.05])
def test_acceptance_is_at_least_what_pinsker_promises(epsilon: float) -> None:
    generator = torch.Generator().manual_seed(0)
    student, teacher = torch.randn(2, 200, 50, generator=generator, dtype=torch.float64).mul(3).log_softmax(-1)
    mu = blend(student, teacher, epsilon).logprobs
    acceptance = torch.minimum(mu.exp(), student.exp()).sum(-1)
    assert (acceptance >= 1 - math.sqrt(epsilon / 2) - 1e-9).all()


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"num_drafted": torch.tensor([1, 0])}, "num_drafted must be at least 1 in every row, got 0 in row 1"),
        ({"num_drafted": torch.tensor([3, 1])}, "num_drafted must be at most k = 2 in every row, got 3 in row 0"),
        ({"num_drafted": torch.tensor([1])}, r"num_drafted must have shape \(2,\)"),
        ({"uniforms": torch.zeros(2, 2)}, r"uniforms must have shape \(2, 2, 2\)"),
        ({"uniforms": torch.ones(2, 2, 2)}, r"uniforms must be in \[0, 1\), got 1.0"),
        ({"uniforms": torch.full((2, 2, 2), math.nan)}, r"uniforms must be in \[0, 1\), got nan"),
        ({"draft_ids": torch.zeros(2, 0, dtype=torch.long)}, "k >= 1"),
        ({"draft_ids": torch.zeros(2, 3, dtype=torch.long)}, r"student_logprobs must be \[B, k, V\]"),
        ({"target": blend(torch.zeros(2, 2, 4), torch.zeros(2, 2, 4), 0.1)}, r"target.logprobs must be"),
    ],
)
def test_a_draft_that_does_not_fit_is_refused(change: dict[str, Tensor], message: str) -> None:
    law = torch.zeros(2, 2, 3).log_softmax(-1)
    arguments = {"draft_ids": torch.zeros(2, 2, dtype=torch.long), "target": blend(law, law, 0.1), **change}
    with pytest.raises(ValueError, match=message):
        verify_target(arguments.pop("draft_ids"), law, arguments.pop("target"), **arguments)
