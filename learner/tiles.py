"""Losses from last hidden states, a few tokens at a time, so that logits of a whole micro-batch never exist.

N tokens, hidden size H, V' rows of the output head, V <= V' tokens of the shared vocabulary. The gradient is taken in
the forward pass: as soon as a tile's logits are there, so is their gradient, and with it that of hidden states and
weights, and the tile's memory is used again. (The same idea for one fixed loss: Liger Kernel, arXiv 2410.10989.) Only
[N, H] and [V', H] are kept.
"""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.nn.functional import linear

from actors.head import Head
from learner.laws import Laws
from learner.losses import Loss, Tokens, num_parts


@dataclass(frozen=True, slots=True, kw_only=True)
class OutputHead:
    """What makes a law of a last hidden state."""

    weight: Tensor
    """[V', H], V' at least the head's vocabulary."""
    bias: Tensor | None = None
    """[V']"""
    head: Head

    @property
    def vocab_size(self) -> int:
        """V, how many tokens the laws are over."""
        return self.weight.shape[0] if self.head.vocab_size is None else self.head.vocab_size

    def scores(self, hidden: Tensor) -> Tensor:
        """Return [n, V] unnormalised logs of the laws, at least float32 and without a gradient, from hidden [n, H]."""
        return self.read(hidden)[0]

    @torch.no_grad()
    def read(self, hidden: Tensor) -> tuple[Tensor, Tensor | None]:
        """Return the scores [n, V], without copies of them, and what `read_backward_` needs to know."""
        logits = self._logits(hidden)
        if self.head.temperature != 1:
            logits.div_(self.head.temperature)
        if len(self.head.stop_token_ids) < 2:
            return logits, None
        stops = self._stops(logits)
        alone = logits.index_select(-1, stops)
        logits.index_fill_(-1, stops, -torch.inf).index_copy_(-1, stops[:1], alone.logsumexp(-1, keepdim=True))
        return logits, alone.softmax(-1)

    @torch.no_grad()
    def read_backward_(self, gradient: Tensor, shares: Tensor | None) -> None:
        """Turn a gradient to the scores, [n, V], into that to the logits, in place."""
        if shares is not None:
            # The stop event's gradient, to each stop token by its share of the event.
            stops = self._stops(gradient)
            gradient.index_copy_(-1, stops, gradient.index_select(-1, stops[:1]) * shares)
        if self.head.temperature != 1:
            gradient.div_(self.head.temperature)

    def _logits(self, hidden: Tensor) -> Tensor:
        """Return [n, V] at least float32; rows of the weight beyond the shared vocabulary are not touched."""
        bias = None if self.bias is None else self.bias[: self.vocab_size]
        logits = linear(hidden, self.weight[: self.vocab_size], bias)
        return logits if logits.dtype == torch.float64 else logits.float()

    def _stops(self, like: Tensor) -> Tensor:
        return torch.tensor(self.head.stop_token_ids, device=like.device)


@dataclass(frozen=True, slots=True, kw_only=True)
class TiledLoss:
    """A loss of N tokens."""

    total: Tensor
    """Scalar, the sum of weights x per_token, with a gradient to hidden states, weight and bias."""
    per_token: Tensor
    """[N], without a gradient; not finite where the loss is not, whatever the weight."""
    metrics: Mapping[str, Tensor]
    """Name -> sum over the tokens, without a gradient."""


def loss_in_tiles(hidden: Tensor, output: OutputHead, loss: Loss, tokens: Tokens, *, tile_bytes: int) -> TiledLoss:
    """Return a loss of N tokens whose gradient is ready: backward only multiplies it.

    One backward pass is possible. A weight or bias that asks for no gradient gets none computed. The weight's gradient
    is summed in float32 at least (of 16 bits, each tile's part is one more of its size for a moment); each tile reads
    and writes all of it, so few large tiles are faster than many.

    Args:
        hidden: [N, H] last hidden states at the positions that predict the tokens.
        output: makes laws of them.
        loss: of each token.
        tokens: all else that is known of the N tokens; sequence_log_ratios included if the loss needs them.
        tile_bytes: memory for one tile: (2 + the loss's `num_parts`) x V numbers of float32 (float64) for each token,
            and V more of the weight's type where that has 16 bits. At least one token is in a tile.

    Raises:
        ValueError: if the tokens lack what the loss is made of.
    """
    inputs = (hidden, output.weight, output.bias)
    gradients = _Gradients(*inputs)
    parts, metrics = [], dict[str, Tensor]()
    with torch.no_grad():
        for tile in _tiles(hidden, output, tile_bytes, _num_copies(loss)):
            tile_per_token, tile_metrics = _learn_tile(tile, hidden, output, loss, tokens, gradients)
            parts.append(tile_per_token)
            for name, value in tile_metrics.items():
                metrics[name] = metrics[name] + value if name in metrics else value
        per_token = torch.cat(parts)
        total = (per_token * tokens.weights).sum()
    if gradients.wanted:
        total = _Ready.apply(total, gradients, *inputs)  # type: ignore[no-untyped-call]
    return TiledLoss(total=total, per_token=per_token, metrics=metrics)


def logprobs_in_tiles(hidden: Tensor, output: OutputHead, token_ids: Tensor, *, tile_bytes: int) -> Tensor:
    """Return [N] log-probs in nats of the tokens int64 [N], without a gradient, from last hidden states [N, H].

    Args:
        hidden: at the positions that predict the tokens.
        output: makes laws of them.
        token_ids: whose log-probs.
        tile_bytes: as in `loss_in_tiles`, but of 2 x V numbers.
    """
    with torch.no_grad():
        # Scores, and in blocks what their normalisers take.
        tiles = _tiles(hidden, output, tile_bytes, 2)
        parts = [Laws(output.scores(hidden[tile])).token_logprobs(token_ids[tile]) for tile in tiles]
        return torch.cat(parts)


class _Gradients:
    """What is summed over the tiles: the gradients to hidden states, weight and bias; None for one not asked for."""

    def __init__(self, hidden: Tensor, weight: Tensor, bias: Tensor | None) -> None:
        self._inputs = hidden.detach(), weight.detach()
        self._sums = [
            _zeros(hidden, hidden.dtype),
            _zeros(weight, torch.promote_types(weight.dtype, torch.float32)),
            None if bias is None else _zeros(bias, torch.promote_types(bias.dtype, torch.float32)),
        ]
        self.wanted = any(sum_ is not None for sum_ in self._sums)

    def add(self, tile: slice, gradient: Tensor) -> None:
        """Add what a tile's gradient to the logits, [n, V], means for each."""
        hidden, weight = self._inputs
        hidden_sum, weight_sum, bias_sum = self._sums
        size = gradient.shape[-1]
        if bias_sum is not None:
            bias_sum[:size] += gradient.sum(0)
        gradient = gradient.to(weight.dtype)
        if hidden_sum is not None:
            torch.mm(gradient, weight[:size], out=hidden_sum[tile])
        if weight_sum is None:
            return
        if weight_sum.dtype == weight.dtype:
            weight_sum[:size].addmm_(gradient.T, hidden[tile])
        else:
            weight_sum[:size] += gradient.T @ hidden[tile]

    def take(self, scale: Tensor) -> list[Tensor | None]:
        """Return the sums times a scalar; they are given away, so only once."""
        sums, self._sums = self._sums, []
        if not sums:
            raise RuntimeError("a tiled loss has one backward pass, got a second; call loss_in_tiles again")
        return [None if sum_ is None else sum_.mul_(scale) for sum_ in sums]


class _Ready(torch.autograd.Function):
    """Gives a total the gradients that are there already."""

    @staticmethod
    def forward(ctx: Any, total: Tensor, gradients: _Gradients, *inputs: Tensor | None) -> Tensor:
        ctx.gradients = gradients
        ctx.dtypes = [None if tensor is None else tensor.dtype for tensor in inputs]
        return total.clone()

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, scale: Tensor) -> tuple[Tensor | None, ...]:
        sums = ctx.gradients.take(scale)
        return (
            None,
            None,
            *(None if sum_ is None else sum_.to(dtype) for sum_, dtype in zip(sums, ctx.dtypes, strict=True)),
        )


def _zeros(tensor: Tensor, dtype: torch.dtype) -> Tensor | None:
    """Return zeros for the gradient to a tensor, None if it asks for none."""
    asked = torch.is_grad_enabled() and tensor.requires_grad
    return torch.zeros_like(tensor, dtype=dtype, requires_grad=False) if asked else None


def _num_copies(loss: Loss) -> int:
    """Return how many tensors of [tile, V] there are at once at most.

    They are the scores and the gradient of each part (one is the teacher's scores before), and one more: the sum of two
    gradients, or before those are there the temporaries of `row_blocks`.
    """
    return 2 + num_parts(loss)


def _tiles(hidden: Tensor, output: OutputHead, tile_bytes: int, num_copies: int) -> Iterator[slice]:
    """Cut N tokens into as few tiles as the memory allows, of nearly the same length; one empty tile if N = 0."""
    itemsize = output.weight.element_size()
    bytes_per_token = output.vocab_size * (num_copies * max(itemsize, 4) + (itemsize if itemsize < 4 else 0))
    longest = max(1, tile_bytes // bytes_per_token)
    num_tiles = max(1, -(-len(hidden) // longest))
    for i in range(num_tiles):
        yield slice(i * len(hidden) // num_tiles, (i + 1) * len(hidden) // num_tiles)


def _learn_tile(
    tile: slice, hidden: Tensor, output: OutputHead, loss: Loss, tokens: Tokens, gradients: _Gradients
) -> tuple[Tensor, Mapping[str, Tensor]]:
    """Add a tile's gradients to the sums and return its loss per token and metrics; nothing of size V outlives it."""
    scores, shares = output.read(hidden[tile])
    tokens = tokens[tile]
    with torch.set_grad_enabled(gradients.wanted):
        outputs = loss(Laws(scores.requires_grad_(gradients.wanted)), tokens)
    if outputs.per_token.requires_grad:
        weights = tokens.weights.to(outputs.per_token.dtype)
        (gradient,) = torch.autograd.grad(outputs.per_token, scores, weights)
        output.read_backward_(gradient, shares)
        gradients.add(tile, gradient)
    return outputs.per_token.detach(), outputs.metrics
