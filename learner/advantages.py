"""Group advantages, the focal weight of F-GRPO (arXiv 2602.06717), and the shaping of rewards by length.

P is the number of prompts (groups), G the number of rollouts of a group, n the number of a group's members that have a
valid grade. R_w and R_c are the rewards of a wrong and of a correct rollout.
"""

import difflib
import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor


def group_advantages(
    rewards: Any,
    *,
    method: str = "grpo",
    focal_gamma: float = 0.0,
    reward_wrong: float = 0.0,
    reward_correct: float = 1.0,
    valid: Any = None,
    std_ddof: int = 1,
    tiny: float = 1e-6,
    outcomes: Any = None,
    correct_at: float | None = None,
    mean_logprobs: Any = None,
    ds_coef: float = 0.05,
) -> Tensor:
    """Return the advantage [P, G] of every rollout, one number for all its tokens.

    - `grpo` (arXiv 2402.03300): (R - mean) / (std + tiny)
    - `dr_grpo` (arXiv 2503.20783): R - mean
    - `rloo` (arXiv 2402.14740): R - mean of the other n - 1, which is (R - mean) n / (n - 1)
    - `maxrl` (arXiv 2602.02710): (R - mean) / (R_c - R_w) / (pass_rate + tiny), 0 for a group without a success
    - `ds_grpo` (arXiv 2511.19942): `grpo` with the variance divided by n, then less ds_coef l for a correct rollout and
      plus ds_coef l for a wrong one, l being its mean log-prob per token: correct ones gain the more the less likely
      they are, wrong ones lose
    - `reinforce` (Williams, Machine Learning 8, 1992): R, compared with nothing

    Each is then multiplied by the group's `focal_weights`; with focal_gamma = 0 it is the base method, bit for bit. The
    weighted advantages are not normalised again, as in the paper: easy groups weigh less, others no more than before.
    With the first four, a group of equal rewards, or with fewer than two valid members, has advantage exactly 0.

    Args:
        rewards: [P, G] numbers, or whatever `torch.as_tensor` takes; what the rollouts are compared by.
        method: one of ADVANTAGES.
        focal_gamma: exponent of the focal weight, 0 or more.
        reward_wrong: R_w.
        reward_correct: R_c > R_w.
        valid: bool [P, G]; False marks a rollout that lost its grade. Its advantage is exactly 0, its reward (NaN
            included) is never read, and it counts neither in mean and std nor in the pass rate. None: all are valid.
        std_ddof: of `grpo`; 1 divides the variance by n - 1 (as verl does), 0 by n. The papers say only "std".
        tiny: added to the standard deviation, or to the pass rate.
        outcomes: [P, G] rewards before any shaping, which alone tell what is correct; the rewards if None.
        correct_at: the outcome from which on a rollout is correct; None: outcomes must be R_w or R_c wherever a focal
            weight or `ds_grpo` asks which are correct.
        mean_logprobs: [P, G] nats, of `ds_grpo`: the mean log-prob per token under the law that was sampled from.
        ds_coef: of `ds_grpo`.

    Returns:
        [P, G], float64 for float64 rewards, else float32.

    Raises:
        ValueError: for a shape other than [P, G], a valid number that is not finite, outcomes of which it cannot be
            told what is correct, fewer than two rollouts a group with a method that compares, `ds_grpo` without
            mean_logprobs, R_c <= R_w, a bad exponent or an unknown method.

    Example:
        >>> group_advantages([[1.0, 0.0, 0.0, 1.0]], method="dr_grpo").tolist()
        [[0.5, -0.5, -0.5, 0.5]]
    """
    _check_method(method, std_ddof)
    values, mask = _checked(rewards, valid)
    if method not in ("dr_grpo", "reinforce") and values.shape[1] < 2:
        raise ValueError(f"{method} compares the rollouts of a group and so needs at least 2, got {values.shape[1]}")
    raw = values if outcomes is None else _alike(outcomes, values, mask, "outcomes")
    weights = focal_weights(
        raw,
        focal_gamma=focal_gamma,
        reward_wrong=reward_wrong,
        reward_correct=reward_correct,
        valid=mask,
        correct_at=correct_at,
    )
    groups = _Groups(
        rewards=values,
        outcomes=raw,
        valid=mask,
        num_valid=mask.sum(1, keepdim=True).to(values.dtype),
        mean_logprobs=None if mean_logprobs is None else _alike(mean_logprobs, values, mask, "mean_logprobs"),
        reward_wrong=reward_wrong,
        reward_correct=reward_correct,
        correct_at=correct_at,
        std_ddof=std_ddof,
        tiny=tiny,
        ds_coef=ds_coef,
    )
    advantages = ADVANTAGES[method](groups)
    return advantages if focal_gamma == 0 else advantages * weights[:, None]


def focal_weights(
    rewards: Any,
    *,
    focal_gamma: float,
    reward_wrong: float = 0.0,
    reward_correct: float = 1.0,
    valid: Any = None,
    correct_at: float | None = None,
) -> Tensor:
    """Return g = (1 - pass_rate) ** focal_gamma [P], the pass rate being the share of correct ones among n valid.

    A group without a valid member has weight 1 (nothing is known of it, and its advantages are 0). arXiv 2602.06717.

    Args:
        rewards: [P, G] raw outcome rewards, before any shaping.
        focal_gamma: exponent, 0 or more; 0 gives exactly 1.
        reward_wrong: R_w.
        reward_correct: R_c > R_w.
        valid: bool [P, G] as in `group_advantages`.
        correct_at: the reward from which on a rollout is correct, above R_w and at most R_c; None: each valid reward
            must be R_w or R_c (not asked of them if focal_gamma = 0).

    Returns:
        [P] in [0, 1], float64 for float64 rewards, else float32.

    Raises:
        ValueError: as `group_advantages`.

    Example:
        >>> focal_weights([[1.0, 0.0, 0.0, 0.0], [1.0, 1.0, 1.0, 1.0]], focal_gamma=1.0).tolist()
        [0.75, 0.0]
    """
    if not (math.isfinite(focal_gamma) and focal_gamma >= 0):
        raise ValueError(f"focal_gamma must be a finite number >= 0, got {focal_gamma!r}")
    if not (math.isfinite(reward_wrong) and math.isfinite(reward_correct) and reward_correct > reward_wrong):
        raise ValueError(
            f"reward_correct must be finite and above reward_wrong, got {reward_correct!r} and {reward_wrong!r}"
        )
    values, mask = _checked(rewards, valid)
    if focal_gamma == 0:
        return torch.ones(values.shape[0], dtype=values.dtype, device=values.device)
    correct = _correct(values, mask, reward_wrong=reward_wrong, reward_correct=reward_correct, correct_at=correct_at)
    pass_rate = correct.sum(1).to(values.dtype) / mask.sum(1).clamp(min=1)
    weights: Tensor = (1 - pass_rate) ** focal_gamma
    return weights


def overlong_penalty(
    num_tokens: npt.NDArray[np.integer[Any]], *, max_new_tokens: int, buffer_tokens: int, penalty: float
) -> npt.NDArray[np.float64]:
    """Return what is added to the reward of completions of num_tokens [N] tokens: between -penalty and 0.

    0 up to max_new_tokens - buffer_tokens, from there linearly down to -penalty at max_new_tokens; eq. 13 of DAPO
    (arXiv 2503.14476).

    Raises:
        ValueError: if the buffer is longer than a completion may be.

    Example:
        >>> overlong_penalty(np.array([5, 9, 10]), max_new_tokens=10, buffer_tokens=4, penalty=1.0).tolist()
        [0.0, -0.75, -1.0]
    """
    if not 1 <= buffer_tokens <= max_new_tokens:
        raise ValueError(
            f"learner.objective.overlong.buffer_tokens must be from 1 to rollouts.max_new_tokens = {max_new_tokens}, "
            f"got {buffer_tokens}"
        )
    excess = (num_tokens - (max_new_tokens - buffer_tokens)) / buffer_tokens
    return 0.0 - penalty * np.clip(excess, 0, 1)


@dataclass(frozen=True, slots=True, kw_only=True)
class _Groups:
    """What advantages are made of; all numbers are 0 where a rollout is not valid."""

    rewards: Tensor
    """[P, G]."""
    outcomes: Tensor
    """[P, G]."""
    valid: Tensor
    """[P, G] bool."""
    num_valid: Tensor
    """[P, 1], n in the rewards' dtype."""
    mean_logprobs: Tensor | None
    """[P, G] nats."""
    reward_wrong: float
    reward_correct: float
    correct_at: float | None
    std_ddof: int
    tiny: float
    ds_coef: float

    def centred(self) -> Tensor:
        """Return R - mean [P, G]."""
        mean = self.rewards.sum(1, keepdim=True) / self.num_valid.clamp(min=1)
        return torch.where(self.valid, self.rewards - mean, 0)

    def standardised(self, std_ddof: int) -> Tensor:
        """Return (R - mean) / (std + tiny) [P, G]."""
        centred = self.centred()
        variance = centred.square().sum(1, keepdim=True) / (self.num_valid - std_ddof).clamp(min=1)
        return self.compared(centred / (variance.sqrt() + self.tiny))

    def compared(self, advantages: Tensor) -> Tensor:
        """Return the advantages, but exactly 0 in groups of equal rewards and of fewer than two valid members."""
        # A mean of equal numbers may differ from them in the last bit, so equality is asked of the rewards themselves.
        highest = self.rewards.masked_fill(~self.valid, -torch.inf).amax(1, keepdim=True)
        lowest = self.rewards.masked_fill(~self.valid, torch.inf).amin(1, keepdim=True)
        return torch.where(self.valid & (self.num_valid >= 2) & (highest > lowest), advantages, 0)


def _grpo(groups: _Groups) -> Tensor:
    return groups.standardised(groups.std_ddof)


def _dr_grpo(groups: _Groups) -> Tensor:
    return groups.compared(groups.centred())


def _rloo(groups: _Groups) -> Tensor:
    return groups.compared(groups.centred() * groups.num_valid / (groups.num_valid - 1).clamp(min=1))


def _maxrl(groups: _Groups) -> Tensor:
    reward_range = groups.reward_correct - groups.reward_wrong
    mean = groups.outcomes.sum(1, keepdim=True) / groups.num_valid.clamp(min=1)
    advantages = groups.centred() / reward_range / ((mean - groups.reward_wrong) / reward_range + groups.tiny)
    # Asked of the outcomes themselves, since a mean of wrong ones may miss reward_wrong by its last bit.
    succeeded = groups.valid & (groups.outcomes > groups.outcomes.new_tensor(groups.reward_wrong))
    return groups.compared(torch.where(succeeded.any(1, keepdim=True), advantages, 0))


def _ds_grpo(groups: _Groups) -> Tensor:
    if groups.mean_logprobs is None:
        raise ValueError("ds_grpo needs mean_logprobs, the mean log-prob per token of every rollout, got none")
    correct = _correct(
        groups.outcomes,
        groups.valid,
        reward_wrong=groups.reward_wrong,
        reward_correct=groups.reward_correct,
        correct_at=groups.correct_at,
    )
    smoothing = groups.ds_coef * groups.mean_logprobs
    return groups.standardised(0) + torch.where(correct, -smoothing, smoothing)


def _reinforce(groups: _Groups) -> Tensor:
    return groups.rewards


ADVANTAGES: Mapping[str, Callable[[_Groups], Tensor]] = {
    "grpo": _grpo,
    "dr_grpo": _dr_grpo,
    "rloo": _rloo,
    "maxrl": _maxrl,
    "ds_grpo": _ds_grpo,
    "reinforce": _reinforce,
}
"""Groups -> advantages [P, G] before the focal weight."""


def _check_method(method: str, std_ddof: int) -> None:
    if method not in ADVANTAGES:
        close = difflib.get_close_matches(method, ADVANTAGES, n=1)
        hint = f"; did you mean {close[0]!r}?" if close else ""
        raise ValueError(f"method must be one of {', '.join(ADVANTAGES)}, got {method!r}{hint}")
    if std_ddof not in (0, 1):
        raise ValueError(f"std_ddof must be 0 or 1, got {std_ddof!r}")


def _correct(
    outcomes: Tensor, valid: Tensor, *, reward_wrong: float, reward_correct: float, correct_at: float | None
) -> Tensor:
    """Return bool [P, G], which valid rollouts are correct."""
    if correct_at is not None:
        if not reward_wrong < correct_at <= reward_correct:
            raise ValueError(
                f"correct_at must be above reward_wrong = {reward_wrong!r} and at most reward_correct = "
                f"{reward_correct!r}, got {correct_at!r}"
            )
        return valid & (outcomes >= outcomes.new_tensor(correct_at))
    correct = outcomes == outcomes.new_tensor(reward_correct)
    bad = valid & ~correct & (outcomes != outcomes.new_tensor(reward_wrong))
    if bad.any():
        row, column = bad.nonzero()[0].tolist()
        raise ValueError(
            f"a pass rate needs rewards of {reward_wrong!r} (wrong) or {reward_correct!r} (correct), got "
            f"{outcomes[row, column].item()!r} in group {row}, rollout {column}; set learner.objective.correct_at to "
            "say from which grade on a rollout is correct"
        )
    return valid & correct


def _checked(rewards: Any, valid: Any) -> tuple[Tensor, Tensor]:
    """Return rewards [P, G] with 0 at invalid places, and the bool mask [P, G]."""
    values = _numbers(rewards, "rewards")
    if values.dtype != torch.float64:
        values = values.to(torch.float32)
    if valid is None:
        mask = torch.ones(values.shape, dtype=torch.bool, device=values.device)
    else:
        mask = torch.as_tensor(valid, device=values.device)
    if mask.dtype != torch.bool or mask.shape != values.shape:
        raise ValueError(
            f"valid must be bool of the rewards' shape {list(values.shape)}, got {mask.dtype} {list(mask.shape)}"
        )
    return _where_valid(values, mask, "rewards"), mask


def _alike(numbers: Any, rewards: Tensor, valid: Tensor, name: str) -> Tensor:
    """Return other numbers of the same rollouts [P, G] in the rewards' dtype, with 0 at invalid places."""
    values = _numbers(numbers, name).to(rewards)
    if values.shape != rewards.shape:
        raise ValueError(f"{name} must have the rewards' shape {list(rewards.shape)}, got {list(values.shape)}")
    return _where_valid(values, valid, name)


def _numbers(values: Any, name: str) -> Tensor:
    try:
        tensor = torch.as_tensor(values)
    except (TypeError, RuntimeError) as error:
        raise ValueError(f"{name} must be numbers of shape [P, G], got {type(values).__name__}: {error}") from error
    if tensor.ndim != 2 or tensor.is_complex():
        raise ValueError(f"{name} must be real numbers of shape [P, G], got {tensor.dtype} {list(tensor.shape)}")
    return tensor


def _where_valid(values: Tensor, valid: Tensor, name: str) -> Tensor:
    bad = valid & ~values.isfinite()
    if bad.any():
        row, column = bad.nonzero()[0].tolist()
        raise ValueError(
            f"{name} must be finite, got {values[row, column].item()!r} in group {row}, rollout {column}; "
            "mark a rollout without a grade in `valid`"
        )
    return torch.where(valid, values, 0)
