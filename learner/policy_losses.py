"""Policy-gradient losses: what an advantage multiplies, per token.

pi is the policy as it is now, b the law that really drew the token (the sampler's weights and numerics, or a blend with
a teacher), A the advantage of the token's rollout, sg[.] a constant. ratio = pi / b, both at the token. A token that
the policy forbids (-inf) has ratio 0 and no gradient.
"""

from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from learner.config import CorrectionSection, PolicyGradientObjective
from learner.laws import Laws
from learner.losses import Loss, LossOutputs, Tokens, WeightedSum
from learner.methods import Method, resolved


@dataclass(frozen=True, slots=True, kw_only=True)
class Correction:
    """A constant that multiplies each token's loss where the sampler computed other log-probs than the learner.

    With w = pi / b of the token, or its product over the token's rollout at the level `sequence`:

    - `truncate`: min(w, high) (truncated importance weights, arXiv 1802.01561)
    - `mask`: w if low <= w <= high, else 0 (the two-sided mask of IcePop, arXiv 2510.18855)

    With a correction all surrogates are the same one: as one update is taken per batch, the policy is still what its
    ratio is to, so the ratio is 1 and no clip binds. Each then has the gradient -constant x A grad log pi.
    """

    type: Literal["truncate", "mask"]
    level: Literal["token", "sequence"]
    low: float
    """Of `mask`."""
    high: float

    def weights(self, log_ratios: Tensor, tokens: Tokens) -> tuple[Tensor, Tensor]:
        """Return the constants [n] and which tokens are left out, bool [n]; log_ratios are log pi - log b [n] nats."""
        weights = (log_ratios if self.level == "token" else _sequence_log_ratios(tokens).to(log_ratios)).exp()
        if self.type == "truncate":
            return weights.clamp(max=self.high), torch.zeros_like(weights, dtype=torch.bool)
        # Written so that a weight that is not a number stays one, for the step to be refused.
        dropped = (weights < self.low) | (weights > self.high)
        return weights.masked_fill(dropped, 0), dropped


@dataclass(frozen=True, slots=True, kw_only=True)
class _Surrogate(ABC):
    """What the surrogates have in common.

    With a correction the surrogate's ratio is pi / sg[pi], which is 1 with the gradient of log pi, and the loss is
    multiplied by the correction's constant instead; `clipped_share` is then 0 (see `Correction`).

    Metrics: `ratio` of policy and behaviour; `clipped_share` of tokens where a bound is active; `logprob_gap` =
    abs(log pi - log b), which on-policy is only what sampler and learner compute differently; `entropy` of the policy
    in nats; `abs_advantage`; with a correction also `dropped`, the tokens that it leaves out.
    """

    correction: Correction | None = None

    @property
    def needs_sequence_ratios(self) -> bool:
        """Whether the correction does."""
        return self.correction is not None and self.correction.level == "sequence"

    def __call__(self, laws: Laws, tokens: Tokens) -> LossOutputs:
        """Return the loss of each token.

        Raises:
            ValueError: if it needs the sums of log ratios over rollouts and the tokens carry none.
        """
        logprobs = laws.token_logprobs(tokens.token_ids)
        constant = logprobs.detach()
        forbidden = constant == -torch.inf
        behaviour, advantages = tokens.behaviour_logprobs.to(constant), tokens.advantages.to(constant)
        log_ratios = constant - behaviour
        anchor = behaviour if self.correction is None else constant.masked_fill(forbidden, 0)
        per_token, clipped = self._losses(logprobs, anchor, advantages, tokens)
        metrics = {
            "ratio": log_ratios.exp().sum(),
            "clipped_share": clipped.sum(),
            "logprob_gap": log_ratios.abs().masked_fill(forbidden, 0).sum(),
            "entropy": laws.entropy().sum(),
            "abs_advantage": advantages.abs().sum(),
        }
        if self.correction is not None:
            weights, dropped = self.correction.weights(log_ratios, tokens)
            per_token = weights * per_token
            metrics["dropped"] = dropped.sum()
        return LossOutputs(per_token=per_token, metrics=metrics)

    @abstractmethod
    def _losses(self, logprobs: Tensor, anchor: Tensor, advantages: Tensor, tokens: Tokens) -> tuple[Tensor, Tensor]:
        """Return the loss [n] and where a bound is active, bool [n].

        Args:
            logprobs: [n] nats, log pi with its gradient.
            anchor: [n] nats, the constant that log pi is compared with.
            advantages: [n].
            tokens: n of them.
        """


@dataclass(frozen=True, slots=True, kw_only=True)
class ClippedSurrogate(_Surrogate):
    """-min(ratio A, clip(ratio, 1 - clip_low, 1 + clip_high) A).

    The surrogate of PPO (arXiv 1707.06347) as GRPO (arXiv 2402.03300) has it; clip_high > clip_low is that of DAPO
    (arXiv 2503.14476). The ratio is to the law that really drew the token, so off-policy rollouts (a blend with the
    teacher, older weights) are corrected within the clip range.
    """

    clip_low: float
    clip_high: float

    def _losses(self, logprobs: Tensor, anchor: Tensor, advantages: Tensor, tokens: Tokens) -> tuple[Tensor, Tensor]:
        ratios = (logprobs - anchor).exp()
        return _pessimistic(ratios, self.clip_low, self.clip_high, advantages)


@dataclass(frozen=True, slots=True, kw_only=True)
class Gspo(_Surrogate):
    """-min(s A, clip(s, 1 - clip_low, 1 + clip_high) A), with s the geometric mean of a rollout's ratios.

    GSPO (arXiv 2507.18071) in its token form: s = sg[exp(mean over the rollout of log ratio)] pi / sg[pi], which has
    the same value at each token of a rollout, and with sequence_mean exactly the gradient of the sequence form.
    """

    clip_low: float
    clip_high: float

    @property
    def needs_sequence_ratios(self) -> bool:
        """Without a correction s is made of them."""
        return self.correction is None or self.correction.level == "sequence"

    def _losses(self, logprobs: Tensor, anchor: Tensor, advantages: Tensor, tokens: Tokens) -> tuple[Tensor, Tensor]:
        own = logprobs.detach()
        ratios = (logprobs - own.masked_fill(own == -torch.inf, 0)).exp()
        if self.correction is None:
            lengths = tokens.sequence_lengths
            if lengths is None:
                raise ValueError(_no_sequences("sequence_lengths"))
            ratios = ratios * (_sequence_log_ratios(tokens) / lengths).to(ratios).exp()
        return _pessimistic(ratios, self.clip_low, self.clip_high, advantages)


@dataclass(frozen=True, slots=True, kw_only=True)
class Cispo(_Surrogate):
    """-sg[clip(ratio, 1 - clip_low, 1 + clip_high)] A log pi.

    CISPO (arXiv 2506.13585): the weight is clipped and not the product, so every token keeps a gradient.
    """

    clip_low: float
    clip_high: float

    def _losses(self, logprobs: Tensor, anchor: Tensor, advantages: Tensor, tokens: Tokens) -> tuple[Tensor, Tensor]:
        ratios = (logprobs.detach() - anchor).exp()
        bounded = ratios.clamp(1 - self.clip_low, 1 + self.clip_high)
        return -bounded * advantages * _allowed(logprobs), bounded != ratios


@dataclass(frozen=True, slots=True, kw_only=True)
class Reinforce(_Surrogate):
    """-sg[ratio] A log pi: Williams, Machine Learning 8, 1992, with the importance weight of off-policy tokens."""

    def _losses(self, logprobs: Tensor, anchor: Tensor, advantages: Tensor, tokens: Tokens) -> tuple[Tensor, Tensor]:
        ratios = (logprobs.detach() - anchor).exp()
        return -ratios * advantages * _allowed(logprobs), torch.zeros_like(ratios, dtype=torch.bool)


@dataclass(frozen=True, slots=True, kw_only=True)
class ReferenceKL:
    """exp(d) - d - 1 with d = log reference - log pi at the token: KL(pi || reference) estimated by one token.

    The estimator k3 of Schulman (joschu.net/blog/kl-approx.html), never negative, as GRPO (arXiv 2402.03300) adds it to
    its loss; as there, no importance weight enters.

    Metrics: `kl_to_reference` in nats.
    """

    @property
    def needs_sequence_ratios(self) -> bool:
        """No."""
        return False

    def __call__(self, laws: Laws, tokens: Tokens) -> LossOutputs:
        """Return the loss of each token.

        Raises:
            ValueError: if the tokens carry no log-probs of the reference.
        """
        if tokens.reference_logprobs is None:
            raise ValueError(
                "learner.objective.kl_coef above 0 needs the reference policy's log-probs on every token, got none"
            )
        logprobs = laws.token_logprobs(tokens.token_ids)
        forbidden = logprobs.detach() == -torch.inf
        gap = (tokens.reference_logprobs.to(logprobs) - logprobs).masked_fill(forbidden, 0)
        per_token = gap.expm1() - gap
        return LossOutputs(per_token=per_token, metrics={"kl_to_reference": per_token.detach().sum()})


def build_policy_loss(objective: PolicyGradientObjective) -> Loss:
    """Return the loss of a recipe's objective, with its divergence from the reference but without its distillation."""
    surrogate = _surrogate(resolved(objective), _correction(objective.correction))
    if objective.kl_coef == 0:
        return surrogate
    return WeightedSum(parts=((1.0, surrogate), (objective.kl_coef, ReferenceKL())))


_CLIPPING: Mapping[str, Callable[..., Loss]] = {"clipped": ClippedSurrogate, "cispo": Cispo, "gspo": Gspo}


def _surrogate(method: Method, correction: Correction | None) -> Loss:
    if method.surrogate == "reinforce":
        return Reinforce(correction=correction)
    return _CLIPPING[method.surrogate](clip_low=method.clip_low, clip_high=method.clip_high, correction=correction)


def _correction(section: CorrectionSection | None) -> Correction | None:
    if section is None:
        return None
    return Correction(type=section.type, level=section.level, low=section.low, high=section.high)


def _pessimistic(ratios: Tensor, low: float, high: float, advantages: Tensor) -> tuple[Tensor, Tensor]:
    """Return -min(ratio A, clipped ratio A) and where the bound is active, both [n]."""
    free = ratios * advantages
    bounded = ratios.clamp(1 - low, 1 + high) * advantages
    return -torch.minimum(free, bounded), bounded.detach() < free.detach()


def _allowed(logprobs: Tensor) -> Tensor:
    """Return log pi [n], but 0 without a gradient where the policy forbids the token."""
    return logprobs.masked_fill(logprobs.detach() == -torch.inf, 0)


def _sequence_log_ratios(tokens: Tokens) -> Tensor:
    if tokens.sequence_log_ratios is None:
        raise ValueError(_no_sequences("sequence_log_ratios"))
    return tokens.sequence_log_ratios


def _no_sequences(name: str) -> str:
    return f"gspo, and a correction at the level of sequences, need {name} of every token, got none"
