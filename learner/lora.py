"""Low-rank adapters (arXiv 2106.09685) by the library peft, and the merged weights that leave the learner.

The weight of an adapted layer is W + scale B A, with scale = alpha / rank; only A and B train. Everything here is
written against peft 0.21.2.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from learner.config import LoraSection

_ADAPTER = "default"


@dataclass(frozen=True, slots=True, kw_only=True)
class PublishedWeight:
    """A weight under the name that it has in the model's own folder."""

    name: str
    parameters: tuple[nn.Parameter, ...]
    """What it is made of: itself, or W, A and B. Under ZeRO-3 they must be gathered before `tensor` is called."""
    scale: float = 0.0

    def tensor(self) -> Tensor:
        """Return the weight, merged if it has an adapter, in its own precision."""
        base, *adapter = (parameter.detach() for parameter in self.parameters)
        if not adapter:
            return base
        down, up = (matrix.float() for matrix in adapter)
        return (base.float() + self.scale * up @ down).to(base.dtype)


def add_adapters(model: Any, section: LoraSection) -> None:
    """Put adapters into a causal language model, in place, and freeze everything else.

    The adapters begin as no change to the model (B = 0), and with the same random A on every rank.

    Raises:
        ImportError: if peft is not installed.
        ValueError: if a module named in the section is missing, is not a linear layer, or is the output head.
    """
    try:
        from peft import LoraConfig, inject_adapter_in_model
    except ImportError as error:
        raise ImportError(
            "learner.lora needs the library peft: install the extra `lora`, or remove the section"
        ) from error
    modules = "all-linear" if section.modules is None else list(section.modules)
    alpha: Any = section.alpha  # peft takes any number, and says int
    config = LoraConfig(r=section.rank, lora_alpha=alpha, lora_dropout=0.0, target_modules=modules)
    with torch.random.fork_rng():
        torch.manual_seed(0)
        inject_adapter_in_model(config, model, adapter_name=_ADAPTER)
    head = model.get_output_embeddings()
    for name, layer in model.named_modules():
        if not hasattr(layer, "lora_A"):
            continue
        if layer is head or not isinstance(layer.base_layer, nn.Linear):
            raise ValueError(f"learner.lora.modules must name linear layers other than the output head, got {name}")


@contextmanager
def adapters_off(model: nn.Module) -> Iterator[None]:
    """Make the model what it was without its adapters."""
    layers: list[Any] = [layer for layer in model.modules() if hasattr(layer, "lora_A")]
    scales = [layer.scaling[_ADAPTER] for layer in layers]
    # The adapters still run: ZeRO-3 gathers weights in the order of the modules, which had better stay the same.
    for layer in layers:
        layer.scaling[_ADAPTER] = 0.0
    try:
        yield
    finally:
        for layer, scale in zip(layers, scales, strict=True):
            layer.scaling[_ADAPTER] = scale


def published_weights(model: nn.Module) -> list[PublishedWeight]:
    """Return all weights of a model, with or without adapters, under their original names."""
    layers: list[Any] = [layer for layer in model.modules() if hasattr(layer, "lora_A")]
    adapted = {id(layer.base_layer.weight): layer for layer in layers}
    weights = []
    for name, parameter in model.named_parameters():
        layer = adapted.get(id(parameter))
        original = name.replace(".base_layer.", ".")
        if layer is not None:
            parts = (parameter, layer.lora_A[_ADAPTER].weight, layer.lora_B[_ADAPTER].weight)
            weights.append(PublishedWeight(name=original, parameters=parts, scale=layer.scaling[_ADAPTER]))
        elif ".lora_" not in name:
            weights.append(PublishedWeight(name=original, parameters=(parameter,)))
    return weights
