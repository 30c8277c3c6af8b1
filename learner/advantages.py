"""Group advantages, and the focal weight of F-GRPO (arXiv 2602.06717).

P is the number of prompts (groups), G the number of rollouts of a group, n the number of a group's members that have a
valid grade. Baselines are of GRPO (arXiv 2402.03300), Dr. GRPO (arXiv 2503.20783) and RLOO (arXiv 2402.14740).
"""

import difflib
import math
from collections.abc import Callable, Mapping
from typing import Any

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
) -> Tensor:
    """Return the advantage [P, G] of every rollout over the others of its group.

    - `grpo`: (R - mean) / (std + tiny)
    - `dr_grpo`: R - mean
    - `rloo`: R - mean of the other n - 1, which is (R - mean) n / (n - 1)

    Each is then multiplied by the group's `focal_weights`; with focal_gamma = 0 it is the base method, bit for bit. The
    weighted advantages are not normalised again, as in the paper: easy groups weigh less, others no more than before.
    A group of equal rewards, or with fewer than two valid members, has advantage exactly 0.

    Args:
        rewards: [P, G] numbers, or whatever `torch.as_tensor` takes; raw outcome rewards, before any shaping.
        method: one of METHODS.
        focal_gamma: exponent of the focal weight, 0 or more. Other than 0, rewards must be binary.
        reward_wrong: reward of a wrong rollout, R_w.
        reward_correct: reward of a correct rollout, R_c > R_w.
        valid: bool [P, G]; False marks a rollout that lost its grade. Its advantage is exactly 0, its reward (NaN
            included) is never read, and it counts neither in mean and std nor in the pass rate. None: all are valid.
        std_ddof: 1 divides the variance by n - 1 (as verl does), 0 by n. The papers say only "std".
        tiny: added to the standard deviation.

    Returns:
        [P, G], float64 for float64 rewards, else float32.

    Raises:
        ValueError: for a shape other than [P, G], a valid reward that is not finite or (with a focal weight) not
            binary, fewer than two rollouts a group with `grpo` or `rloo`, R_c <= R_w, a bad exponent or an unknown
            method.

    Example:
        >>> group_advantages([[1.0, 0.0, 0.0, 1.0]], method="dr_grpo").tolist()
        [[0.5, -0.5, -0.5, 0.5]]
    """
    if method not in METHODS:
        close = difflib.get_close_matches(method, METHODS, n=1)
        hint = f"; did you mean {close[0]!r}?" if close else ""
        raise ValueError(f"method must be one of {', '.join(METHODS)}, got {method!r}{hint}")
    if std_ddof not in (0, 1):
        raise ValueError(f"std_ddof must be 0 or 1, got {std_ddof!r}")
    values, mask = _checked(rewards, valid)
    if method != "dr_grpo" and values.shape[1] < 2:
        raise ValueError(f"{method} compares the rollouts of a group and so needs at least 2, got {values.shape[1]}")
    weights = focal_weights(
        values, focal_gamma=focal_gamma, reward_wrong=reward_wrong, reward_correct=reward_correct, valid=mask
    )
    num_valid = mask.sum(1, keepdim=True).to(values.dtype)
    mean = values.sum(1, keepdim=True) / num_valid.clamp(min=1)
    centred = torch.where(mask, values - mean, 0)
    advantages = METHODS[method](centred, num_valid, std_ddof, tiny)
    # A mean of equal numbers may differ from them in the last bit, so equality is asked of the rewards themselves.
    highest = values.masked_fill(~mask, -torch.inf).amax(1, keepdim=True)
    lowest = values.masked_fill(~mask, torch.inf).amin(1, keepdim=True)
    advantages = torch.where(mask & (num_valid >= 2) & (highest > lowest), advantages, 0)
    return advantages if focal_gamma == 0 else advantages * weights[:, None]


def focal_weights(
    rewards: Any,
    *,
    focal_gamma: float,
    reward_wrong: float = 0.0,
    reward_correct: float = 1.0,
    valid: Any = None,
) -> Tensor:
    """Return g = (1 - pass_rate) ** focal_gamma [P], the pass rate being the share of correct ones among n valid.

    A group without a valid member has weight 1 (nothing is known of it, and its advantages are 0).

    Args:
        rewards: [P, G], each reward_wrong or reward_correct where valid (not asked of them if focal_gamma = 0).
        focal_gamma: exponent, 0 or more; 0 gives exactly 1.
        reward_wrong: R_w.
        reward_correct: R_c > R_w.
        valid: bool [P, G] as in `group_advantages`.

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
    correct = values == values.new_tensor(reward_correct)
    bad = mask & ~correct & (values != values.new_tensor(reward_wrong))
    if bad.any():
        row, column = bad.nonzero()[0].tolist()
        raise ValueError(
            f"a focal weight needs rewards of {reward_wrong!r} (wrong) or {reward_correct!r} (correct), got "
            f"{values[row, column].item()!r} in group {row}, rollout {column}"
        )
    num_correct = (correct & mask).sum(1).to(values.dtype)
    pass_rate = num_correct / mask.sum(1).clamp(min=1)
    weights: Tensor = (1 - pass_rate) ** focal_gamma
    return weights


def _grpo(centred: Tensor, num_valid: Tensor, std_ddof: int, tiny: float) -> Tensor:
    """(R - mean) / (std + tiny)."""
    variance = centred.square().sum(1, keepdim=True) / (num_valid - std_ddof).clamp(min=1)
    return centred / (variance.sqrt() + tiny)


def _dr_grpo(centred: Tensor, num_valid: Tensor, std_ddof: int, tiny: float) -> Tensor:
    """R - mean: neither the standard deviation nor a length enters."""
    return centred


def _rloo(centred: Tensor, num_valid: Tensor, std_ddof: int, tiny: float) -> Tensor:
    """R - mean of the others: (R - mean) n / (n - 1)."""
    return centred * num_valid / (num_valid - 1).clamp(min=1)


METHODS: Mapping[str, Callable[[Tensor, Tensor, int, float], Tensor]] = {
    "grpo": _grpo,
    "dr_grpo": _dr_grpo,
    "rloo": _rloo,
}
"""(rewards less their mean [P, G], n [P, 1], std_ddof, tiny) -> advantages [P, G]."""


def _checked(rewards: Any, valid: Any) -> tuple[Tensor, Tensor]:
    """Return rewards [P, G] with 0 at invalid places, and the bool mask [P, G]."""
    try:
        values = torch.as_tensor(rewards)
    except (TypeError, RuntimeError) as error:
        raise ValueError(f"rewards must be numbers of shape [P, G], got {type(rewards).__name__}: {error}") from error
    if values.ndim != 2 or values.is_complex():
        raise ValueError(f"rewards must be real numbers of shape [P, G], got {values.dtype} {list(values.shape)}")
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
    bad = mask & ~values.isfinite()
    if bad.any():
        row, column = bad.nonzero()[0].tolist()
        raise ValueError(
            f"rewards must be finite, got {values[row, column].item()!r} in group {row}, rollout {column}; "
            "mark a rollout without a grade in `valid`"
        )
    return torch.where(mask, values, 0), mask
