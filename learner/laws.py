"""The student's laws at some positions, as a loss sees them: log-probs with a gradient, and no copy of [n, V] kept."""

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

_ELEMENTS_PER_THREAD = 2**18
_NUM_BLOCKS = 10
"""At least, where there are as many rows: half a dozen temporaries of a block are then less than one [n, V]."""


class Laws:
    """Laws over V tokens at n positions.

    With s the law softmax(z) of the scores z, the gradients are d log s_x / dz = onehot(x) - s and, for the mass o
    outside a support S, d log o / dz = s restricted to the complement of S, over o, - s. Each backward pass makes one
    [n, V] gradient and nothing else of that size.

    Args:
        scores: [n, V] unnormalised logs of the laws, float32 or float64 (`Head.scores`); -inf where a token is
            forbidden. What this object returns has a gradient to them.
    """

    def __init__(self, scores: Tensor) -> None:
        self.scores = scores
        self.log_normaliser = log_normalisers(scores.detach())
        """[n] nats, no gradient."""
        self._token_logprobs: tuple[Tensor, Tensor] | None = None

    def logprobs(self, ids: Tensor) -> Tensor:
        """Return [n, K] log-probs in nats at int64 ids [n, K]; -inf, without a gradient, where forbidden."""
        logprobs: Tensor = _Logprobs.apply(self.scores, self.log_normaliser, ids)  # type: ignore[no-untyped-call]
        return logprobs

    def token_logprobs(self, token_ids: Tensor) -> Tensor:
        """Return [n] log-probs in nats of one token each, int64 [n]; -inf, without a gradient, where forbidden.

        Asked again for the same tensor it returns the same one, so that all parts of a loss take one [n, V] gradient.
        """
        if self._token_logprobs is None or self._token_logprobs[0] is not token_ids:
            self._token_logprobs = token_ids, self.logprobs(token_ids[:, None])[:, 0]
        return self._token_logprobs[1]

    def logprobs_and_outside(self, ids: Tensor) -> Tensor:
        """Return [n, K + 1]: log-probs at ids [n, K], different in each row, and the log mass outside them.

        Where nothing is outside that is -inf, without a gradient. Both at once take one [n, V] gradient where apart
        they take two.
        """
        logprobs: Tensor = _LogprobsAndOutside.apply(  # type: ignore[no-untyped-call]
            self.scores, self.log_normaliser, ids
        )
        return logprobs

    def entropy(self) -> Tensor:
        """Return [n] nats, without a gradient."""
        scores, entropies = self.scores.detach(), torch.empty_like(self.log_normaliser)
        for rows in row_blocks(scores):
            logprobs = scores[rows] - self.log_normaliser[rows, None]
            probs = logprobs.exp()
            # A forbidden token counts as 0 log 0 = 0.
            entropies[rows] = -probs.mul_(logprobs.clamp_(min=torch.finfo(logprobs.dtype).min)).sum(-1)
        return entropies


def row_blocks(scores: Tensor) -> Iterator[slice]:
    """Cut the rows of [n, V] into blocks whose temporaries take little memory, and on CPU stay in a core's cache."""
    num_rows = max(1, -(-len(scores) // _NUM_BLOCKS))
    if not scores.is_cuda:
        cached = _ELEMENTS_PER_THREAD * torch.get_num_threads() // max(1, scores.shape[-1])
        num_rows = max(1, min(num_rows, cached))
    for start in range(0, len(scores), num_rows):
        yield slice(start, start + num_rows)


def log_normalisers(scores: Tensor) -> Tensor:
    """Return [n] logsumexp of each row of [n, V], without a gradient."""
    normalisers = scores.new_empty(len(scores))
    for rows in row_blocks(scores):
        torch.logsumexp(scores[rows], -1, out=normalisers[rows])
    return normalisers


class _Logprobs(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, scores: Tensor, log_normaliser: Tensor, ids: Tensor) -> Tensor:
        logprobs = scores.gather(-1, ids).sub_(log_normaliser[:, None])
        ctx.save_for_backward(scores, log_normaliser, ids, logprobs)
        return logprobs

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None, None]:
        scores, log_normaliser, ids, logprobs = ctx.saved_tensors
        gradient = gradient.masked_fill(logprobs == -torch.inf, 0)
        dense = _scaled_exponentials(scores, log_normaliser, -gradient.sum(-1))
        return dense.scatter_add_(-1, ids, gradient), None, None


class _LogprobsAndOutside(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, scores: Tensor, log_normaliser: Tensor, ids: Tensor) -> Tensor:
        outside = torch.empty_like(log_normaliser)
        for rows in row_blocks(scores):
            outside[rows] = scores[rows].scatter(-1, ids[rows], -torch.inf).logsumexp(-1)
        chosen = scores.gather(-1, ids)
        logprobs = torch.cat([chosen, outside[:, None]], -1).sub_(log_normaliser[:, None])
        ctx.save_for_backward(scores, log_normaliser, ids, logprobs, outside)
        return logprobs

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None, None]:
        scores, log_normaliser, ids, logprobs, outside = ctx.saved_tensors
        gradient = gradient.masked_fill(logprobs == -torch.inf, 0)
        total, probs = gradient.sum(-1), logprobs.exp()
        # Outside, s / o is one exponential: s and 1 / o apart would under- and overflow where o is tiny.
        shift = torch.where(outside == -torch.inf, log_normaliser, outside)
        dense = _scaled_exponentials(scores, shift, gradient[:, -1] - total * probs[:, -1])
        inside = gradient[:, :-1] - total[:, None] * probs[:, :-1]
        return dense.scatter_(-1, ids, inside), None, None


def _scaled_exponentials(scores: Tensor, shift: Tensor, scale: Tensor) -> Tensor:
    """[n, V], [n], [n] -> [n, V] scale exp(scores - shift)."""
    result = torch.empty_like(scores)
    for rows in row_blocks(scores):
        torch.sub(scores[rows], shift[rows, None], out=result[rows]).exp_().mul_(scale[rows, None])
    return result
