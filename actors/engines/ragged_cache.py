"""A key-value cache whose rows have lengths of their own, so that rolling a row back is forgetting a number.

Row b keeps the entry of its token at position p in slot p. A slot is rewritten before it is attended to again, so
entries of refused drafts and of padding need no clearing.
"""

from typing import Any

import torch
from transformers import Cache
from transformers.cache_utils import CacheLayerMixin

_GROWTH = 64


class RaggedLayer(CacheLayerMixin):
    """The cache of one attention layer: keys and values [rows, heads, capacity, head_dim]."""

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.rows: torch.Tensor | None = None
        self.positions = torch.zeros(0, 0, dtype=torch.long)
        self.num_rows = 0
        self.span = 0

    def lazy_initialization(self, key_states: torch.Tensor, value_states: torch.Tensor) -> None:
        """Allocate for the shape of the first states seen."""
        self.keys = key_states.new_zeros(0, key_states.shape[1], 0, key_states.shape[3])
        self.values = value_states.new_zeros(0, value_states.shape[1], 0, value_states.shape[3])
        self.is_initialized = True

    def update(
        self, key_states: torch.Tensor, value_states: torch.Tensor, *args: Any, **kwargs: Any
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Write [B, heads, q, dim] states at the announced rows and positions; return what they may attend to."""
        if not self.is_initialized:
            self.lazy_initialization(key_states, value_states)
        assert self.keys is not None
        assert self.values is not None
        self.keys, self.values = self._grown(self.keys), self._grown(self.values)
        rows = torch.arange(self.num_rows, device=key_states.device) if self.rows is None else self.rows
        self.keys[rows[:, None], :, self.positions] = key_states.transpose(1, 2)
        self.values[rows[:, None], :, self.positions] = value_states.transpose(1, 2)
        if self.rows is None:
            return self.keys[:, :, : self.span], self.values[:, :, : self.span]
        return self.keys[self.rows, :, : self.span], self.values[self.rows, :, : self.span]

    def keep(self, rows: torch.Tensor) -> None:
        """Drop every row but these, which are renumbered in this order."""
        if self.is_initialized:
            assert self.keys is not None
            assert self.values is not None
            rows = rows[rows < len(self.keys)]  # the last rows may not have been written yet
            self.keys, self.values = self.keys[rows], self.values[rows]

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        """Width of the keys returned by `update`, and their offset."""
        return self.span, 0

    def get_seq_length(self) -> int:
        """Positions are always given by the caller, so no length is needed."""
        return 0

    def get_max_length(self) -> int:
        """No maximum."""
        return -1

    def _grown(self, states: torch.Tensor) -> torch.Tensor:
        rows, heads, capacity, dim = states.shape
        if rows >= self.num_rows and capacity >= self.span:
            return states
        larger = states.new_zeros(
            max(rows, self.num_rows), heads, max(capacity, -(-self.span // _GROWTH) * _GROWTH), dim
        )
        larger[:rows, :, :capacity] = states
        return larger


class RaggedCache(Cache):
    """One `RaggedLayer` per layer of the model."""

    def __init__(self, num_layers: int) -> None:
        self._ragged = [RaggedLayer() for _ in range(num_layers)]
        super().__init__(layers=list(self._ragged))

    def announce(self, rows: torch.Tensor | None, positions: torch.Tensor, num_rows: int) -> torch.Tensor:
        """Say which rows ([B], None for all) and positions ([B, q]) the next forward writes.

        Returns:
            [B, 1, q, span] bool mask, True where a query may attend.
        """
        span = int(positions.max()) + 1
        for layer in self._ragged:
            layer.rows, layer.positions, layer.num_rows, layer.span = rows, positions, num_rows, span
        slots = torch.arange(span, device=positions.device)
        return (slots <= positions[..., None])[:, None]

    def keep(self, rows: torch.Tensor) -> None:
        """Drop every row but these."""
        for layer in self._ragged:
            layer.keep(rows)
