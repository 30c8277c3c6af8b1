"""One implementation of a distillation loss, from hidden states to the gradients; runs in either environment.

Settings: implementation, tokens, vocab, beta (TRL's: 0 forward KL, 1 reverse KL, between them the generalised JSD), and
`reference`, a file of float64 gradients to be compared with, or null; the implementation `reference` writes that file.
"""

from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import numpy as np
import torch
from measuring import measured, serve
from torch import Tensor
from torch.nn.functional import linear

HIDDEN = 256
TOP_K = 64
WARM_UP_TOKENS = 16
REFERENCE_ROWS = 64


class Problem:
    """Student and teacher, [T, H] and [V, H] float32 each: logits with a standard deviation of 2, related laws."""

    def __init__(self, tokens: int, vocab: int, beta: float) -> None:
        generator = torch.Generator().manual_seed(vocab + tokens)

        def noise(rows: int) -> Tensor:
            return torch.randn(rows, HIDDEN, generator=generator)

        self.beta = beta
        self.hidden = noise(tokens)
        self.weight = noise(vocab).mul_(2 / HIDDEN**0.5)
        self.teacher_hidden = noise(tokens).mul_(0.5).add_(self.hidden)
        self.teacher_weight = noise(vocab).mul_(1 / HIDDEN**0.5).add_(self.weight)

    def leaves(self, rows: slice) -> tuple[Tensor, Tensor]:
        """Return the student's hidden states and weight, asking for gradients."""
        return self.hidden[rows].detach().requires_grad_(), self.weight.detach().requires_grad_()


Implementation = Callable[[Problem, slice], tuple[Tensor, Tensor]]
"""The gradients of the mean over the tokens to hidden states and weight."""


def divergence(student: Tensor, teacher: Tensor, beta: float) -> Tensor:
    """Return [n] from log-probs [n, V], the formulas as they are written."""
    if beta == 1:
        return (student.exp() * (student - teacher)).sum(-1)
    if beta == 0:
        return (teacher.exp() * (teacher - student)).sum(-1)
    mixture = ((1 - beta) * student.exp() + beta * teacher.exp()).log()
    from_teacher = (teacher.exp() * (teacher - mixture)).sum(-1)
    return beta * from_teacher + (1 - beta) * (student.exp() * (student - mixture)).sum(-1)


def plain(problem: Problem, rows: slice) -> tuple[Tensor, Tensor]:
    """log_softmax and autograd."""
    hidden, weight = problem.leaves(rows)
    student = linear(hidden, weight).log_softmax(-1)
    with torch.no_grad():
        teacher = linear(problem.teacher_hidden[rows], problem.teacher_weight).log_softmax(-1)
    divergence(student, teacher, problem.beta).mean().backward()
    return hidden.grad, weight.grad


def tutelage(problem: Problem, rows: slice) -> tuple[Tensor, Tensor]:
    """Tiles of the recipe's default size."""
    from actors.head import Head
    from learner.config import LearnerSection
    from learner.distillation import FullDistillation
    from learner.divergences import ForwardKL, JensenShannon, ReverseKL
    from learner.losses import Tokens
    from learner.tiles import OutputHead, loss_in_tiles

    hidden, weight = problem.leaves(rows)
    head = Head(stop_token_ids=())
    ends = {0: ForwardKL(), 1: ReverseKL()}
    loss = FullDistillation(
        divergence=ends[problem.beta] if problem.beta in ends else JensenShannon(jsd_beta=problem.beta),
        teacher=OutputHead(weight=problem.teacher_weight, head=head),
        teacher_logprob_floor=-1e4,  # the peers have none
    )
    n = len(hidden)
    tokens = Tokens(
        token_ids=torch.zeros(n, dtype=torch.int64), weights=torch.full((n,), 1 / n),
        rollouts=torch.zeros(n, dtype=torch.int64), behaviour_logprobs=torch.zeros(n), advantages=torch.zeros(n),
        teacher_hidden=problem.teacher_hidden[rows],
    )  # fmt: skip
    output = OutputHead(weight=weight, head=head)
    loss_in_tiles(hidden, output, loss, tokens, tile_bytes=LearnerSection().tile_mib * 2**20).total.backward()
    return hidden.grad, weight.grad


def trl_chunked(problem: Problem, rows: slice) -> tuple[Tensor, Tensor]:
    """The loss of TRL's DistillationTrainer."""
    from trl.trainer.distillation_trainer import _chunked_divergence_loss

    hidden, weight = problem.leaves(rows)
    mask = torch.ones(1, len(hidden), dtype=torch.int64)
    teacher = problem.teacher_hidden[rows]
    _chunked_divergence_loss(
        hidden[None], teacher[None], weight, problem.teacher_weight, mask, problem.beta, num_items_in_batch=len(hidden)
    )[0].backward()
    return hidden.grad, weight.grad


def trl_gkd(problem: Problem, rows: slice) -> tuple[Tensor, Tensor]:
    """The loss of TRL's GKDTrainer."""
    from trl.experimental.gkd.gkd_trainer import GKDTrainer

    hidden, weight = problem.leaves(rows)
    with torch.no_grad():
        teacher = linear(problem.teacher_hidden[rows], problem.teacher_weight)
    GKDTrainer.generalized_jsd_loss(linear(hidden, weight), teacher, beta=problem.beta).backward()
    return hidden.grad, weight.grad


def verl_top_k(problem: Problem, rows: slice) -> tuple[Tensor, Tensor]:
    """verl's forward KL on the teacher's likeliest ids, which are given: another loss than the full vocabulary's."""
    from verl.trainer.distillation.fsdp.losses import compute_forward_kl_topk

    hidden, weight = problem.leaves(rows)
    ids, logprobs = teacher_top_k(problem, rows)
    config = SimpleNamespace(distillation_loss=SimpleNamespace(log_prob_min_clamp=None, use_chunked_topk=False))
    losses = compute_forward_kl_topk(
        linear(hidden, weight)[None], torch.nested.as_nested_tensor([logprobs], layout=torch.jagged),
        torch.nested.as_nested_tensor([ids], layout=torch.jagged), config, "thd",
    )["distillation_losses"]  # fmt: skip
    losses.mean().backward()
    return hidden.grad, weight.grad


def teacher_top_k(problem: Problem, rows: slice) -> tuple[Tensor, Tensor]:
    """Return ids and log-probs [n, K], made once and a few rows at a time: no part of what is measured."""
    if not hasattr(problem, "top_k"):
        parts = []
        for part in problem.teacher_hidden.split(REFERENCE_ROWS):
            logprobs, ids = linear(part, problem.teacher_weight).log_softmax(-1).topk(TOP_K)
            parts.append((ids, logprobs))
        problem.top_k = tuple(torch.cat(columns) for columns in zip(*parts, strict=True))
    ids, logprobs = problem.top_k
    return ids[rows], logprobs[rows]


def reference(problem: Problem, *, top_k: bool) -> tuple[Tensor, Tensor]:
    """The plain formula in float64, with autograd, a few rows at a time; verl's own formula with top_k."""
    weight = problem.weight.double().requires_grad_()
    teacher_weight, num_tokens = problem.teacher_weight.double(), len(problem.hidden)
    parts = []
    for start in range(0, num_tokens, REFERENCE_ROWS):
        rows = slice(start, start + REFERENCE_ROWS)
        hidden = problem.hidden[rows].double().requires_grad_()
        student = linear(hidden, weight).log_softmax(-1)
        if top_k:
            ids, logprobs = teacher_top_k(problem, rows)
            values = (logprobs.double().exp() * (logprobs.double() - student.gather(-1, ids))).sum(-1)
        else:
            with torch.no_grad():
                teacher = linear(problem.teacher_hidden[rows].double(), teacher_weight).log_softmax(-1)
            values = divergence(student, teacher, problem.beta)
        (values.sum() / num_tokens).backward()
        parts.append(hidden.grad)
    return torch.cat(parts), weight.grad


IMPLEMENTATIONS: dict[str, Implementation] = {
    "tutelage": tutelage,
    "plain": plain,
    "trl chunked": trl_chunked,
    "trl gkd": trl_gkd,
    "verl top-k": verl_top_k,
}


def run(settings: Any) -> Any:
    """Measure one implementation, or write the reference."""
    torch.set_num_threads(1)
    name, path = settings["implementation"], settings["reference"]
    problem = Problem(settings["tokens"], settings["vocab"], settings["beta"])
    if name.startswith("reference"):
        hidden, weight = reference(problem, top_k=name == "reference top-k")
        np.savez(path, hidden=hidden.numpy(), weight=weight.numpy())
        return {}
    call = IMPLEMENTATIONS[name]
    if name == "verl top-k":
        teacher_top_k(problem, slice(0, 1))
    call(problem, slice(0, WARM_UP_TOKENS))
    gradients: list[Tensor] = []
    record: dict[str, Any] = measured(lambda: gradients.extend(call(problem, slice(None))))
    if path is not None:
        with np.load(path) as exact:
            pairs = zip(gradients, (exact["hidden"], exact["weight"]), strict=True)
            record["max_grad_error"] = max(relative_error(ours, theirs) for ours, theirs in pairs)
    return record


def relative_error(gradient: Tensor, exact: Any) -> float:
    """Return the largest difference over the largest number of the exact gradient."""
    return float(np.abs(gradient.numpy() - exact).max() / np.abs(exact).max())


if __name__ == "__main__":
    serve(run)
