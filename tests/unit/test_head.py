"""How logits are read: one stop event, one shared vocabulary, and the laws that a student alone may draw from."""

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from actors.head import PLAIN, Decoding, Head

seeds = st.integers(0, 2**31 - 1)


def random_logits(seed: int, *shape: int) -> Tensor:
    return 3 * torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


@given(seed=seeds, stops=st.permutations(range(8)).map(lambda ids: tuple(ids[:3])))
def test_merging_moves_the_mass_of_all_stop_tokens_to_the_first(seed: int, stops: tuple[int, ...]) -> None:
    logits = random_logits(seed, 2, 4, 8)
    before, after = logits.softmax(-1), Head(stop_token_ids=stops).merge(logits).softmax(-1)
    assert torch.allclose(after[..., stops[0]], before[..., list(stops)].sum(-1), atol=1e-12)
    assert (after[..., list(stops[1:])] == 0).all()
    others = [i for i in range(8) if i not in stops]
    assert torch.allclose(after[..., others], before[..., others], atol=1e-12)


@given(seed=seeds, temperature=st.sampled_from([1.0, 0.7, 2.0]))
def test_the_gradient_of_the_merged_law_is_that_of_the_plain_formula(seed: int, temperature: float) -> None:
    head = Head(stop_token_ids=(4, 1), vocab_size=6, temperature=temperature)
    logits = random_logits(seed, 3, 9).requires_grad_()
    weights = random_logits(seed + 1, 3, 5)
    kept = [0, 2, 3, 4, 5]
    merged = head.scores(logits).log_softmax(-1)[:, kept]
    probabilities = (logits[:, :6] / temperature).exp()
    masses = [probabilities[:, 1] + probabilities[:, 4] if i == 4 else probabilities[:, i] for i in kept]
    plain = (torch.stack(masses, -1) / probabilities.sum(-1, keepdim=True)).log()
    assert torch.allclose(merged, plain, atol=1e-12)
    ours, theirs = (torch.autograd.grad((law * weights).sum(), logits)[0] for law in (merged, plain))
    assert torch.allclose(ours, theirs, atol=1e-10)
    assert (ours[:, 6:] == 0).all()
    assert torch.allclose(head.logprobs(logits)[:, kept], plain.float(), atol=1e-5)


def test_one_stop_token_and_no_shared_vocabulary_leave_the_logits_as_they_are() -> None:
    logits = random_logits(0, 2, 5)
    assert torch.equal(Head(stop_token_ids=(3,)).merge(logits), logits)
    assert Head(stop_token_ids=(3, 1)).stop_token_id == 3


def test_a_stop_token_given_twice_is_refused() -> None:
    with pytest.raises(ValueError, match="must be different ids, got"):
        Head(stop_token_ids=(2, 2))


def test_without_a_stop_token_nothing_is_merged_and_no_id_stops() -> None:
    logits = random_logits(0, 2, 5)
    assert torch.equal(Head(stop_token_ids=()).merge(logits), logits)
    assert Head(stop_token_ids=()).stop_token_id == -1


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_log_probs_are_of_the_law_at_the_temperature_in_float32(dtype: torch.dtype) -> None:
    logits = random_logits(1, 4, 7).to(dtype)
    told = Head(stop_token_ids=(0,), temperature=0.5).logprobs(logits)
    assert told.dtype == torch.float32
    assert torch.allclose(told.double(), (logits.double() / 0.5).log_softmax(-1), atol=1e-5)


def laws(*probabilities: float) -> Tensor:
    return torch.tensor([probabilities], dtype=torch.float64).log()


def test_the_plain_decoding_is_the_law_itself() -> None:
    given_law = laws(0.5, 0.5)
    assert PLAIN.logprobs(given_law) is given_law
    assert Decoding().is_plain
    assert not Decoding(top_k=3).is_plain


@pytest.mark.parametrize(
    ("decoding", "given_law", "expected"),
    [
        (Decoding(temperature=0.5), (0.6, 0.3, 0.1), (36 / 46, 9 / 46, 1 / 46)),
        (Decoding(top_k=2), (0.1, 0.6, 0.3), (0, 2 / 3, 1 / 3)),
        (Decoding(top_k=1), (0.1, 0.6, 0.3), (0, 1, 0)),
        (Decoding(top_k=5), (0.1, 0.6, 0.3), (0.1, 0.6, 0.3)),
        # The next one only begins where the mass of those before is less than top_p.
        (Decoding(top_p=0.5), (0.25, 0.5, 0.25), (0, 1, 0)),
        (Decoding(top_p=0.51), (0.125, 0.5, 0.375), (0, 4 / 7, 3 / 7)),
        (Decoding(top_p=0.01), (0.25, 0.5, 0.25), (0, 1, 0)),
        (Decoding(top_p=1.0), (0.25, 0.5, 0.25), (0.25, 0.5, 0.25)),
        # Top-k first: of the two that are left, one has a mass of 2/3.
        (Decoding(top_k=2, top_p=0.6), (0.1, 0.6, 0.3), (0, 1, 0)),
        (Decoding(temperature=0.5, top_k=2), (0.6, 0.3, 0.1), (0.8, 0.2, 0)),
    ],
)
def test_decoding_draws_from_the_law_of_its_rule(
    decoding: Decoding, given_law: tuple[float, ...], expected: tuple[float, ...]
) -> None:
    drawn = decoding.logprobs(laws(*given_law))
    assert drawn.exp()[0].tolist() == pytest.approx(expected, abs=1e-12)
    assert [value == -math.inf for value in drawn[0].tolist()] == [share == 0 for share in expected]


def test_ties_at_the_edge_of_top_k_all_stay_and_those_of_top_p_do_not() -> None:
    tied = laws(0.25, 0.25, 0.25, 0.25)
    assert Decoding(top_k=2).logprobs(tied).exp()[0].tolist() == pytest.approx([0.25] * 4)
    assert sorted(Decoding(top_p=0.5).logprobs(tied).exp()[0].tolist()) == pytest.approx([0, 0, 0.5, 0.5])


@given(
    seed=seeds,
    decoding=st.builds(
        Decoding,
        temperature=st.sampled_from([0.3, 1.0, 1.7]),
        top_k=st.sampled_from([None, 1, 3, 20]),
        top_p=st.sampled_from([0.05, 0.5, 0.95, 1.0]),
    ),
)
def test_every_decoding_is_a_law_on_the_likeliest_of_what_the_head_allows(seed: int, decoding: Decoding) -> None:
    allowed = Head(stop_token_ids=(2, 4)).logprobs(random_logits(seed, 5, 9))
    drawn = decoding.logprobs(allowed)
    assert torch.allclose(drawn.exp().sum(-1), torch.ones(5), atol=1e-5)
    assert (drawn[:, 4] == -torch.inf).all()
    for law, model in zip(drawn, allowed, strict=True):
        kept = law != -torch.inf
        assert kept[model.argmax()]
        assert model[kept].min() >= model[~kept].max(), "nothing left out is likelier than what is kept"
