"""Trust-Region behavior Blending, the mathematics (TRB, arXiv 2605.31159).

For one prefix, with student ``pi_S``, teacher ``pi_T`` and a budget ``epsilon`` in nats, the behaviour policy is

    mu* = argmin KL(mu || pi_T)   subject to   KL(mu || pi_S) <= epsilon.

It lies on the path ``mu_beta ∝ pi_S^(1-beta) pi_T^beta``. With ``d = log pi_T - log pi_S`` and
``A(beta) = log sum pi_S exp(beta d)``,

    KL(mu_beta || pi_S) = beta A'(beta) - A(beta),     d/dbeta KL = beta Var_mu(d) >= 0,

so the largest feasible beta is found by a safeguarded Newton iteration; it works on ``sqrt(2 KL)``, which is almost
linear in beta. `verify_draft` turns student drafts into exact samples of mu by rejection.

A token without mass on either side has none in mu for beta > 0, so the divergence starts at ``-log pi_S(shared)``
as beta leaves 0. Where that exceeds epsilon, or nothing is shared, beta is 0 and mu is the student.
"""

from typing import NamedTuple

import torch
from torch import Tensor

from actors.random_numbers import sample_from_logprobs

Epsilon = float | Tensor

_CHUNK_ELEMENTS = 1 << 22
_MAX_ITERATIONS = 60
_BUDGET_SLACK = 1e-8
_ROUNDING = 1e-13


class Blend(NamedTuple):
    """The behaviour policy of each row."""

    logprobs: Tensor
    """[..., V] log mu, nats, normalised; the student's own row, bit for bit, where beta is 0."""
    beta: Tensor
    """[...] in [0, 1]."""
    divergence: Tensor
    """[...] KL(mu || student), nats."""


class Verdict(NamedTuple):
    """What became of each row's k drafts."""

    num_accepted: Tensor
    """[B] int64, how many leading drafts are kept."""
    replacement_ids: Tensor
    """[B] int64, the token redrawn at the first refused draft; -1 where none was refused."""
    beta: Tensor
    """[B, k]."""
    divergence: Tensor
    """[B, k] KL(mu || student), nats."""
    behaviour_logprobs: Tensor
    """[B, k] log mu of the emitted token: the draft, or the replacement at the first refused position."""


def solve_beta(student_logprobs: Tensor, teacher_logprobs: Tensor, epsilon: Epsilon) -> Tensor:
    """Return the largest beta in [0, 1] with ``KL(mu_beta || pi_S) <= epsilon``, for each row.

    The budget holds at the value returned, which is rounded down to the input's precision.

    Args:
        student_logprobs: [..., V] natural logs; -inf marks a token without mass. Rows are renormalised in float64.
        teacher_logprobs: [..., V] likewise.
        epsilon: nats, one for all rows or one per row ([...]).

    Returns:
        [...] in the inputs' dtype; 1 where even the teacher stays within the budget, 0 where epsilon is 0.

    Raises:
        ValueError: for NaN, +inf, a row without mass, or an epsilon that is negative or not finite; names the row.
    """
    return blend(student_logprobs, teacher_logprobs, epsilon).beta


def blend(student_logprobs: Tensor, teacher_logprobs: Tensor, epsilon: Epsilon) -> Blend:
    """Return the law closest to the teacher among those within ``epsilon`` of the student, for each row.

    Arguments and errors are those of `solve_beta`.

    Example:
        >>> student, teacher = torch.tensor([0.7, 0.2, 0.1]).log(), torch.tensor([0.1, 0.2, 0.7]).log()
        >>> round(blend(student, teacher, 0.02).beta.item(), 4)
        0.143
    """
    _check_laws(student_logprobs, teacher_logprobs)
    shape, vocab = student_logprobs.shape[:-1], student_logprobs.shape[-1]
    budget = _row_budgets(epsilon, shape, student_logprobs.device)
    student, teacher = student_logprobs.reshape(-1, vocab), teacher_logprobs.reshape(-1, vocab)
    rows_at_once = max(1, _CHUNK_ELEMENTS // vocab)
    pieces = [
        _blend_rows(student[i : i + rows_at_once], teacher[i : i + rows_at_once], budget[i : i + rows_at_once])
        for i in range(0, len(student), rows_at_once)
    ] or [_blend_rows(student, teacher, budget)]
    logprobs, beta, divergence = (torch.cat(parts) for parts in zip(*pieces, strict=True))
    return Blend(logprobs.reshape(*shape, vocab), beta.reshape(shape), divergence.reshape(shape))


def verify_draft(
    draft_ids: Tensor,
    student_logprobs: Tensor,
    teacher_logprobs: Tensor,
    epsilon: Epsilon,
    *,
    num_drafted: Tensor | None = None,
    generator: torch.Generator | None = None,
    uniforms: Tensor | None = None,
) -> Verdict:
    """Keep or redraw drafted tokens so that what is emitted is distributed exactly as mu.

    Draft x ~ pi_S is kept with probability ``min(1, mu(x) / pi_S(x))``; the first refused one is redrawn from
    ``(mu - pi_S)+`` and ends the draft (speculative sampling, Leviathan et al. 2023, with mu as the target). After k
    kept drafts nothing is added, since pi_S is not known there.

    Args:
        draft_ids: [B, k] drawn from the student's rows, k >= 1.
        student_logprobs: [B, k, V] nats, the law each draft was drawn from.
        teacher_logprobs: [B, k, V] nats.
        epsilon: nats; one for all, or [B, k].
        num_drafted: [B] how many drafts of each row are real, at least 1; all k where not given.
        generator: source of the uniforms where none are given.
        uniforms: [B, k, 2] float64 in [0, 1): for keeping, and for redrawing, at each position.

    Raises:
        ValueError: as `blend`; also for a row without a draft, which nothing could be emitted from exactly.
    """
    batch, length = draft_ids.shape
    if num_drafted is None:
        num_drafted = torch.full((batch,), length, device=draft_ids.device)
    if batch and int(num_drafted.min()) < 1:
        row = int(num_drafted.argmin())
        raise ValueError(f"num_drafted must be at least 1 in every row, got {int(num_drafted[row])} in row {row}")
    if uniforms is None:
        uniforms = torch.rand(batch, length, 2, dtype=torch.float64, generator=generator, device=draft_ids.device)
    mu = blend(student_logprobs, teacher_logprobs, epsilon)

    ids = draft_ids.long()[..., None]
    student = torch.log_softmax(student_logprobs.double(), dim=-1)  # as `blend` takes it
    ratio = (mu.logprobs.double() - student).gather(-1, ids)[..., 0].exp()
    accept_uniforms = uniforms[..., 0].to(ratio)
    refused = (accept_uniforms >= ratio) & (ratio < 1)
    positions = torch.arange(length, device=draft_ids.device)
    drafted = positions < num_drafted[:, None]
    kept_so_far = ((~refused) & drafted).long().cumprod(1)
    num_accepted = kept_so_far.sum(1)
    any_refused = num_accepted < num_drafted

    first_refused = num_accepted.clamp(max=length - 1)
    rows = torch.arange(batch, device=draft_ids.device)
    mu_rows = mu.logprobs[rows, first_refused].double()
    residual = (mu_rows.exp() - student[rows, first_refused].exp()).clamp(min=0)
    # A refusal with no residual can only be rounding: mu and the student are then the same law.
    residual_logprobs = torch.where(residual.sum(-1, keepdim=True) > 0, residual.log(), mu_rows)
    redrawn = sample_from_logprobs(residual_logprobs, uniforms[rows, first_refused, 1])
    replacement_ids = torch.where(any_refused, redrawn, -1)

    emitted = torch.where(
        any_refused[:, None] & (positions == num_accepted[:, None]), redrawn[:, None], draft_ids.long()
    )
    behaviour_logprobs = mu.logprobs.gather(-1, emitted[..., None])[..., 0]
    return Verdict(num_accepted, replacement_ids, mu.beta, mu.divergence, behaviour_logprobs)


def _blend_rows(student_logprobs: Tensor, teacher_logprobs: Tensor, epsilon: Tensor) -> Blend:
    """`blend` on [N, V] rows; epsilon [N] float64. All arithmetic in float64."""
    student = torch.log_softmax(student_logprobs.double(), dim=-1)
    teacher = torch.log_softmax(teacher_logprobs.double(), dim=-1)
    shared = student.isfinite() & teacher.isfinite()
    base = torch.where(shared, student, -torch.inf)
    tilt = torch.where(shared, teacher - student, 0.0)

    least = (-torch.logsumexp(base, dim=-1)).clamp(min=0)  # the divergence as beta leaves 0
    blendable = (epsilon > 0) & (least <= epsilon)
    base = torch.where(blendable[:, None], base, student)  # keeps the arithmetic finite in rows that stay student
    tilt = torch.where(blendable[:, None], tilt, 0.0)
    least = torch.where(blendable, least, 0.0)
    beta = torch.where(blendable, _largest_feasible(base, tilt, least, epsilon), 0.0)

    dtype = torch.promote_types(student_logprobs.dtype, teacher_logprobs.dtype)
    beta = _rounded_down(beta, dtype)
    logprobs = torch.log_softmax(base + beta.double()[:, None] * tilt, dim=-1).to(dtype)
    divergence, _ = _divergence_and_variance(base, tilt, beta.double())
    is_student = beta == 0
    return Blend(
        torch.where(is_student[:, None], student_logprobs.to(dtype), logprobs),
        beta,
        torch.where(is_student, 0.0, divergence.clamp(min=0)).to(dtype),
    )


def _largest_feasible(base: Tensor, tilt: Tensor, least: Tensor, epsilon: Tensor) -> Tensor:
    """Return the largest beta in [0, 1] whose divergence is at most epsilon, from below, for each row.

    Newton's iteration on ``f(beta) = sqrt(2 (KL - least))``, kept inside a bracket whose lower end is feasible. It aims
    a hair below the budget so that the lower end, the value returned, is the one that converges.
    """
    room = (epsilon - least).clamp(min=0)
    target = (2 * room * (1 - 0.5 * _BUDGET_SLACK)).sqrt()
    low, high = torch.zeros_like(epsilon), torch.ones_like(epsilon)
    divergence, _ = _divergence_and_variance(base, tilt, high)
    done = divergence <= epsilon
    low = torch.where(done, high, low)
    _, variance = _divergence_and_variance(base, tilt, torch.zeros_like(epsilon))
    beta = torch.nan_to_num(target / variance.sqrt(), nan=0.5, posinf=0.5).clamp(max=0.5)
    for _ in range(_MAX_ITERATIONS):
        if bool(done.all()):
            break
        divergence, variance = _divergence_and_variance(base, tilt, beta)
        feasible = divergence <= epsilon
        low = torch.where(feasible & ~done, beta, low)
        high = torch.where(~feasible & ~done, beta, high)
        near = epsilon - divergence <= _BUDGET_SLACK * room + _ROUNDING
        done = done | (feasible & near) | (high - low <= 1e-15 * high)
        value = (2 * (divergence - least).clamp(min=0)).sqrt()
        step = (target - value) * value / (beta * variance)
        newton = beta + step
        inside = newton.isfinite() & (newton > low) & (newton < high)
        beta = torch.where(inside, newton, (low + high) / 2)
    return low


def _divergence_and_variance(base: Tensor, tilt: Tensor, beta: Tensor) -> tuple[Tensor, Tensor]:
    """Return KL(mu_beta || pi_S) = beta A' - A and Var_mu(d), [N] each."""
    unnormalised = base + beta[:, None] * tilt
    log_normaliser = torch.logsumexp(unnormalised, dim=-1)
    mu = (unnormalised - log_normaliser[:, None]).exp()
    mean = (mu * tilt).sum(-1)
    variance = (mu * (tilt - mean[:, None]) ** 2).sum(-1)
    return beta * mean - log_normaliser, variance


def _rounded_down(beta: Tensor, dtype: torch.dtype) -> Tensor:
    """Cast to dtype without ever rounding up, so that the budget survives the cast."""
    cast = beta.to(dtype)
    return torch.where(cast.double() > beta, torch.nextafter(cast, torch.zeros_like(cast)), cast)


def _row_budgets(epsilon: Epsilon, shape: torch.Size, device: torch.device) -> Tensor:
    """Return epsilon as [N] float64, one per row."""
    given = torch.as_tensor(epsilon, dtype=torch.float64, device=device)
    try:
        budgets = given.expand(shape).reshape(-1)
    except RuntimeError:
        raise ValueError(
            f"epsilon must be one number or one per row, shape {tuple(shape)}; got shape {tuple(given.shape)}"
        ) from None
    wrong = ~budgets.isfinite() | (budgets < 0)
    if bool(wrong.any()):
        row = int(wrong.nonzero()[0])
        raise ValueError(f"epsilon must be finite and >= 0 nats, got {budgets[row].item()} in {_row_name(row, shape)}")
    return budgets


def _check_laws(student_logprobs: Tensor, teacher_logprobs: Tensor) -> None:
    if student_logprobs.shape != teacher_logprobs.shape or student_logprobs.dim() == 0:
        raise ValueError(
            "student_logprobs and teacher_logprobs must have one shape [..., V], got "
            f"{tuple(student_logprobs.shape)} and {tuple(teacher_logprobs.shape)}"
        )
    for name, rows in (("student_logprobs", student_logprobs), ("teacher_logprobs", teacher_logprobs)):
        if not rows.is_floating_point():
            raise ValueError(f"{name} must be floating point, got {rows.dtype}")
        if rows.shape[-1] == 0:
            raise ValueError(f"{name} must have at least one token in every row, got none in row 0")
        # Row maxima see all three faults: NaN propagates, +inf wins, and -inf means that no token has mass.
        wrong = ~rows.amax(dim=-1).isfinite().reshape(-1)
        if bool(wrong.any()):
            row = int(wrong.nonzero()[0])
            worst = rows.reshape(-1, rows.shape[-1])[row].max().item()
            fault = "no mass (all -inf)" if worst == -torch.inf else f"{worst}"
            raise ValueError(
                f"{name} must be log-probabilities with some mass, got {fault} in {_row_name(row, rows.shape[:-1])}"
            )


def _row_name(row: int, shape: torch.Size) -> str:
    if len(shape) <= 1:
        return f"row {row}"
    index = []
    for size in reversed(shape):
        row, position = divmod(row, size)
        index.append(position)
    return f"row {tuple(reversed(index))}"
