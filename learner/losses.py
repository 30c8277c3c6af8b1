"""What a loss is: a law of the student at each token of a completion goes in, a number per token comes out.

n is the number of tokens of a micro-batch, or of a tile of it; K the support size, V the vocabulary. Only tokens that
train are there: completions of all rollouts lie one after another without padding, so no loss knows a mask. All
logarithms are natural, all numbers at least float32. Each loss is one object in `learner.distillation` or
`learner.policy_losses`, a plain torch formula; its gradient is taken tile by tile (`learner.tiles`).
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, fields
from typing import Any, Protocol

import torch
from torch import Tensor

from learner.laws import Laws


@dataclass(frozen=True, slots=True, kw_only=True)
class Tokens:
    """All that is known of n tokens besides the student's law. None of it has a gradient."""

    token_ids: Tensor
    """[n] int64, the tokens that were drawn."""
    weights: Tensor
    """[n] what each token's loss is multiplied by in the loss of the step; over all ranks of a step they sum to 1
    with token_mean and sequence_mean (`learner.aggregation`)."""
    rollouts: Tensor
    """[n] int64, which rollout of the micro-batch each token belongs to, from 0 and never falling."""
    behaviour_logprobs: Tensor
    """[n] nats, of the law that drew each token."""
    advantages: Tensor
    """[n], one value per rollout."""
    sequence_log_ratios: Tensor | None = None
    """[n] nats, the sum over the token's whole rollout of log policy - log behaviour, of the current weights."""
    sequence_lengths: Tensor | None = None
    """[n] int64, how many tokens that sum is over."""
    support_ids: Tensor | None = None
    """[n, K] int64, all different; a student's support is sorted by falling log-prob of the student sampled from. None
    beside support_teacher_logprobs: those are of the whole vocabulary in its order, K = V."""
    support_teacher_logprobs: Tensor | None = None
    """[n, K] nats; -inf for a token that the teacher forbids. None: nothing is known of the teacher's law."""
    support_teacher_tails: Tensor | None = None
    """[n] nats, the teacher's mass outside the support; -inf where there is none."""
    teacher_hidden: Tensor | None = None
    """[n, H] the teacher's last hidden state, of which its output head makes logits."""
    reference_logprobs: Tensor | None = None
    """[n] nats, of the same tokens under the frozen reference policy."""

    def __len__(self) -> int:
        return len(self.token_ids)

    def __getitem__(self, part: slice) -> "Tokens":
        """Return some of the tokens."""
        return self._each(lambda values: values[part])

    def to(self, device: torch.device) -> "Tokens":
        """Return the same on another device."""
        return self._each(lambda values: values.to(device))

    def _each(self, change: Callable[[Tensor], Tensor]) -> "Tokens":
        values = {f.name: getattr(self, f.name) for f in fields(self)}
        changed: dict[str, Any] = {name: None if value is None else change(value) for name, value in values.items()}
        return Tokens(**changed)


@dataclass(frozen=True, slots=True, kw_only=True)
class LossOutputs:
    """A loss of n tokens."""

    per_token: Tensor
    """[n], with a gradient to the scores of the `Laws` it was made from; not yet weighted."""
    metrics: Mapping[str, Tensor]
    """Name -> sum over the tokens (scalar, no gradient); divided by the step's number of tokens for the mean."""


class Loss(Protocol):
    """Something to minimise."""

    @property
    def needs_sequence_ratios(self) -> bool:
        """Whether the tokens must carry sequence_log_ratios, which takes a pass over the micro-batch before."""

    def __call__(self, laws: Laws, tokens: Tokens) -> LossOutputs:
        """Return the loss of each token.

        Raises:
            ValueError: if the tokens lack what this loss is made of.
        """


@dataclass(frozen=True, slots=True, kw_only=True)
class WeightedSum:
    """Several losses of the same tokens, each times its coefficient: task reward and distillation in one run, say."""

    parts: tuple[tuple[float, Loss], ...]

    @property
    def needs_sequence_ratios(self) -> bool:
        """Whether one of the parts does."""
        return any(loss.needs_sequence_ratios for _, loss in self.parts)

    def __call__(self, laws: Laws, tokens: Tokens) -> LossOutputs:
        """Return the weighted sum, with the metrics of all parts."""
        outputs = [(coefficient, loss(laws, tokens)) for coefficient, loss in self.parts]
        metrics = {name: value for _, output in outputs for name, value in output.metrics.items()}
        total = torch.stack([coefficient * output.per_token for coefficient, output in outputs]).sum(0)
        return LossOutputs(per_token=total, metrics=metrics)


def num_parts(loss: Loss) -> int:
    """Return how many losses one is made of, which is how many [n, V] gradients it may take."""
    return sum(num_parts(part) for _, part in loss.parts) if isinstance(loss, WeightedSum) else 1
