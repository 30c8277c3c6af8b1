"""The student as the learner sees it: hidden states at the positions that predict, and a loss of them in tiles.

No logits of a whole micro-batch exist at any time. N is the number of tokens of a micro-batch that train, H the width
of the model.
"""

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from safetensors import safe_open
from torch import Tensor, nn
from transformers import AutoConfig
from transformers.utils.hub import cached_file

from actors.head import Head
from learner.lora import adapters_off
from learner.losses import Loss, Tokens
from learner.micro_batches import MicroBatch
from learner.tiles import OutputHead, logprobs_in_tiles, loss_in_tiles

_RESCALINGS = ("final_logit_softcapping", "logit_scale", "logits_scaling", "lm_head_multiplier")
"""What configurations call the ways in which logits are more than the output head of the last hidden state."""

Outputs = tuple[Tensor, Tensor, dict[str, Tensor]]
"""The parts of a `TiledLoss`, in a tuple because DeepSpeed's hooks look for tensors in nothing else."""


class TokenLoss(nn.Module):
    """The output head and the loss behind it.

    It owns the head's parameters, too (they are the causal language model's own), because ZeRO-3 gathers the parameters
    of the module that is called.
    """

    def __init__(self, linear: nn.Linear, head: Head) -> None:
        super().__init__()
        self.weight = linear.weight
        self.bias = linear.bias
        self._head = head

    def forward(self, hidden: Tensor, *, tokens: Tokens, loss: Loss | None, tile_bytes: int) -> Outputs | Tensor:
        """Return the loss of hidden states [N, H], or without a loss the tokens' log-probs [N]."""
        output = OutputHead(weight=self.weight, bias=self.bias, head=self._head)
        if loss is None:
            return logprobs_in_tiles(hidden, output, tokens.token_ids, tile_bytes=tile_bytes)
        if loss.needs_sequence_ratios:
            logprobs = logprobs_in_tiles(hidden.detach(), output, tokens.token_ids, tile_bytes=tile_bytes)
            tokens = with_sequence_ratios(tokens, logprobs)
        tiled = loss_in_tiles(hidden, output, loss, tokens, tile_bytes=tile_bytes)
        return tiled.total, tiled.per_token, dict(tiled.metrics)


class PolicyModel(nn.Module):
    """A causal language model without its logits.

    Args:
        model: of Hugging Face transformers, with the attention of `learner.attention`.
        head: how the sampler read the logits, and so does the loss.

    Raises:
        ValueError: if the shared vocabulary is larger than the model's, or its logits are not its output head applied
            to its last hidden state.
    """

    def __init__(self, model: Any, head: Head) -> None:
        super().__init__()
        linear = model.get_output_embeddings()
        if head.vocab_size is not None and head.vocab_size > linear.weight.shape[0]:
            raise ValueError(
                f"the shared vocabulary has {head.vocab_size} ids, but the logits of {model.config.name_or_path} are "
                f"{linear.weight.shape[0]} wide"
            )
        _check_logits(model, linear)
        self.model = model
        self.token_loss = TokenLoss(linear, head)
        self._reference: Callable[[MicroBatch, int], Tensor] | None = None

    def refer_to(self, frozen: "PolicyModel | None") -> None:
        """Compute `reference_logprobs` from now on: by another model, or by this one without its adapters."""
        # A method is not a module, so the other's weights are not among this one's.
        self._reference = self._logprobs_without_adapters if frozen is None else frozen.logprobs

    def forward(self, micro_batch: MicroBatch, loss: Loss, tile_bytes: int) -> Outputs:
        """Return the loss of a micro-batch: its weighted total (scalar, with a gradient), per token [N], and metrics.

        Raises:
            ValueError: if the tokens lack what the loss is made of.
        """
        tokens = micro_batch.tokens
        if self._reference is not None:
            tokens = replace(tokens, reference_logprobs=self._reference(micro_batch, tile_bytes))
        outputs: Outputs = self.token_loss(self._hidden(micro_batch), tokens=tokens, loss=loss, tile_bytes=tile_bytes)
        return outputs

    @torch.no_grad()
    def logprobs(self, micro_batch: MicroBatch, tile_bytes: int) -> Tensor:
        """Return the log-probs [N] of the tokens, nats, without a gradient."""
        hidden = self._hidden(micro_batch)
        logprobs: Tensor = self.token_loss(hidden, tokens=micro_batch.tokens, loss=None, tile_bytes=tile_bytes)
        return logprobs

    def _logprobs_without_adapters(self, micro_batch: MicroBatch, tile_bytes: int) -> Tensor:
        with adapters_off(self.model):
            return self.logprobs(micro_batch, tile_bytes)

    def _hidden(self, micro_batch: MicroBatch) -> Tensor:
        """Return the last hidden states [N, H] at the positions that predict."""
        hidden = self.model.get_decoder()(
            input_ids=micro_batch.input_ids,
            position_ids=micro_batch.position_ids,
            segments=micro_batch.segments,
            use_cache=False,
        ).last_hidden_state
        predicting: Tensor = hidden.flatten(0, 1)[micro_batch.predictors]
        return predicting


def with_sequence_ratios(tokens: Tokens, logprobs: Tensor) -> Tokens:
    """Return the tokens with the sums over their rollouts of log policy - log behaviour.

    Args:
        tokens: n of them, of whole rollouts.
        logprobs: [n] nats, of the current policy.
    """
    gaps = logprobs - tokens.behaviour_logprobs.to(logprobs.dtype)
    log_ratios = torch.zeros_like(gaps).index_add(0, tokens.rollouts, gaps)
    lengths = torch.zeros_like(tokens.rollouts).index_add(0, tokens.rollouts, torch.ones_like(tokens.rollouts))
    return replace(tokens, sequence_log_ratios=log_ratios[tokens.rollouts], sequence_lengths=lengths[tokens.rollouts])


def load_output_head(model_folder: str, head: Head, *, device: torch.device, dtype: torch.dtype) -> OutputHead:
    """Return a model's output head, without reading the rest of its weights.

    Args:
        model_folder: with safetensors files, or the name of such a model on the Hub.
        head: how its logits are read.
        device: where the head is put.
        dtype: of its weights.

    Raises:
        ValueError: if there are no safetensors files, none holds the output head, it is narrower than the shared
            vocabulary, or the model's logits are more than the output head of its last hidden state.
    """
    config = AutoConfig.from_pretrained(model_folder)
    _refuse_rescaled_logits(config, model_folder)
    files = _weight_files(model_folder)
    name = _ending(files, "lm_head.weight") or _ending(files, "embed_tokens.weight")
    if name is None:
        raise ValueError(f"the teacher's folder must hold lm_head.weight or embed_tokens.weight, got {model_folder}")
    bias = _ending(files, "lm_head.bias")
    weight = _read(files[name], name).to(device, dtype)
    if head.vocab_size is not None and head.vocab_size > len(weight):
        raise ValueError(
            f"the shared vocabulary has {head.vocab_size} ids, but the logits of {model_folder} are {len(weight)} wide"
        )
    return OutputHead(
        weight=weight, bias=None if bias is None else _read(files[bias], bias).to(device, dtype), head=head
    )


def _weight_files(model_folder: str) -> dict[str, str]:
    """Return which file each tensor of a model is in."""

    def find(name: str) -> str | None:
        path: str | None = cached_file(model_folder, name, _raise_exceptions_for_missing_entries=False)
        return path

    index = find("model.safetensors.index.json")
    if index is not None:
        weight_map = json.loads(Path(index).read_text(encoding="utf-8"))["weight_map"]
        return {name: find(file) or file for name, file in weight_map.items()}
    path = find("model.safetensors")
    if path is None:
        raise ValueError(
            f"the teacher's weights must be in model.safetensors or its shards, got none in {model_folder}"
        )
    with safe_open(path, framework="pt") as tensors:
        return dict.fromkeys(tensors.keys(), path)


def _ending(names: dict[str, str], ending: str) -> str | None:
    return next((name for name in names if name == ending or name.endswith(f".{ending}")), None)


def _read(path: str, name: str) -> Tensor:
    with safe_open(path, framework="pt") as tensors:
        tensor: Tensor = tensors.get_tensor(name)
        return tensor


def _refuse_rescaled_logits(config: Any, folder: str) -> None:
    for name in _RESCALINGS:
        value = getattr(config, name, None)
        if value is not None and value != 1:
            raise ValueError(
                f"logits must be the output head of the last hidden state, but {folder} has {name} = {value} in its "
                "config.json; choose another model"
            )


@torch.no_grad()
def _check_logits(model: Any, linear: nn.Linear) -> None:
    """Compare the model's own logits of a few tokens with what its output head makes of the last hidden state."""
    _refuse_rescaled_logits(model.config, model.config.name_or_path)
    device, was_training = linear.weight.device, model.training
    ids = torch.arange(4, device=device)[None] % linear.weight.shape[0]
    inputs = {"input_ids": ids, "position_ids": torch.arange(4, device=device)[None], "segments": ((4,),)}
    model.eval()
    own = model(**inputs, use_cache=False).logits
    hidden = model.get_decoder()(**inputs, use_cache=False).last_hidden_state
    ours = F.linear(hidden, linear.weight, linear.bias)
    model.train(was_training)
    if not torch.allclose(own, ours, rtol=1e-5 if own.dtype == torch.float32 else 1e-2, atol=1e-6):
        raise ValueError(
            f"logits must be the output head of the last hidden state, but those of {type(model).__name__} differ by "
            f"up to {(own - ours).abs().max():.3g}; choose another model"
        )
