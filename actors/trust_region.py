"""Trust-Region behavior Blending, the mathematics (TRB, arXiv 2605.31159).

For one prefix, with student ``pi_S``, teacher ``pi_T`` and a budget ``epsilon`` in nats, the behaviour policy is

    mu* = argmin KL(mu || pi_T)   subject to   KL(mu || pi_S) <= epsilon.

It lies on the path ``mu_beta ∝ pi_S^(1-beta) pi_T^beta``. With ``d = log pi_T - log pi_S`` and
``A(beta) = log sum pi_S exp(beta d)``,

    KL(mu_beta || pi_S) = beta A'(beta) - A(beta),     d/dbeta KL = beta Var_mu(d) >= 0,

so the largest feasible beta is found by a safeguarded Newton iteration; it works on ``sqrt(2 KL)``, which is almost
linear in beta. Long float32 rows are solved roughly in float32 first; what is returned has always been checked in
float64. `verify_target` turns student drafts into exact samples of mu, or of any other law, by rejection.

A token without mass on either side has none in mu for beta > 0, so the divergence starts at ``-log pi_S(shared)``
as beta leaves 0. Where that exceeds epsilon, or nothing is shared, beta is 0 and mu is the student.
"""

from collections.abc import Callable, Iterator
from typing import NamedTuple

import torch
from torch import Tensor

from actors.random_numbers import sample_from_logprobs

Epsilon = float | Tensor

_CHUNK_ELEMENTS = {"cpu": 1 << 17, "cuda": 1 << 24}
"""Rows solved together: on a CPU as many as stay in its cache."""
_LONG_ELEMENTS = 1 << 14
"""From here on a pass over the numbers costs more than the calls that make it."""
_LEAST_EXPONENT = {torch.float32: -80.0, torch.float64: -700.0}
"""Lower ones weigh nothing and would give denormal numbers, which are a hundred times slower."""
_LARGEST_ROUGH_TILT = 1e6
_MAX_EVALUATIONS = 60
_SLACK = {torch.float64: 1e-8}
"""Share of the budget that may be left unused, by the precision of the rows; `_COARSE_SLACK` for all others."""
_COARSE_SLACK = 1e-6
_ROUGH_SLACK = 1e-3
_ROUGH_ROUNDING = 1e-6
_ROUNDING = 1e-13


class Blend(NamedTuple):
    """The behaviour policy of each row."""

    logprobs: Tensor
    """[..., V] log mu, nats, normalised; the student's own row, bit for bit, where beta is 0."""
    beta: Tensor
    """[...] in [0, 1]."""
    divergence: Tensor
    """[...] KL(mu || student), nats."""
    teacher_divergence: Tensor
    """[...] KL(mu || teacher), nats; inf where mu has mass that the teacher lacks."""


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
    teacher_divergence: Tensor
    """[B, k] KL(mu || teacher), nats."""


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
    _check_laws(student_logprobs, teacher_logprobs)
    shape = student_logprobs.shape[:-1]
    budget = _row_budgets(epsilon, shape, student_logprobs.device)
    beta = torch.empty(budget.shape, dtype=_dtype_of(student_logprobs, teacher_logprobs), device=budget.device)
    for rows, student, teacher in _chunks(student_logprobs, teacher_logprobs):
        beta[rows] = _largest_beta(_path(student, teacher), budget[rows], beta.dtype)
    return beta.reshape(shape)


def blend(student_logprobs: Tensor, teacher_logprobs: Tensor, epsilon: Epsilon) -> Blend:
    """Return the law closest to the teacher among those within ``epsilon`` of the student, for each row.

    Arguments and errors are those of `solve_beta`.

    Example:
        >>> student, teacher = torch.tensor([0.7, 0.2, 0.1]).log(), torch.tensor([0.1, 0.2, 0.7]).log()
        >>> round(blend(student, teacher, 0.02).beta.item(), 4)
        0.143
    """
    _check_laws(student_logprobs, teacher_logprobs)
    budget = _row_budgets(epsilon, student_logprobs.shape[:-1], student_logprobs.device)
    dtype = _dtype_of(student_logprobs, teacher_logprobs)
    return _blend_rows(
        student_logprobs, teacher_logprobs, lambda path, rows: _largest_beta(path, budget[rows], dtype).double()
    )


def blend_at(student_logprobs: Tensor, teacher_logprobs: Tensor, beta: float | Tensor) -> Blend:
    """Return mu at a given beta, for each row; no budget is kept.

    Args:
        student_logprobs: [..., V] natural logs; -inf marks a token without mass. Rows are renormalised in float64.
        teacher_logprobs: [..., V] likewise.
        beta: in [0, 1], one for all rows or one per row ([...]).

    Returns:
        A blend whose beta is the one given, or 0, with the student for mu, where the two laws share no token.

    Raises:
        ValueError: as `blend`; also for a beta that is not in [0, 1].
    """
    _check_laws(student_logprobs, teacher_logprobs)
    shape = student_logprobs.shape[:-1]
    given = _per_row("beta", beta, shape, student_logprobs.device)
    _check_each("beta", given, (given >= 0) & (given <= 1), "in [0, 1]", shape)
    return _blend_rows(
        student_logprobs, teacher_logprobs, lambda path, rows: torch.where(path.jump.isinf(), 0.0, given[rows])
    )


def law_as_blend(mu_logprobs: Tensor, student_logprobs: Tensor, teacher_logprobs: Tensor) -> Blend:
    """Return any law as a blend, with its divergences from both sides; its beta is NaN.

    Args:
        mu_logprobs: [..., V] nats, normalised.
        student_logprobs: [..., V] natural logs; renormalised in float64.
        teacher_logprobs: [..., V] likewise.

    Raises:
        ValueError: as `blend`, for any of the three.
    """
    _check_laws(student_logprobs, teacher_logprobs)
    _check_laws(mu_logprobs, student_logprobs, names=("mu_logprobs", "student_logprobs"))
    mu = mu_logprobs.double().log_softmax(-1)
    to_student, to_teacher = (
        torch.where(mu.isfinite(), mu.exp() * (mu - law.double().log_softmax(-1)), 0.0).sum(-1).clamp(min=0)
        for law in (student_logprobs, teacher_logprobs)
    )
    dtype = mu_logprobs.dtype
    beta = torch.full(mu.shape[:-1], torch.nan, dtype=dtype, device=mu.device)
    return Blend(mu_logprobs, beta, to_student.to(dtype), to_teacher.to(dtype))


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
    """`verify_target` with `blend` as the target.

    Args:
        draft_ids: [B, k] drawn from the student's rows.
        student_logprobs: [B, k, V] nats, the law each draft was drawn from.
        teacher_logprobs: [B, k, V] nats.
        epsilon: nats; one for all, or [B, k].
        num_drafted: as `verify_target`.
        generator: as `verify_target`.
        uniforms: as `verify_target`.

    Raises:
        ValueError: as `blend` and `verify_target`.
    """
    target = blend(student_logprobs, teacher_logprobs, epsilon)
    return verify_target(
        draft_ids, student_logprobs, target, num_drafted=num_drafted, generator=generator, uniforms=uniforms
    )


def verify_target(
    draft_ids: Tensor,
    student_logprobs: Tensor,
    target: Blend,
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
        target: of leading shape [B, k], what is to be emitted.
        num_drafted: [B] int64, how many drafts of each row are real, from 1 to k; all k where not given.
        generator: source of the uniforms where none are given.
        uniforms: [B, k, 2] in [0, 1): for keeping, and for redrawing, at each position; float64 is best.

    Raises:
        ValueError: for shapes or values other than these. A row without a draft is refused because nothing could be
            emitted from it exactly.
    """
    batch, length = _check_draft(draft_ids, student_logprobs, target)
    device = draft_ids.device
    if num_drafted is None:
        num_drafted = torch.full((batch,), length, device=device)
    if uniforms is None:
        uniforms = torch.rand(batch, length, 2, dtype=torch.float64, generator=generator, device=device)
    _check_counts(num_drafted, batch, length)
    _check_uniforms(uniforms, batch, length)

    ids = draft_ids.long()[..., None]
    log_mass = torch.logsumexp(student_logprobs.double(), dim=-1)
    drafted_logprobs = student_logprobs.gather(-1, ids)[..., 0].double() - log_mass
    ratio = (target.logprobs.gather(-1, ids)[..., 0].double() - drafted_logprobs).exp()
    positions = torch.arange(length, device=device)
    kept = (uniforms[..., 0].to(ratio) < ratio) & (positions < num_drafted[:, None])
    num_accepted = kept.long().cumprod(1).sum(1)
    any_refused = num_accepted < num_drafted

    rows, first_refused = torch.arange(batch, device=device), num_accepted.clamp(max=length - 1)
    mu = target.logprobs[rows, first_refused].double()
    student = student_logprobs[rows, first_refused].double() - log_mass[rows, first_refused, None]
    residual = (mu.exp() - student.exp()).clamp(min=0)
    # A refusal with no residual can only be rounding: mu and the student are then the same law.
    residual_logprobs = torch.where(residual.sum(-1, keepdim=True) > 0, residual.log(), mu)
    redrawn = sample_from_logprobs(residual_logprobs, uniforms[rows, first_refused, 1])

    replaced = any_refused[:, None] & (positions == num_accepted[:, None])
    emitted = torch.where(replaced[..., None], redrawn[:, None, None], ids)
    return Verdict(
        num_accepted=num_accepted,
        replacement_ids=torch.where(any_refused, redrawn, -1),
        beta=target.beta,
        divergence=target.divergence,
        behaviour_logprobs=target.logprobs.gather(-1, emitted)[..., 0],
        teacher_divergence=target.teacher_divergence,
    )


class _Path(NamedTuple):
    """What ``mu_beta`` of N rows is made of, float64; log-probs as given, not normalised."""

    base: Tensor
    """[N, V] log pi_S where both sides have mass, -inf elsewhere."""
    tilt: Tensor
    """[N, V] d where both sides have mass, 0 elsewhere."""
    student_mass: Tensor
    """[N] log sum pi_S."""
    shared_mass: Tensor
    """[N] log sum of base."""
    jump: Tensor
    """[N] the divergence as beta leaves 0; inf where nothing is shared."""
    lacking: Tensor
    """[N] bool, whether the student has mass that the teacher lacks."""


def _path(student_logprobs: Tensor, teacher_logprobs: Tensor) -> _Path:
    base, teacher = student_logprobs.double(), teacher_logprobs.double()
    mass = torch.logsumexp(base, dim=-1)
    jump, lacking = torch.zeros_like(mass), torch.zeros_like(mass, dtype=torch.bool)
    if bool(torch.minimum(student_logprobs.amin(), teacher_logprobs.amin()).isfinite()):
        return _Path(base, teacher - base, mass, mass, jump, lacking)
    tilt = teacher - base
    shared = tilt.isfinite()
    lacking = (tilt == -torch.inf).any(-1)
    base, tilt = base.masked_fill(~shared, -torch.inf), tilt.masked_fill(~shared, 0.0)
    shared_mass = torch.logsumexp(base, dim=-1)
    return _Path(base, tilt, mass, shared_mass, (mass - shared_mass).clamp(min=0), lacking)


def _largest_beta(path: _Path, epsilon: Tensor, dtype: torch.dtype) -> Tensor:
    """Return the largest feasible beta of each row, [N] in dtype."""
    room = epsilon - path.jump  # what is left for KL(mu || pi_S given that the token is shared)
    blendable = (epsilon > 0) & (room >= 0)
    room = torch.where(blendable, room, 0.0)
    start = None
    if dtype != torch.float64 and path.base.numel() >= _LONG_ELEMENTS:
        base = path.base.float()
        tilt = path.tilt.float().clamp_(-_LARGEST_ROUGH_TILT, _LARGEST_ROUGH_TILT)  # its square must not overflow
        aim = room * (1 + _ROUGH_SLACK / 2)  # so that Newton's step, which aims below the middle, is centred
        _, start = _newton(base, tilt, path.shared_mass, aim, blendable, _ROUGH_SLACK, _ROUGH_ROUNDING)
    beta, _ = _newton(
        path.base, path.tilt, path.shared_mass, room, blendable, _SLACK.get(dtype, _COARSE_SLACK), _ROUNDING, start
    )
    return _rounded_down(beta, dtype)


def _newton(
    base: Tensor,
    tilt: Tensor,
    log_mass: Tensor,
    room: Tensor,
    wanted: Tensor,
    slack: float,
    rounding: float,
    beta: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """Solve ``KL(mu_beta || pi_S) = room`` for the rows that are wanted; beta is 0 in the others.

    Newton's iteration on ``f(beta) = sqrt(2 KL)``, kept inside a bracket whose lower end is feasible. It aims a hair
    below the budget so that the lower end is the one that converges.

    Returns:
        [N] the largest feasible beta found, and [N] the next one to try.
    """
    work = torch.empty_like(base)
    target = (2 * room * (1 - slack / 2)).sqrt()
    enough = room * (1 - slack) - rounding
    low, high, done = torch.zeros_like(room), torch.full_like(room, 2.0), ~wanted
    value_low, value_high = torch.zeros_like(room), torch.full_like(room, torch.inf)
    if beta is None:
        log_normaliser, mean, _ = _moments(base, tilt, torch.ones_like(room), work)
        spent = mean - (log_normaliser - log_mass)
        whole = spent <= room + rounding  # the teacher itself is feasible
        low, high, done = (whole & wanted).to(low), high - (~whole).to(high), done | whole
        value_high = (2 * spent).sqrt()
        beta = torch.where(whole, 1.0, (target / value_high).clamp(max=0.5))
    resolution = 4 * torch.finfo(base.dtype).eps
    for _ in range(_MAX_EVALUATIONS):
        log_normaliser, mean, variance = _moments(base, tilt, beta, work)
        spent = beta * mean - (log_normaliser - log_mass)
        feasible = (spent <= room) & wanted
        value = (2 * spent).clamp(min=0).sqrt()
        low, high = torch.where(feasible, torch.maximum(beta, low), low), torch.where(feasible, high, beta)
        value_low, value_high = torch.where(feasible, value, value_low), torch.where(feasible, value_high, value)
        done = done | (feasible & ((spent >= enough) | (beta >= 1))) | (high - low <= resolution * high)
        newton = (beta + (target - value) * value / (beta * variance)).nan_to_num(1.0).clamp(max=1.0)
        chord = ((target - value_low) / (value_high - value_low)).nan_to_num(0.5).clamp(0.25, 0.75)
        between = torch.minimum(low + chord * (high - low), torch.where(low > 0, high, high / 2)).clamp(max=1.0)
        beta = torch.where(done | ((newton > low) & (newton < high)), newton, between)
        if bool(done.all()):
            break
    return low, beta


def _moments(base: Tensor, tilt: Tensor, beta: Tensor, work: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Return ``A(beta) = log sum exp(base + beta d)``, ``E_mu[d]`` and ``Var_mu(d)``, [N] float64 each."""
    weights = torch.addcmul(base, beta.to(base)[:, None], tilt, out=work)
    top = weights.amax(-1, keepdim=True)
    mass = weights.sub_(top).clamp_(min=_LEAST_EXPONENT[base.dtype]).exp_().sum(-1).double()
    mean = weights.mul_(tilt).sum(-1).double() / mass
    square = weights.mul_(tilt).sum(-1).double() / mass
    return top[:, 0].double() + mass.log(), mean, square - mean * mean


def _blend_rows(student_logprobs: Tensor, teacher_logprobs: Tensor, beta_of: Callable[[_Path, slice], Tensor]) -> Blend:
    """Return the blend at the beta that ``beta_of(path, rows)`` gives as [N] float64, a few rows at a time."""
    shape, vocab = student_logprobs.shape[:-1], student_logprobs.shape[-1]
    dtype = _dtype_of(student_logprobs, teacher_logprobs)
    logprobs = torch.empty((shape.numel(), vocab), dtype=dtype, device=student_logprobs.device)
    beta, to_student, to_teacher = torch.empty((3, shape.numel()), dtype=dtype, device=student_logprobs.device)
    for rows, student, teacher in _chunks(student_logprobs, teacher_logprobs):
        path = _path(student, teacher)
        at = beta_of(path, rows)
        work = torch.empty_like(path.base)
        log_normaliser, mean, _ = _moments(path.base, path.tilt, at, work)
        torch.addcmul(path.base, at[:, None], path.tilt, out=work)
        logprobs[rows] = work.sub_(log_normaliser[:, None])

        is_student = at == 0
        logprobs[rows][is_student] = student[is_student].to(dtype)
        spent = at * mean - (log_normaliser - path.student_mass)
        normalised_mean = mean - (torch.logsumexp(teacher.double(), dim=-1) - path.student_mass)
        spent = torch.where(is_student, 0.0, spent.clamp(min=0))
        beta[rows], to_student[rows] = at, spent
        to_teacher[rows] = torch.where(is_student & path.lacking, torch.inf, (spent - normalised_mean).clamp(min=0))
    return Blend(
        logprobs.reshape(*shape, vocab), beta.reshape(shape), to_student.reshape(shape), to_teacher.reshape(shape)
    )


def _chunks(student_logprobs: Tensor, teacher_logprobs: Tensor) -> Iterator[tuple[slice, Tensor, Tensor]]:
    """Yield a few rows at a time: which, and both sides' [N, V]."""
    vocab = student_logprobs.shape[-1]
    student, teacher = student_logprobs.reshape(-1, vocab), teacher_logprobs.reshape(-1, vocab)
    size = max(1, _CHUNK_ELEMENTS.get(student.device.type, _CHUNK_ELEMENTS["cuda"]) // vocab)
    for first in range(0, len(student), size):
        rows = slice(first, first + size)
        yield rows, student[rows], teacher[rows]


def _dtype_of(student_logprobs: Tensor, teacher_logprobs: Tensor) -> torch.dtype:
    return torch.promote_types(student_logprobs.dtype, teacher_logprobs.dtype)


def _rounded_down(beta: Tensor, dtype: torch.dtype) -> Tensor:
    """Cast to dtype without ever rounding up, so that the budget survives the cast."""
    cast = beta.to(dtype)
    return torch.where(cast.double() > beta, torch.nextafter(cast, torch.zeros_like(cast)), cast)


def _row_budgets(epsilon: Epsilon, shape: torch.Size, device: torch.device) -> Tensor:
    """Return epsilon as [N] float64, one per row."""
    budgets = _per_row("epsilon", epsilon, shape, device)
    _check_each("epsilon", budgets, budgets.isfinite() & (budgets >= 0), "finite and >= 0 nats", shape)
    return budgets


def _per_row(name: str, value: float | Tensor, shape: torch.Size, device: torch.device) -> Tensor:
    """Return a setting as [N] float64, one per row."""
    given = torch.as_tensor(value, dtype=torch.float64, device=device)
    try:
        return given.expand(shape).reshape(-1)
    except RuntimeError:
        raise ValueError(
            f"{name} must be one number or one per row, shape {tuple(shape)}; got shape {tuple(given.shape)}"
        ) from None


def _check_each(name: str, values: Tensor, right: Tensor, what: str, shape: torch.Size) -> None:
    if not bool(right.all()):
        row = int((~right).nonzero()[0])
        raise ValueError(f"{name} must be {what}, got {values[row].item()} in {_row_name(row, shape)}")


def _check_draft(draft_ids: Tensor, student_logprobs: Tensor, target: Blend) -> tuple[int, int]:
    """Return B and k."""
    if draft_ids.dim() != 2 or draft_ids.shape[1] < 1:
        raise ValueError(f"draft_ids must have shape [B, k] with k >= 1, got {tuple(draft_ids.shape)}")
    for name, laws in (("student_logprobs", student_logprobs), ("target.logprobs", target.logprobs)):
        if laws.dim() != 3 or laws.shape[:2] != draft_ids.shape or laws.shape != student_logprobs.shape:
            raise ValueError(
                f"{name} must be [B, k, V] for draft_ids {tuple(draft_ids.shape)}, got {tuple(laws.shape)}"
            )
    return draft_ids.shape[0], draft_ids.shape[1]


def _check_counts(num_drafted: Tensor, batch: int, length: int) -> None:
    if num_drafted.shape != (batch,):
        raise ValueError(f"num_drafted must have shape ({batch},), got {tuple(num_drafted.shape)}")
    right = (num_drafted >= 1) & (num_drafted <= length)
    if not bool(right.all()):
        row = int((~right).nonzero()[0])
        bound = "at least 1" if num_drafted[row] < 1 else f"at most k = {length}"
        raise ValueError(f"num_drafted must be {bound} in every row, got {int(num_drafted[row])} in row {row}")


def _check_uniforms(uniforms: Tensor, batch: int, length: int) -> None:
    if uniforms.shape != (batch, length, 2):
        raise ValueError(f"uniforms must have shape ({batch}, {length}, 2), got {tuple(uniforms.shape)}")
    right = (uniforms >= 0) & (uniforms < 1)
    if not bool(right.all()):
        raise ValueError(f"uniforms must be in [0, 1), got {uniforms[~right][0].item()}")


def _check_laws(
    first: Tensor, second: Tensor, names: tuple[str, str] = ("student_logprobs", "teacher_logprobs")
) -> None:
    if first.shape != second.shape or first.dim() == 0:
        raise ValueError(
            f"{names[0]} and {names[1]} must have one shape [..., V], "
            f"got {tuple(first.shape)} and {tuple(second.shape)}"
        )
    for name, rows in zip(names, (first, second), strict=True):
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
