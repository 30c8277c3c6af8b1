"""A key-value cache whose rows have lengths of their own, so that rolling a row back is forgetting a number.

Row b keeps the entry of its token at position p in slot p. A slot is rewritten before it is attended to again, so
entries of refused drafts, of padding and of rows that are gone need no clearing. Buffers grow and never shrink.
"""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from transformers import AttentionInterface, AttentionMaskInterface, Cache
from transformers.cache_utils import CacheLayerMixin
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import sdpa_mask

ATTENTION = "tutelage_ragged"
"""Name of `ragged_attention` among transformers' implementations."""

_GROWTH = 64
"""Slots that buffers grow by; the copy that this takes costs little beside the reads of that many tokens."""


class _Plan:
    """What the next forward does; all layers share it."""

    rows: slice | Tensor = slice(0, 0)
    """That are written, and attended to."""
    slots: Tensor
    """[B * q] of the written entries, counted through all rows."""
    span: int = 0
    """Slots of each row that may be attended to."""
    num_rows: int = 0
    """Of the buffers."""
    capacity: int = 0
    """Slots of each row in the buffers."""


class RaggedLayer(CacheLayerMixin):
    """The cache of one attention layer: keys and values [rows, capacity, heads, head_dim]."""

    def __init__(self, plan: _Plan) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self._plan = plan

    def lazy_initialization(self, key_states: Tensor, value_states: Tensor) -> None:
        """Allocate for the shape of the first states seen."""
        self.keys, self.values = (
            states.new_zeros(0, 0, states.shape[1], states.shape[3]) for states in (key_states, value_states)
        )
        self.is_initialized = True

    def update(self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
        """Write [B, heads, q, dim] states where the plan says; return [B, heads, span, dim] to attend to."""
        if not self.is_initialized:
            self.lazy_initialization(key_states, value_states)
        self.keys, keys = self._written(self.keys, key_states)
        self.values, values = self._written(self.values, value_states)
        return keys, values

    def move(self, sources: Tensor, targets: Tensor, span: int) -> None:
        """Copy the first slots of some rows over others."""
        for states in (self.keys, self.values):
            if states is not None:
                states[targets, :span] = states[sources, :span]

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        """Width of the keys returned by `update`, and their offset."""
        return self._plan.span, 0

    def get_seq_length(self) -> int:
        """Positions are always given by the caller, so no length is needed."""
        return 0

    def get_max_length(self) -> int:
        """No maximum."""
        return -1

    def _written(self, buffer: Tensor | None, states: Tensor) -> tuple[Tensor, Tensor]:
        assert buffer is not None
        plan = self._plan
        rows, capacity, heads, dim = buffer.shape
        if rows < plan.num_rows or capacity < plan.capacity:
            # Zeros, because what is never written is still multiplied by an attention of 0.
            larger = buffer.new_zeros(plan.num_rows, plan.capacity, heads, dim)
            larger[:rows, :capacity] = buffer
            buffer = larger
        buffer.view(-1, heads, dim).index_copy_(0, plan.slots, states.transpose(1, 2).reshape(-1, heads, dim))
        return buffer, buffer[plan.rows, : plan.span].transpose(1, 2)


class RaggedCache(Cache):
    """One `RaggedLayer` per layer of the model."""

    def __init__(self, num_layers: int) -> None:
        self._plan = _Plan()
        self._ragged = [RaggedLayer(self._plan) for _ in range(num_layers)]
        super().__init__(layers=list(self._ragged))

    def update(
        self, key_states: Tensor, value_states: Tensor, layer_idx: int, *args: Any, **kwargs: Any
    ) -> tuple[Tensor, Tensor]:
        """Write and read one layer (see `RaggedLayer.update`)."""
        return self._ragged[layer_idx].update(key_states, value_states)

    def announce(self, rows: slice | Tensor, positions: Tensor, dtype: torch.dtype) -> Tensor:
        """Say which rows (neighbours, or any [B]) and positions ([B, q]) the next forward writes.

        Rows that are not neighbours are gathered, which copies all that they hold.

        Returns:
            [B, 1, q, span] mask of the given type, added to attention scores: -inf where a query may not attend.
        """
        plan, device = self._plan, positions.device
        every = torch.arange(rows.start, rows.stop, device=device) if isinstance(rows, slice) else rows
        last_row = rows.stop if isinstance(rows, slice) else int(rows.max()) + 1
        plan.rows, plan.span = rows, int(positions.max()) + 1
        if last_row > plan.num_rows:
            plan.num_rows = max(last_row, plan.num_rows * 5 // 4)
        if plan.span > plan.capacity:
            plan.capacity = -(-plan.span // _GROWTH) * _GROWTH
        plan.slots = (every[:, None] * plan.capacity + positions).flatten()
        hidden = torch.arange(plan.span, device=device) > positions[..., None]
        return torch.zeros(hidden.shape, dtype=dtype, device=device).masked_fill_(hidden, -torch.inf)[:, None]

    def move(self, sources: Sequence[int], targets: Sequence[int], span: int) -> None:
        """Copy the first `span` slots of some rows over others, in every layer."""
        if not sources or not span:
            return
        device = self._plan.slots.device
        where = torch.tensor(sources, device=device), torch.tensor(targets, device=device)
        for layer in self._ragged:
            layer.move(*where, span)


def ragged_attention(
    module: torch.nn.Module, query: Tensor, key: Tensor, value: Tensor, attention_mask: Tensor | None, **kwargs: Any
) -> tuple[Tensor, None]:
    """Attend as transformers' "sdpa" does, without repeating the cache for query heads that share a key head.

    Query heads of one key head are laid side by side as further queries, since copying the cache costs more than
    attending to it.
    """
    batch, heads, length, dim = query.shape
    groups = heads // key.shape[1]
    if attention_mask is None or groups == 1 or kwargs.get("position_bias") is not None:
        output: tuple[Tensor, None] = sdpa_attention_forward(module, query, key, value, attention_mask, **kwargs)
        return output
    attended = torch.nn.functional.scaled_dot_product_attention(
        query.reshape(batch, heads // groups, groups * length, dim),
        key,
        value,
        attn_mask=attention_mask.repeat(1, 1, groups, 1),
        scale=kwargs.get("scaling"),
    )
    return attended.view(batch, heads, length, value.shape[-1]).transpose(1, 2).contiguous(), None


AttentionInterface.register(ATTENTION, ragged_attention)
AttentionMaskInterface.register(ATTENTION, sdpa_mask)
