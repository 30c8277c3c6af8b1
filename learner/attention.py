"""Causal attention within each of the sequences that lie one after another in a row, without a mask of its own.

Transformers calls it in place of its own attention functions (`AttentionInterface`) and then makes no mask at all. A
sequence never sees another, so that packing changes no number but by rounding. Written against transformers 5.19.
"""

from collections.abc import Sequence
from itertools import groupby
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import AttentionInterface

NAME = "tutelage_segments"


def register() -> None:
    """Make the attention known to transformers as `attn_implementation="tutelage_segments"`; may be called again."""
    AttentionInterface.register(NAME, segment_attention)


def segment_attention(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    *,
    scaling: float | None = None,
    dropout: float = 0.0,
    sliding_window: int | None = None,
    segments: Sequence[Sequence[int]] | None = None,
    **settings: Any,
) -> tuple[Tensor, None]:
    """Return softmax(scaling q k^T) v (arXiv 1706.03762) of each sequence by itself.

    Args:
        module: the layer that asks, for its name in an error.
        query: [R, heads, L, D]; heads is a multiple of the keys'.
        key: [R, key heads, L, D].
        value: like key.
        attention_mask: must be None.
        scaling: of the scores; D ** -0.5 if left out.
        dropout: must be 0.
        sliding_window: how many tokens back each one sees, itself included; None for all.
        segments: [R] the lengths of the sequences in each row, from the front; the model's keyword argument.
        settings: what other models pass besides; refused where it would change the result.

    Returns:
        [R, L, heads, D], and None for the weights. Past the end of a row's last sequence it is of no meaning.

    Raises:
        ValueError: for anything that this attention does not compute.
    """
    _refuse_what_is_not_computed(module, attention_mask, dropout, segments, settings)
    assert segments is not None
    groups = query.shape[1] // key.shape[1]
    if groups > 1:
        # Of torch's fused kernels not all know grouped heads, and the one that is left makes [L, L] scores.
        key, value = key.repeat_interleave(groups, 1), value.repeat_interleave(groups, 1)
    if all(len(row) == 1 for row in segments):
        # Padding on the right needs no mask: no token sees what comes after it.
        return _causal(query, key, value, scaling, sliding_window).transpose(1, 2), None
    rows = [_row(query[i], key[i], value[i], lengths, scaling, sliding_window) for i, lengths in enumerate(segments)]
    return torch.stack(rows).transpose(1, 2), None


def _row(
    query: Tensor, key: Tensor, value: Tensor, lengths: Sequence[int], scaling: float | None, window: int | None
) -> Tensor:
    """Attend within one row, all [heads, L, D]; neighbours of one length are computed together."""
    outputs, start = [], 0
    for length, run in groupby(lengths):
        count = len(list(run))
        stop = start + count * length
        apart = [part[:, start:stop].unflatten(1, (count, length)).transpose(0, 1) for part in (query, key, value)]
        outputs.append(_causal(apart[0], apart[1], apart[2], scaling, window).transpose(0, 1).flatten(1, 2))
        start = stop
    outputs.append(torch.zeros_like(query[:, start:]))
    return torch.cat(outputs, 1)


def _causal(query: Tensor, key: Tensor, value: Tensor, scaling: float | None, window: int | None) -> Tensor:
    """Attend causally along the last but one dimension, in a window if there is one."""
    length = query.shape[-2]
    if window is None or window >= length:
        return F.scaled_dot_product_attention(query, key, value, is_causal=True, scale=scaling)
    band = torch.ones(length, length, dtype=torch.bool, device=query.device).tril().triu(1 - window)
    return F.scaled_dot_product_attention(query, key, value, attn_mask=band, scale=scaling)


def _refuse_what_is_not_computed(
    module: nn.Module,
    attention_mask: Tensor | None,
    dropout: float,
    segments: Sequence[Sequence[int]] | None,
    settings: dict[str, Any],
) -> None:
    name = type(module).__name__
    if segments is None:
        raise ValueError(f"the learner's attention must be told where sequences end, but {name} does not pass it on")
    if attention_mask is not None:
        raise ValueError(f"the learner's attention must make no mask, but {name} passes one")
    if dropout:
        raise ValueError(f"attention_dropout must be 0 in the student's config.json, got {dropout:g}")
    if not getattr(module, "is_causal", True):
        raise ValueError(f"the student's attention must be causal, but {name} is not")
    for setting in ("softcap", "s_aux", "position_bias"):
        if settings.get(setting) is not None:
            raise ValueError(f"the learner's attention computes a plain softmax, but {name} asks for {setting}")
