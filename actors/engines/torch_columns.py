"""What is told of each token, gathered from log-probs over the shared vocabulary of V ids."""

from collections.abc import Sequence
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from actors.engines.protocol import Scores, Support
from actors.random_numbers import sample_from_logprobs
from actors.teacher_signal import SignalSpec

_COLUMN_ELEMENTS = 1 << 18
"""Log-probs that are gathered from together: several steps of a small model, one of a large."""


class Columns:
    """Gathers from log-probs [n, V] of many steps what is told of each token, several steps at a time."""

    def __init__(self, support_size: int, vocab_size: int) -> None:
        self._support_size, self._vocab_size = support_size, vocab_size
        self._steps: list[tuple[Tensor, Tensor, Tensor | None, Tensor | None]] = []
        self._num_elements = 0
        self._told: list[dict[str, Tensor]] = []

    def add(
        self, tokens: Tensor, logprobs: Tensor, *, behaviour: Tensor | None = None, spare_uniforms: Tensor | None = None
    ) -> None:
        """Add a step: the tokens [n] drawn, the model's law [n, V], the law drawn from where that is another."""
        self._steps.append((tokens, logprobs, behaviour, spare_uniforms))
        self._num_elements += logprobs.numel()
        if self._num_elements >= _COLUMN_ELEMENTS:
            self._flush()

    def collect(self) -> dict[str, npt.NDArray[Any]]:
        """Return [N, ...] of all steps, one after the other, under the names of `Draft` and `Generation`."""
        if not self._told and not self._steps:
            self.add(torch.zeros(0, dtype=torch.long), torch.zeros(0, self._vocab_size))
        self._flush()
        return {name: _joined([told[name] for told in self._told]).cpu().numpy() for name in self._told[0]}

    def _flush(self) -> None:
        if not self._steps:
            return
        parts = list(zip(*self._steps, strict=True))
        self._steps, self._num_elements = [], 0
        tokens, logprobs = _joined(parts[0])[:, None], _joined(parts[1])
        token_logprobs = logprobs.gather(-1, tokens)[:, 0]
        behaviour = token_logprobs if parts[2][0] is None else _joined(parts[2]).gather(-1, tokens)[:, 0]
        support_logprobs, support_ids = logprobs.topk(self._support_size, dim=-1)
        spare, spare_logprobs = torch.full_like(tokens[:, 0], -1), torch.full_like(token_logprobs, -torch.inf)
        if self._support_size in (0, self._vocab_size):
            tail = torch.full_like(token_logprobs, 0.0 if self._support_size == 0 else -torch.inf)
        else:
            outside = logprobs.scatter(-1, support_ids, -torch.inf)
            tail = torch.logsumexp(outside, dim=-1)
            if parts[3][0] is not None:
                spare = sample_from_logprobs(outside, _joined(parts[3]))
                spare_logprobs = logprobs.gather(-1, spare[:, None])[:, 0]
        self._told.append(
            {
                "token_ids": tokens[:, 0].to(torch.int32),
                "token_logprobs": token_logprobs,
                "behaviour_logprobs": behaviour,
                "support_ids": support_ids.to(torch.int32),
                "support_logprobs": support_logprobs,
                "tail_logprobs": tail,
                "spare_ids": spare.to(torch.int32),
                "spare_logprobs": spare_logprobs,
            }
        )


def gathered(logprobs: Tensor, token_ids: Tensor, support_ids: Tensor) -> Scores:
    """Gather [..., V] log-probs at [...] tokens and [..., K] ids."""
    outside = logprobs.scatter(-1, support_ids, -torch.inf)
    return Scores(
        token_logprobs=logprobs.gather(-1, token_ids[..., None])[..., 0].cpu().numpy(),
        support_logprobs=logprobs.gather(-1, support_ids).cpu().numpy(),
        tail_logprobs=torch.logsumexp(outside, dim=-1).cpu().numpy(),
    )


def beside(logprobs: Tensor, support_ids: Tensor, signal: SignalSpec) -> Support:
    """Gather from [n, V] log-probs what the signal wants of them, all of it without gradients.

    Args:
        logprobs: of the model that is asked.
        support_ids: [n, K'] of another model, of which a `union` takes the first K.
        signal: `full`, or a support other than the student's.
    """
    if signal.kind == "full":
        return Support(ids=None, logprobs=logprobs.cpu().numpy(), tail_logprobs=None)
    assert signal.support_size is not None
    size, vocab_size = signal.support_size, logprobs.shape[-1]
    taken = support_ids[:, : size if signal.support == "union" else 0]
    # Of so many likeliest ids at most as many are taken as there are taken ones, so that enough are left.
    likeliest = logprobs.topk(min(size + taken.shape[-1], vocab_size), dim=-1).indices
    is_taken = (likeliest[..., None] == taken[:, None]).any(-1)
    free_first = is_taken.to(torch.int8).argsort(dim=-1, stable=True)
    free = likeliest.gather(-1, free_first[:, : min(size, vocab_size - taken.shape[-1])])
    ids = torch.cat([taken, free], dim=-1)
    scores = gathered(logprobs, ids[:, 0], ids)
    return Support(
        ids=ids.to(torch.int32).cpu().numpy(), logprobs=scores.support_logprobs, tail_logprobs=scores.tail_logprobs
    )


def bits(hidden: Tensor) -> npt.NDArray[Any]:
    """Return states as float32, or the bits of bfloat16 as uint16, which numpy lacks."""
    if hidden.dtype == torch.bfloat16:
        return hidden.view(torch.int16).cpu().numpy().view(np.uint16)
    return hidden.float().cpu().numpy()


def _joined(tensors: Sequence[Any]) -> Tensor:
    return torch.cat(list(tensors)) if len(tensors) > 1 else tensors[0]
