"""Attention within sequences that share a row, against the plain formula with an explicit mask."""

import copy
from collections.abc import Sequence
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import (
    AttentionInterface,
    Gemma2Config,
    Gemma2ForCausalLM,
    GemmaConfig,
    GemmaForCausalLM,
    LlamaConfig,
    LlamaForCausalLM,
    MistralConfig,
    MistralForCausalLM,
    Qwen2Config,
    Qwen2ForCausalLM,
    Qwen3Config,
    Qwen3ForCausalLM,
)

from learner import attention

SIZES: dict[str, Any] = {
    "vocab_size": 17,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 8,
    "max_position_embeddings": 64,
    "initializer_range": 0.3,
}
WINDOW = 3
MODELS: dict[str, tuple[Any, Any, int | None]] = {
    "qwen3": (Qwen3ForCausalLM, Qwen3Config(**SIZES), None),
    "qwen2": (Qwen2ForCausalLM, Qwen2Config(**SIZES), None),
    "llama": (LlamaForCausalLM, LlamaConfig(**SIZES), None),
    "gemma": (GemmaForCausalLM, GemmaConfig(**SIZES), None),
    "mistral in a window": (MistralForCausalLM, MistralConfig(**SIZES, sliding_window=WINDOW), WINDOW),
}


def plain_attention(
    module: Any, query: Tensor, key: Tensor, value: Tensor, attention_mask: Tensor, *, scaling: float, **_: Any
) -> tuple[Tensor, None]:
    """As transformers' eager one, but for its softmax, which that takes in float32."""
    key, value = (part.repeat_interleave(query.shape[1] // part.shape[1], 1) for part in (key, value))
    scores = scaling * query @ key.transpose(-1, -2) + attention_mask
    return (scores.softmax(-1) @ value).transpose(1, 2), None


def model_pair(name: str) -> tuple[Any, Any]:
    """The same float64 model with plain attention and with the learner's."""
    model_class, config, _ = MODELS[name]
    AttentionInterface.register("plain_for_tests", plain_attention)
    attention.register()
    torch.manual_seed(0)
    plain = model_class._from_config(copy.deepcopy(config), attn_implementation="plain_for_tests").double()
    ours = model_class._from_config(copy.deepcopy(config), attn_implementation=attention.NAME).double()
    ours.load_state_dict(plain.state_dict())
    return plain, ours


def explicit_mask(rows: Sequence[Sequence[int]], num_columns: int, window: int | None) -> Tensor:
    """[R, 1, L, L], 0 where a token is seen and a large negative number elsewhere; padding sees itself."""
    masks = torch.full((len(rows), 1, num_columns, num_columns), -1e9, dtype=torch.float64)
    for mask, lengths in zip(masks[:, 0], rows, strict=True):
        start = 0
        for length in [*lengths, *[1] * (num_columns - sum(lengths))]:
            for i in range(length):
                first = 0 if window is None else max(0, i + 1 - window)
                mask[start + i, start + first : start + i + 1] = 0
            start += length
    return masks


@pytest.mark.parametrize("name", MODELS)
@pytest.mark.parametrize("rows", [[[4, 4, 1, 5, 2, 2, 2]], [[7], [3], [1]], [[3, 4], [2, 2]]], ids=str)
def test_outputs_and_gradients_are_those_of_plain_attention_with_a_mask(name: str, rows: list[list[int]]) -> None:
    plain, ours = model_pair(name)
    num_columns = max(map(sum, rows))
    positions = torch.zeros(len(rows), num_columns, dtype=torch.int64)
    real = torch.zeros(len(rows), num_columns, dtype=torch.bool)
    for i, lengths in enumerate(rows):
        positions[i, : sum(lengths)] = torch.cat([torch.arange(length) for length in lengths])
        real[i, : sum(lengths)] = True
    ids = torch.randint(SIZES["vocab_size"], positions.shape, generator=torch.Generator().manual_seed(1))
    window = MODELS[name][2]
    mask = explicit_mask(rows, num_columns, window)
    expected = plain(ids, attention_mask=mask, position_ids=positions, use_cache=False).logits[real]
    actual = ours(ids, position_ids=positions, segments=rows, use_cache=False).logits[real]
    torch.testing.assert_close(actual, expected, rtol=1e-7, atol=1e-9)
    direction = torch.randn(expected.shape, dtype=torch.float64, generator=torch.Generator().manual_seed(2))
    (expected * direction).sum().backward()
    (actual * direction).sum().backward()
    for (parameter_name, one), other in zip(plain.named_parameters(), ours.parameters(), strict=True):
        torch.testing.assert_close(other.grad, one.grad, rtol=1e-5, atol=1e-9, msg=parameter_name)


def test_a_sequence_sees_nothing_of_its_neighbours() -> None:
    _, ours = model_pair("qwen3")
    ids = torch.randint(SIZES["vocab_size"], (1, 9), generator=torch.Generator().manual_seed(1))
    positions = torch.tensor([[0, 1, 2, 0, 1, 2, 0, 1, 2]])
    changed = ids.clone()
    changed[0, [0, 1, 2, 6, 7, 8]] = (changed[0, [0, 1, 2, 6, 7, 8]] + 1) % SIZES["vocab_size"]
    one, other = (ours(x, position_ids=positions, segments=[[3, 3, 3]], use_cache=False).logits for x in (ids, changed))
    assert torch.equal(one[0, 3:6], other[0, 3:6])
    assert not torch.equal(one[0, :3], other[0, :3])


def test_what_it_does_not_compute_is_refused() -> None:
    _, ours = model_pair("llama")
    ids = torch.zeros(1, 3, dtype=torch.int64)
    with pytest.raises(ValueError, match="must be told where sequences end, but LlamaAttention does not pass it on"):
        ours(ids, use_cache=False)
    capped = Gemma2ForCausalLM._from_config(Gemma2Config(**SIZES), attn_implementation=attention.NAME)
    with pytest.raises(ValueError, match="a plain softmax, but Gemma2Attention asks for softcap"):
        capped(ids, segments=[[3]], use_cache=False)
    dropping = LlamaConfig(**SIZES, attention_dropout=0.1)
    with pytest.raises(ValueError, match=r"attention_dropout must be 0 in the student's config.json, got 0\.1"):
        LlamaForCausalLM._from_config(dropping, attn_implementation=attention.NAME).train()(
            ids, segments=[[3]], use_cache=False
        )
