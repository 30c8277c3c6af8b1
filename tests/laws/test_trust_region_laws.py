"""The blend: golden values, the budget, the path, what happens at the edges, and exactness of verification."""

import math
import re

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from actors.trust_region import blend, solve_beta, verify_draft

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


def emission_law(student: Tensor, teacher: Tensor, epsilon: float) -> Tensor:
    """Integrate `verify_draft` over its uniforms for one position: the exact law of what it emits.

    Each draft x is kept up to a threshold u* of the first uniform, found by bisection on the function itself; the
    redrawn token's law is read off a fine grid of the second uniform.
    """
    vocab, grid = len(student), 4096
    law = torch.zeros(vocab, dtype=torch.float64)
    cells = (torch.arange(grid, dtype=torch.float64) + 0.5) / grid
    for x in range(vocab):

        def kept(u: float, x: int = x) -> bool:
            verdict = verify_draft(torch.tensor([[x]]), student[None, None], teacher[None, None], epsilon,
                                   uniforms=torch.tensor([[[u, 0.5]]], dtype=torch.float64))  # fmt: skip
            return bool(verdict.num_accepted[0] == 1)

        low, high = 0.0, 1.0
        if kept(1 - 2**-53):
            low = 1.0
        else:
            for _ in range(40):
                middle = (low + high) / 2
                low, high = (middle, high) if kept(middle) else (low, middle)
        drafted = float(student.double().softmax(-1)[x])
        law[x] += drafted * low
        if low < 1.0:
            u = torch.stack([torch.full((grid,), 1 - 2**-53, dtype=torch.float64), cells], -1)[:, None]
            verdict = verify_draft(torch.full((grid, 1), x), student.expand(grid, 1, vocab),
                                   teacher.expand(grid, 1, vocab), epsilon, uniforms=u)  # fmt: skip
            redrawn = torch.bincount(verdict.replacement_ids, minlength=vocab).double() / grid
            law += drafted * (1 - low) * redrawn
    return law


@pytest.mark.parametrize("epsilon", [0.0, 0.02, 0.3, 5.0])
@pytest.mark.parametrize("seed", [0, 1])
def test_what_verification_emits_is_distributed_exactly_as_mu(epsilon: float, seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    student, teacher = torch.randn(2, 6, generator=generator, dtype=torch.float64).mul(2).log_softmax(-1)
    expected = blend(student, teacher, epsilon).logprobs.exp()
    law = emission_law(student, teacher, epsilon)
    assert law.tolist() == pytest.approx(expected.tolist(), abs=3e-4)
    if epsilon >= 0.02:  # the control: the student's own law is another one
        assert law.tolist() != pytest.approx(student.exp().tolist(), abs=3e-4)


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


def test_a_row_without_a_draft_is_refused() -> None:
    law = torch.zeros(2, 1, 3).log_softmax(-1)
    with pytest.raises(ValueError, match="num_drafted must be at least 1 in every row, got 0 in row 1"):
        verify_draft(torch.zeros(2, 1, dtype=torch.long), law, law, 0.1, num_drafted=torch.tensor([1, 0]))
