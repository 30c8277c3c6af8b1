"""Laws of laws and tiles: gradients are those of the plain formulas, however tokens are cut, and no [N, V] is made."""

import math
import weakref
from collections.abc import Callable

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch.nn.functional import linear
from torch.utils._python_dispatch import TorchDispatchMode

import learner.laws
from actors.head import Head
from learner.distillation import FullDistillation, SampledReverseKL, SupervisedFineTuning, SupportDistillation
from learner.divergences import ForwardKL, JensenShannon, ReverseKL
from learner.laws import Laws
from learner.losses import Loss, LossOutputs, Tokens, WeightedSum, num_parts
from learner.policy_losses import ClippedSurrogate, ReferenceKL
from learner.tiles import OutputHead, logprobs_in_tiles, loss_in_tiles

seeds = st.integers(0, 2**31 - 1)
ALL = 2**40
"""Bytes enough for all tokens in one tile."""

HEADS = {
    "trivial": Head(stop_token_ids=(1,)),
    "no stop": Head(stop_token_ids=()),
    "cut": Head(stop_token_ids=(1,), vocab_size=9),
    "all at once": Head(stop_token_ids=(4, 2), vocab_size=9, temperature=0.7),
}


def normal(seed: int, *shape: int, dtype: torch.dtype = torch.float64) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=dtype)


def make_output(
    seed: int, *, vocab_size: int = 11, hidden_size: int = 4, head: Head = HEADS["trivial"], bias: bool = True
) -> OutputHead:
    return OutputHead(
        weight=normal(seed, vocab_size, hidden_size).requires_grad_(),
        bias=normal(seed + 1, vocab_size).requires_grad_() if bias else None,
        head=head,
    )


def make_tokens(seed: int, num_tokens: int, *, vocab_size: int, support_size: int = 3, hidden_size: int = 4) -> Tokens:
    ids = normal(seed, num_tokens, vocab_size).argsort(-1)
    teacher = normal(seed + 1, num_tokens, vocab_size).log_softmax(-1)
    support_ids = ids[:, :support_size]
    return Tokens(
        token_ids=ids[:, -1],
        weights=normal(seed + 2, num_tokens).exp(),
        rollouts=torch.arange(num_tokens),
        behaviour_logprobs=-normal(seed + 3, num_tokens).abs(),
        advantages=normal(seed + 4, num_tokens),
        support_ids=support_ids,
        support_teacher_logprobs=teacher.gather(-1, support_ids),
        support_teacher_tails=teacher.scatter(-1, support_ids, -math.inf).logsumexp(-1),
        teacher_hidden=normal(seed + 5, num_tokens, hidden_size),
    )


class LogprobsAndEntropy:
    """A loss with a gradient to log-probs alone, and a metric."""

    needs_sequence_ratios = False

    def __call__(self, laws: Laws, tokens: Tokens) -> LossOutputs:
        logprobs = laws.logprobs(tokens.token_ids[:, None])[:, 0]
        return LossOutputs(per_token=-logprobs.square(), metrics={"entropy": laws.entropy().sum()})


def laws_of(scores: Tensor, ids: Tensor) -> dict[str, tuple[Tensor, Tensor]]:
    """What `Laws` returns, and the same by plain torch."""
    laws, plain = Laws(scores), scores.log_softmax(-1)
    kept = torch.ones_like(scores, dtype=torch.bool).scatter(-1, ids, False)
    return {
        "logprobs": (laws.logprobs(ids), plain.gather(-1, ids)),
        "token": (laws.token_logprobs(ids[:, 0]), plain.gather(-1, ids[:, :1])[:, 0]),
        "both": (
            laws.logprobs_and_outside(ids),
            torch.cat([plain.gather(-1, ids), torch.where(kept, plain.exp(), 0).sum(-1, keepdim=True).log()], -1),
        ),
    }


@pytest.mark.parametrize("elements", [1, 20, 2**18])
@settings(max_examples=20)
@given(seed=seeds)
def test_log_probs_and_the_mass_outside_have_the_gradients_of_the_plain_formulas(elements: int, seed: int) -> None:
    scores, ids = (3 * normal(seed, 5, 7)).requires_grad_(), normal(seed + 1, 5, 7).argsort(-1)[:, :3]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(learner.laws, "_ELEMENTS_PER_THREAD", elements)
        for ours, plain in laws_of(scores, ids).values():
            upstream = torch.randn_like(plain)
            assert torch.allclose(ours, plain, atol=1e-12)
            gradients = [torch.autograd.grad(value, scores, upstream, retain_graph=True)[0] for value in (ours, plain)]
            assert torch.allclose(*gradients, atol=1e-12)


@settings(max_examples=20)
@given(seed=seeds)
def test_an_id_that_is_asked_for_twice_has_both_gradients(seed: int) -> None:
    scores = normal(seed, 2, 5).requires_grad_()
    ids = torch.tensor([[1, 3, 1], [0, 0, 0]])
    upstream = normal(seed + 1, 2, 3)
    ours, plain = Laws(scores).logprobs(ids), scores.log_softmax(-1).gather(-1, ids)
    gradients = [torch.autograd.grad(value, scores, upstream)[0] for value in (ours, plain)]
    assert torch.allclose(*gradients, atol=1e-12)


def test_a_forbidden_id_has_log_prob_minus_infinity_and_no_gradient() -> None:
    free = normal(0, 2, 4).requires_grad_()
    scores = torch.cat([free, torch.full((2, 1), -math.inf)], -1).detach().requires_grad_()
    ids = torch.tensor([[0, 4], [4, 2]])
    laws = Laws(scores)
    logprobs = laws.logprobs(ids)
    assert (logprobs[ids == 4] == -math.inf).all()
    (gradient,) = torch.autograd.grad(logprobs.sum(), scores)
    (expected,) = torch.autograd.grad(free.log_softmax(-1).gather(-1, torch.tensor([[0], [2]])).sum(), free)
    assert torch.allclose(gradient, torch.cat([expected, torch.zeros(2, 1)], -1), atol=1e-12)
    everything = torch.tensor([[0, 1, 2, 3], [3, 2, 1, 0]])
    outside = laws.logprobs_and_outside(everything)[:, -1]
    assert (outside == -math.inf).all()
    assert (torch.autograd.grad(outside.sum(), scores)[0] == 0).all()
    expected_entropy = -(free.log_softmax(-1).exp() * free.log_softmax(-1)).sum(-1)
    assert torch.allclose(laws.entropy(), expected_entropy, atol=1e-12)


def test_the_gradient_of_a_tiny_mass_outside_is_the_law_outside() -> None:
    scores = torch.tensor([[200.0, 1.0, 2.0]]).requires_grad_()
    outside = Laws(scores).logprobs_and_outside(torch.tensor([[0]]))[:, -1]
    (gradient,) = torch.autograd.grad(outside.sum(), scores)
    law = torch.tensor([1.0, 2.0]).softmax(-1)
    assert torch.allclose(gradient, torch.cat([torch.tensor([-1.0]), law])[None], atol=1e-6)


@settings(max_examples=20)
@given(seed=seeds)
def test_entropy_is_the_plain_formula(seed: int) -> None:
    scores = normal(seed, 3, 6).requires_grad_()
    plain = scores.detach().log_softmax(-1)
    entropy = Laws(scores).entropy()
    assert torch.allclose(entropy, -(plain.exp() * plain).sum(-1), atol=1e-12)
    assert not entropy.requires_grad


def test_log_probs_of_the_same_tokens_are_made_once_and_of_others_anew() -> None:
    scores, token_ids, others = normal(0, 3, 6).requires_grad_(), torch.tensor([0, 5, 2]), torch.tensor([1, 1, 1])
    laws = Laws(scores)
    first = laws.token_logprobs(token_ids)
    assert laws.token_logprobs(token_ids) is first
    plain = scores.detach().log_softmax(-1)
    assert torch.allclose(laws.token_logprobs(others), plain[:, 1], atol=1e-12)
    assert torch.allclose(laws.token_logprobs(token_ids), first, atol=0)


def test_laws_of_no_position_are_empty() -> None:
    scores = torch.empty(0, 5).requires_grad_()
    laws = Laws(scores)
    both = laws.logprobs_and_outside(torch.empty(0, 2, dtype=torch.long))
    assert both.shape == (0, 3)
    assert torch.autograd.grad(both.sum(), scores)[0].shape == (0, 5)
    assert laws.entropy().shape == (0,)


def by_hand(hidden: Tensor, output: OutputHead) -> Tensor:
    """The law [N, V] that logits mean: cut to the vocabulary, tempered, stop tokens' mass moved to the first."""
    logits = hidden @ output.weight.T + (0 if output.bias is None else output.bias)
    law = (logits[:, : output.head.vocab_size] / output.head.temperature).softmax(-1)
    first, *others = output.head.stop_token_ids or (0,)
    moved = law.clone()
    moved[:, first] = law[:, [first, *others]].sum(-1)
    moved[:, others] = 0
    return moved


@pytest.mark.parametrize("name", HEADS)
@pytest.mark.parametrize("bias", [True, False])
@settings(max_examples=20)
@given(seed=seeds)
def test_scores_are_those_of_the_law_worked_out_by_hand(name: str, bias: bool, seed: int) -> None:
    hidden, output = normal(seed, 3, 4), make_output(seed, head=HEADS[name], bias=bias)
    law = by_hand(hidden, output)
    scores = output.scores(hidden)
    assert torch.allclose(scores.softmax(-1), law, atol=1e-12)
    assert not scores.requires_grad
    differentiable = output.head.scores(linear(hidden, output.weight, output.bias))
    assert torch.allclose(scores, differentiable, atol=1e-12)
    ids = torch.zeros(3, dtype=torch.long)
    ours = logprobs_in_tiles(hidden, output, ids, tile_bytes=1)
    assert torch.allclose(ours, law[:, 0].log().detach(), atol=1e-12)
    assert not ours.requires_grad


@pytest.mark.parametrize("name", HEADS)
@pytest.mark.parametrize("num_tokens", [0, 1, 7])
@pytest.mark.parametrize("tile", [1, 3, 7])
def test_however_tokens_are_cut_the_loss_is_that_of_all_at_once(name: str, num_tokens: int, tile: int) -> None:
    output = make_output(3, head=HEADS[name])
    hidden = normal(1, num_tokens, 4).requires_grad_()
    tokens = make_tokens(2, num_tokens, vocab_size=9)
    tokens = replaced(tokens, token_ids=torch.zeros(num_tokens, dtype=torch.long))
    outcome = loss_in_tiles(hidden, output, LogprobsAndEntropy(), tokens, tile_bytes=tile * 3 * 8 * output.vocab_size)
    law = by_hand(hidden, output)
    per_token = -law[:, 0].log().square()
    entropy = -torch.special.xlogy(law, law).sum()
    inputs = [hidden, output.weight, output.bias]
    expected = torch.autograd.grad((tokens.weights * per_token).sum(), inputs)
    assert torch.allclose(outcome.per_token, per_token, atol=1e-10)
    assert torch.allclose(outcome.total, (tokens.weights * per_token).sum(), atol=1e-10)
    assert torch.allclose(outcome.metrics["entropy"], entropy, atol=1e-10)
    for ours, theirs in zip(torch.autograd.grad(outcome.total, inputs), expected, strict=True):
        assert torch.allclose(ours, theirs, atol=1e-10)


def replaced(tokens: Tokens, **values: Tensor | None) -> Tokens:
    fields = {name: getattr(tokens, name) for name in Tokens.__dataclass_fields__}
    return Tokens(**{**fields, **values})


def test_the_total_is_an_ordinary_tensor_of_which_more_can_be_made() -> None:
    """A weight that is also the input embedding gets both of its gradients, and a factor reaches all of them."""
    output, ids = make_output(0, bias=False), torch.tensor([3, 0, 5, 3])
    tokens = make_tokens(1, 4, vocab_size=11)
    hidden = output.weight[ids].tanh()
    total = 3 * loss_in_tiles(hidden, output, LogprobsAndEntropy(), tokens, tile_bytes=1).total + hidden.sum()
    per_token = -(hidden @ output.weight.T).log_softmax(-1).gather(-1, tokens.token_ids[:, None])[:, 0].square()
    expected = torch.autograd.grad(
        3 * (tokens.weights * per_token).sum() + hidden.sum(), output.weight, retain_graph=True
    )[0]
    total.backward()
    assert torch.allclose(output.weight.grad, expected, atol=1e-10)


def test_what_asks_for_no_gradient_gets_none() -> None:
    tokens = make_tokens(1, 4, vocab_size=11)
    frozen = OutputHead(weight=normal(0, 11, 4), bias=normal(1, 11), head=HEADS["trivial"])
    hidden = normal(2, 4, 4).requires_grad_()
    with RecordedSizes() as recorded:
        loss_in_tiles(hidden, frozen, LogprobsAndEntropy(), tokens, tile_bytes=1).total.backward()
    assert frozen.weight.grad is None
    assert hidden.grad is not None
    assert frozen.weight.numel() not in recorded.sizes
    learned = make_output(0)
    fixed = hidden.detach()
    loss_in_tiles(fixed, learned, LogprobsAndEntropy(), tokens, tile_bytes=1).total.backward()
    assert fixed.grad is None
    assert learned.weight.grad is not None
    with torch.no_grad():
        outcome = loss_in_tiles(hidden, learned, LogprobsAndEntropy(), tokens, tile_bytes=1)
    assert not outcome.total.requires_grad
    again = loss_in_tiles(hidden, learned, LogprobsAndEntropy(), tokens, tile_bytes=1)
    assert torch.equal(outcome.per_token, again.per_token)


def test_a_second_backward_pass_is_refused() -> None:
    hidden = normal(0, 3, 4).requires_grad_()
    tokens = make_tokens(1, 3, vocab_size=11)
    total = loss_in_tiles(hidden, make_output(0), LogprobsAndEntropy(), tokens, tile_bytes=ALL).total
    total.backward(retain_graph=True)
    with pytest.raises(RuntimeError, match="one backward pass"):
        total.backward()


def test_a_loss_that_is_not_finite_is_told_of_even_where_it_has_no_weight() -> None:
    hidden = normal(0, 3, 4)
    hidden[1, 0] = math.nan
    tokens = replaced(make_tokens(1, 3, vocab_size=11), weights=torch.tensor([1.0, 0.0, 1.0], dtype=torch.float64))
    losses: list[Loss] = [
        FullDistillation(divergence=ReverseKL(), teacher=make_output(1)),
        SupportDistillation(divergence=ReverseKL(), tail=True),
        SupportDistillation(divergence=JensenShannon(0.5)),
        SupervisedFineTuning(),
    ]
    for loss in losses:
        outcome = loss_in_tiles(hidden.requires_grad_(), make_output(0), loss, tokens, tile_bytes=ALL)
        assert outcome.per_token.isfinite().tolist() == [True, False, True]


def test_tokens_without_weight_have_no_gradient() -> None:
    hidden = normal(0, 3, 4).requires_grad_()
    tokens = replaced(make_tokens(1, 3, vocab_size=11), weights=torch.tensor([0.0, 2.0, 0.0], dtype=torch.float64))
    loss_in_tiles(hidden, make_output(0), LogprobsAndEntropy(), tokens, tile_bytes=ALL).total.backward()
    assert (hidden.grad.abs().sum(-1) != 0).tolist() == [False, True, False]


@pytest.mark.parametrize("head", ["trivial", "all at once"])
def test_sixteen_bit_weights_are_computed_with_in_float32_and_get_sixteen_bit_gradients(head: str) -> None:
    hidden = normal(0, 40, 32).bfloat16().requires_grad_()
    wide = make_output(1, vocab_size=11, hidden_size=32, head=HEADS[head])
    output = OutputHead(
        weight=wide.weight.detach().bfloat16().requires_grad_(), bias=wide.bias.detach().bfloat16(), head=wide.head
    )
    tokens = replaced(make_tokens(1, 40, vocab_size=9), token_ids=torch.zeros(40, dtype=torch.long))
    tokens = replaced(tokens, weights=tokens.weights.float())
    outcome = loss_in_tiles(hidden, output, SupervisedFineTuning(), tokens, tile_bytes=1)
    outcome.total.backward()
    exact_hidden, exact_weight = (tensor.detach().double().requires_grad_() for tensor in (hidden, output.weight))
    exact = OutputHead(weight=exact_weight, bias=output.bias.double(), head=output.head)
    (-by_hand(exact_hidden, exact)[:, 0].log() * tokens.weights).sum().backward()
    assert outcome.per_token.dtype == torch.float32
    assert outcome.total.dtype == torch.float32
    for ours, theirs in [(hidden.grad, exact_hidden.grad), (output.weight.grad, exact_weight.grad)]:
        assert ours.dtype == torch.bfloat16
        assert (ours.double() - theirs).norm() <= 0.02 * theirs.norm()


class RecordedSizes(TorchDispatchMode):
    """Remembers the number of elements of every tensor that an operation returns in memory of its own."""

    def __init__(self) -> None:
        super().__init__()
        self.sizes: set[int] = set()

    def __torch_dispatch__(
        self, func: Callable[..., object], types: object, args: tuple[object, ...] = (), kwargs: object = None
    ) -> object:
        result = func(*args, **(kwargs or {}))
        given = {each.untyped_storage().data_ptr() for each in args if isinstance(each, Tensor)}
        for tensor in result if isinstance(result, tuple | list) else (result,):
            if isinstance(tensor, Tensor) and tensor.untyped_storage().data_ptr() not in given:
                self.sizes.add(tensor.numel())
        return result


TEACHER = make_output(5, vocab_size=500)
LOSSES: dict[str, Loss] = {
    "fine-tuning": SupervisedFineTuning(),
    "sampled": SampledReverseKL(),
    "support": SupportDistillation(divergence=ReverseKL()),
    "tail": SupportDistillation(divergence=JensenShannon(0.3), tail=True, veto_beta=0.4),
    "full": FullDistillation(divergence=ReverseKL(), teacher=TEACHER),
    "full with veto": FullDistillation(divergence=JensenShannon(0.3), teacher=TEACHER, veto_beta=0.4),
    "sum": WeightedSum(
        parts=((1.0, SupervisedFineTuning()), (0.5, FullDistillation(divergence=ForwardKL(), teacher=TEACHER)))
    ),
}


@pytest.mark.parametrize("name", LOSSES)
@pytest.mark.parametrize("head", [Head(stop_token_ids=(1,)), Head(stop_token_ids=(4, 2), temperature=0.5)])
def test_no_tensor_is_larger_than_a_tile(name: str, head: Head) -> None:
    num_tokens, tile, vocab_size = 64, 8, 500
    output = make_output(0, vocab_size=vocab_size, head=head)
    support_size = 1 if name == "sampled" else 3
    tokens = make_tokens(1, num_tokens, vocab_size=vocab_size, support_size=support_size)
    hidden = normal(2, num_tokens, 4).requires_grad_()
    with RecordedSizes() as recorded:
        tile_bytes = tile * (2 + num_parts(LOSSES[name])) * 8 * vocab_size
        loss_in_tiles(hidden, output, LOSSES[name], tokens, tile_bytes=tile_bytes).total.backward()
    assert tile * vocab_size in recorded.sizes
    assert max(recorded.sizes) == tile * vocab_size


class LiveBytes(TorchDispatchMode):
    """Counts the bytes of all memory that operations make and that is still there, and remembers the most."""

    def __init__(self) -> None:
        super().__init__()
        self.live: dict[int, int] = {}
        self.most = 0

    def __torch_dispatch__(
        self, func: Callable[..., object], types: object, args: tuple[object, ...] = (), kwargs: object = None
    ) -> object:
        result = func(*args, **(kwargs or {}))
        given = [*args, *(kwargs or {}).values()]
        known = {each.untyped_storage().data_ptr() for each in given if isinstance(each, Tensor)}
        for tensor in result if isinstance(result, tuple | list) else (result,):
            if isinstance(tensor, Tensor) and tensor.untyped_storage().data_ptr() not in {*known, 0}:
                storage = tensor.untyped_storage()
                self.live[storage.data_ptr()] = storage.nbytes()
                weakref.finalize(storage, self.live.pop, storage.data_ptr(), None)
        self.most = max(self.most, sum(self.live.values()))
        return result


GRPO, HIDDEN = ClippedSurrogate(clip_low=0.2, clip_high=0.2), FullDistillation(divergence=ReverseKL(), teacher=TEACHER)
VETO = FullDistillation(divergence=JensenShannon(0.3), teacher=TEACHER, veto_beta=0.4)
GRPO_KL = WeightedSum(parts=((1.0, GRPO), (0.1, ReferenceKL())))
PLANNED: dict[str, tuple[Loss, int]] = {
    "grpo": (GRPO, 1),
    "grpo+kl": (GRPO_KL, 2),
    "hidden": (HIDDEN, 1),
    "hidden with veto": (VETO, 1),
    "full": (FullDistillation(divergence=ReverseKL()), 1),
    "grpo+hidden": (WeightedSum(parts=((1.0, GRPO), (0.5, HIDDEN))), 2),
    "grpo+kl+hidden": (WeightedSum(parts=((1.0, GRPO_KL), (0.5, VETO))), 3),
}


@pytest.mark.parametrize("name", PLANNED)
def test_the_memory_of_a_tile_is_what_was_asked_for(name: str) -> None:
    loss, parts = PLANNED[name]
    assert num_parts(loss) == parts
    num_tokens, vocab_size, hidden_size, itemsize = 78, 500, 4, 8
    output = make_output(0, vocab_size=vocab_size, head=Head(stop_token_ids=(4, 2), temperature=0.5))
    tokens = replaced(
        make_tokens(1, num_tokens, vocab_size=vocab_size),
        token_ids=torch.zeros(num_tokens, dtype=torch.long),
        reference_logprobs=-(normal(3, num_tokens) ** 2),
        support_ids=None,
        support_teacher_logprobs=normal(4, num_tokens, vocab_size).log_softmax(-1),
    )
    hidden = normal(2, num_tokens, hidden_size).requires_grad_()
    copy = 20 * vocab_size * itemsize
    tile_bytes = (2 + parts) * copy
    with LiveBytes() as memory:
        tiled = loss_in_tiles(hidden, output, loss, tokens, tile_bytes=tile_bytes)
    assert tiled.per_token.shape == (num_tokens,)
    kept = (vocab_size * (hidden_size + 1) + num_tokens * (hidden_size + 1)) * itemsize
    small = 20 * 50 * itemsize
    assert 2 * copy < memory.most <= tile_bytes + kept + small
    assert max(memory.live.values()) < copy
    with LiveBytes() as memory:
        logprobs_in_tiles(hidden, output, tokens.token_ids, tile_bytes=2 * copy)
    assert copy <= memory.most <= 2 * copy
