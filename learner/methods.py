"""Which parts make each method of reinforcement learning; the formulas are in `learner.advantages`,
`learner.policy_losses` and `learner.aggregation`."""

import math
from collections.abc import Mapping
from dataclasses import dataclass

from learner.config import PolicyGradientObjective


@dataclass(frozen=True, slots=True, kw_only=True)
class Method:
    """What a method of reinforcement learning is made of."""

    advantage: str
    surrogate: str
    clip_low: float
    clip_high: float
    aggregation: str


METHODS: Mapping[str, Method] = {
    # arXiv 2402.03300, with the token mean of its followers
    "grpo": Method(
        advantage="grpo", surrogate="clipped", clip_low=0.2, clip_high=0.2, aggregation="token_mean"),
    # arXiv 2503.20783
    "dr_grpo": Method(
        advantage="dr_grpo", surrogate="clipped", clip_low=0.2, clip_high=0.2, aggregation="fixed"),
    # arXiv 2503.14476; its dynamic sampling and overlong punishment are sections of their own
    "dapo": Method(
        advantage="grpo", surrogate="clipped", clip_low=0.2, clip_high=0.28, aggregation="token_mean"),
    # arXiv 2506.13585, with the range of arXiv 2510.13786
    "cispo": Method(
        advantage="grpo", surrogate="cispo", clip_low=1.0, clip_high=5.0, aggregation="token_mean"),
    # arXiv 2507.18071
    "gspo": Method(
        advantage="grpo", surrogate="gspo", clip_low=3e-4, clip_high=4e-4, aggregation="sequence_mean"),
    # arXiv 2402.14740
    "rloo": Method(
        advantage="rloo", surrogate="clipped", clip_low=0.2, clip_high=0.2, aggregation="token_mean"),
    # Williams, Machine Learning 8, 1992
    "reinforce": Method(
        advantage="reinforce", surrogate="reinforce", clip_low=0.2, clip_high=0.2, aggregation="token_mean"),
    # arXiv 2602.02710
    "maxrl": Method(
        advantage="maxrl", surrogate="clipped", clip_low=0.2, clip_high=0.2, aggregation="token_mean"),
    # arXiv 2511.19942
    "ds_grpo": Method(
        advantage="ds_grpo", surrogate="clipped", clip_low=0.2, clip_high=0.2, aggregation="token_mean"),
}  # fmt: skip


def resolved(objective: PolicyGradientObjective) -> Method:
    """Return the objective's method with what the recipe sets otherwise."""
    base = METHODS[objective.method]
    return Method(
        advantage=objective.advantage or base.advantage,
        surrogate=objective.surrogate or base.surrogate,
        clip_low=base.clip_low if objective.clip_low is None else objective.clip_low,
        clip_high=base.clip_high if objective.clip_high is None else objective.clip_high,
        aggregation=objective.aggregation or base.aggregation,
    )


def focal_learning_rate_factor(focal_gamma: float) -> float:
    """Return by how much a focal weight lowers the mean size of the advantages of `grpo` (arXiv 2602.06717).

    It is the mean of (1 - u) ** gamma over u in [0, 1], weighted by sqrt(u (1 - u)), the standard deviation of a binary
    reward: 4 / sqrt(pi) Gamma(gamma + 3/2) / Gamma(gamma + 3). A run without a focal weight whose learning rate is
    multiplied by it takes steps as small, and so shows what the weight does beyond that.

    Example:
        >>> [round(focal_learning_rate_factor(gamma), 4) for gamma in (0.0, 0.5, 1.0, 2.0)]
        [1.0, 0.6791, 0.5, 0.3125]
    """
    if not (math.isfinite(focal_gamma) and focal_gamma >= 0):
        raise ValueError(f"focal_gamma must be a finite number >= 0, got {focal_gamma!r}")
    return 4 / math.sqrt(math.pi) * math.exp(math.lgamma(focal_gamma + 1.5) - math.lgamma(focal_gamma + 3))
