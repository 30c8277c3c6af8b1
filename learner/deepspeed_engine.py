"""The DeepSpeed side of one learner rank; the only module that imports deepspeed.

Everything here is collective: all ranks construct, step, publish, save and load together and in the same order.
Written against DeepSpeed 0.19.8.
"""

import json
import shutil
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import deepspeed
import torch
import torch.distributed
from deepspeed import ops
from torch import Tensor
from transformers import AutoModelForCausalLM
from transformers.utils import logging as transformers_logging

from actors.head import Head
from actors.tokenizer import load_tokenizer
from learner import attention
from learner.config import LearnerSection, PolicyGradientObjective
from learner.errors import NonFiniteLossError
from learner.learning_rate import learning_rate_factor
from learner.lora import PublishedWeight, add_adapters, published_weights
from learner.losses import Loss
from learner.micro_batches import MicroBatch
from learner.policy_model import PolicyModel

_TAG = "deepspeed"
_FACTS = "learner.json"
_TOKENIZER_FILES = (
    "tokenizer*",
    "vocab*",
    "merges.txt",
    "special_tokens_map.json",
    "added_tokens.json",
    "chat_template*",
)


@dataclass(frozen=True, slots=True, kw_only=True)
class StepOutcome:
    """What an applied step was; the same on all ranks."""

    loss: float
    """Sum over the tokens of all ranks of weight x loss, which is what the step makes smaller."""
    metrics: Mapping[str, float]
    """Means over the training tokens of all ranks."""
    grad_norm: float
    """Before clipping."""
    learning_rate: float
    """That the step was taken with."""


@dataclass(frozen=True, slots=True, kw_only=True)
class _Learned:
    """What is kept of a micro-batch of N tokens, to name the rollouts of a loss that is not finite."""

    names: tuple[tuple[str, int], ...]
    rollouts: Tensor
    """[N], which of the names each token is of."""
    per_token: Tensor
    """[N] losses."""


def join_process_group(device: torch.device) -> None:
    """Join the ranks named by RANK, WORLD_SIZE, MASTER_ADDR and MASTER_PORT: gloo on CPU, NCCL on GPU."""
    # DeepSpeed would compile a C++ operator for collectives in shared memory, which only its inference uses, and fail
    # without a compiler. It looks the operator up in this table, which an empty one keeps it from filling by probing.
    ops.__compatible_ops__ = {}
    backend = "nccl" if device.type == "cuda" else "gloo"
    deepspeed.init_distributed(dist_backend=backend, auto_mpi_discovery=False, verbose=False)


class DeepSpeedEngine:
    """A Hugging Face causal language model under ZeRO 1-3 with torch's AdamW.

    torch's own optimizer needs no compiler at run time, where DeepSpeed's are compiled on first use. Every rank reads
    the whole model from the folder before ZeRO spreads it.

    Args:
        model_folder: of the student; parameters are held in the section's dtype.
        section: the recipe's.
        num_micro_batches: of each rank at each step.
        num_steps: of the whole run, for the learning rate's schedule.
        head: how the sampler read the logits, and so does the loss.
        device: where this rank computes.

    Raises:
        ValueError: if the shared vocabulary is larger than the model's, or the model cannot be computed in tiles
            (`PolicyModel`) or adapted as the section says (`add_adapters`).
        ImportError: if adapters are asked for without their library.
    """

    def __init__(
        self,
        model_folder: str,
        section: LearnerSection,
        *,
        num_micro_batches: int,
        num_steps: int,
        head: Head,
        device: torch.device,
    ) -> None:
        self._model, policy = _load_policy(model_folder, section, head, device)
        trained = [parameter for parameter in self._model.parameters() if parameter.requires_grad]
        optimizer = torch.optim.AdamW(
            trained, lr=section.learning_rate, betas=section.adam_betas, weight_decay=section.weight_decay
        )
        factor = partial(
            learning_rate_factor,
            schedule=section.lr_schedule,
            warmup_steps=section.warmup_steps,
            num_steps=num_steps,
        )
        # ZeRO-3 takes the weights apart, and their shapes with them.
        num_parameters = sum(p.numel() for p in self._model.parameters())
        logits_width = len(policy.token_loss.weight)
        self._engine, *_ = deepspeed.initialize(
            model=policy,
            optimizer=optimizer,
            lr_scheduler=torch.optim.lr_scheduler.LambdaLR(optimizer, factor),
            config=_deepspeed_config(section, num_micro_batches, num_parameters, self._model.config.hidden_size),
            dist_init_required=False,
        )
        self._logits_width = logits_width
        self._section = section
        self._head = head
        self._num_micro_batches = num_micro_batches
        self._device = device
        self._rank = torch.distributed.get_rank()
        self._policy_version = 0

    @property
    def logits_width(self) -> int:
        """How many ids the model's logits are over."""
        return self._logits_width

    @property
    def policy_version(self) -> int:
        """Optimizer steps applied, over all runs that the checkpoints came from."""
        return self._policy_version

    def step(self, micro_batches: Iterable[MicroBatch], *, loss: Loss, num_tokens: int) -> StepOutcome:
        """Take one optimizer step on this rank's micro-batches.

        The gradient applied, before clipping, is that of the sum over all ranks' tokens of weight x loss; without any
        token it is 0, as are the metrics.

        Args:
            micro_batches: of this rank; each is let go before the next is asked for.
            loss: of this step.
            num_tokens: that train, of all ranks; metrics are divided by it.

        Raises:
            NonFiniteLossError: on all ranks, naming the rollouts of any rank whose loss was not finite. Neither weights
                nor optimizer nor learning rate have changed, and the next step may be taken.
        """
        totals: dict[str, Tensor] = {}
        learning_rate = float(self._engine.get_lr()[0])
        # A loop's variable would keep one micro-batch while the next is made.
        learned = list(map(partial(self._learn, loss=loss, totals=totals), micro_batches))
        assert len(learned) == self._num_micro_batches, f"{len(learned)} micro-batches"
        if not self._engine.was_step_applied():
            raise self._failure(learned)
        self._policy_version += 1
        sums = torch.stack(list(totals.values()))
        torch.distributed.all_reduce(sums)
        summed = dict(zip(totals, sums.tolist(), strict=True))
        return StepOutcome(
            loss=summed.pop("loss"),
            metrics={name: value / max(1, num_tokens) for name, value in summed.items()},
            grad_norm=float(self._engine.get_global_grad_norm()),
            learning_rate=learning_rate,
        )

    def _learn(self, micro_batch: MicroBatch, *, loss: Loss, totals: dict[str, Tensor]) -> _Learned:
        """Add a micro-batch's gradient to the step's, and its loss and metrics to the totals."""
        # By keyword: DeepSpeed warns of positional arguments that it finds no tensors in.
        total, per_token, metrics = self._engine(
            micro_batch=micro_batch.to(self._device), loss=loss, tile_bytes=self._section.tile_mib * 2**20
        )
        # A rank cannot leave the collectives of a step by itself. An infinite loss may have a finite gradient, so it is
        # made to spoil it: DeepSpeed then skips the step on all ranks and clears what was accumulated.
        spoiler = torch.where(per_token.isfinite().all(), 1.0, torch.nan)
        # DeepSpeed averages gradients over ranks.
        self._engine.backward(total * self._engine.world_size * spoiler, scale_wrt_gas=False)
        self._engine.step()
        for name, value in {"loss": total.detach(), **metrics}.items():
            totals[name] = totals.get(name, torch.zeros((), device=self._device, dtype=torch.float64)) + value
        return _Learned(names=micro_batch.rollouts, rollouts=micro_batch.tokens.rollouts, per_token=per_token)

    def gathered_weights(self, bucket_bytes: int) -> Iterator[list[tuple[str, Tensor]]]:
        """Yield all weights, with adapters merged in, in buckets of about that size, on rank 0; empty lists on others.

        All ranks must run through it. A bucket's tensors are only valid until the next one is asked for.
        """
        for bucket in self._buckets(bucket_bytes):
            with self._gathered([parameter for weight in bucket for parameter in weight.parameters]):
                yield [(weight.name, weight.tensor()) for weight in bucket] if self._rank == 0 else []

    def save(self, folder: str, client_state: Mapping[str, Any]) -> None:
        """Write weights, optimizer and schedule of all ranks, and the caller's own state, into a folder all share."""
        if self._rank == 0:
            Path(folder).mkdir(parents=True, exist_ok=True)
            facts = {**self._shape(), "policy_version": self._policy_version}
            (Path(folder) / _FACTS).write_text(json.dumps(facts), encoding="utf-8")
        self._engine.save_checkpoint(
            folder,
            tag=_TAG,
            client_state={"client_state": dict(client_state)},
            # With adapters all else is as in the student's folder.
            exclude_frozen_parameters=self._section.lora is not None,
        )

    def load(self, folder: str) -> dict[str, Any]:
        """Continue from a folder that `save` wrote, and return the caller's state.

        Raises:
            ValueError: if it was written by another number of ranks, or with another ZeRO stage, dtype or adapters.
            FileNotFoundError: if no checkpoint is there.
        """
        path = Path(folder) / _FACTS
        if not path.is_file():
            raise FileNotFoundError(f"a checkpoint of the learner must hold {_FACTS}, got none in {folder}")
        facts = json.loads(path.read_text(encoding="utf-8"))
        for name, value in self._shape().items():
            if facts.get(name) != value:
                raise ValueError(
                    f"learner.{name} must be as it was when the checkpoint was written, {facts.get(name)!r}, got "
                    f"{value!r} ({folder})"
                )
        found, state = self._engine.load_checkpoint(folder, tag=_TAG, load_module_strict=self._section.lora is None)
        if found is None:
            raise FileNotFoundError(f"a checkpoint of the learner must hold {_TAG}/, got none in {folder}")
        self._policy_version = int(facts["policy_version"])
        client_state: dict[str, Any] = state["client_state"]
        return client_state

    def save_hf(self, folder: str, tokenizer_source: str) -> None:
        """Write the weights as a Hugging Face folder, with the tokenizer of another folder or of a model on the Hub."""
        weights: dict[str, Tensor] = {}
        for bucket in self.gathered_weights(bucket_bytes=2**30):
            weights |= {name: tensor.cpu().clone() for name, tensor in bucket}
        if self._rank == 0:
            # The loss cannot tell the stop tokens apart, so whoever samples from the checkpoint must know them all.
            self._model.generation_config.eos_token_id = list(self._head.stop_token_ids)
            self._model.save_pretrained(folder, state_dict=weights)
            if Path(tokenizer_source).is_dir():
                for pattern in _TOKENIZER_FILES:
                    for file in Path(tokenizer_source).glob(pattern):
                        shutil.copy(file, folder)
            else:
                load_tokenizer(tokenizer_source).save_pretrained(folder)
        torch.distributed.barrier()

    def _shape(self) -> dict[str, Any]:
        """What a checkpoint cannot be read across."""
        return {
            "world_size": self._engine.world_size,
            "zero_stage": self._section.zero_stage,
            "dtype": self._section.dtype,
            "lora": None if self._section.lora is None else self._section.lora.model_dump(mode="json"),
        }

    def _failure(self, learned: Sequence[_Learned]) -> NonFiniteLossError:
        """Return the error, the same on all ranks, with the rollouts of all whose loss is not finite."""
        refused = [
            each.names[place]
            for each in learned
            for place in each.rollouts[~each.per_token.isfinite().cpu()].unique().tolist()
        ]
        everyones: list[list[tuple[str, int]]] = [[] for _ in range(self._engine.world_size)]
        torch.distributed.all_gather_object(everyones, refused)
        rollouts = tuple(rollout for rank in everyones for rollout in rank)
        names = [f"{prompt_id}/{sample_index}" for prompt_id, sample_index in rollouts]
        what = (
            f"the loss of prompt_id/sample_index {', '.join(names[:16])}"
            if names
            else "the gradient, of finite losses,"
        )
        return NonFiniteLossError(
            f"loss and gradient must be finite, but {what} was not; the step after version {self._policy_version} "
            "was not applied",
            rollouts,
        )

    def _buckets(self, bucket_bytes: int) -> Iterator[list[PublishedWeight]]:
        """Yield all weights in buckets; a weight larger than the limit is a bucket of its own."""
        bucket: list[PublishedWeight] = []
        filled = 0
        for weight in published_weights(self._model):
            parameter: Any = weight.parameters[0]
            # Under stage 3 a parameter that is not gathered has no elements of its own.
            num_elements = parameter.ds_numel if self._section.zero_stage == 3 else parameter.numel()
            num_bytes = num_elements * parameter.element_size()
            if bucket and filled + num_bytes > bucket_bytes:
                yield bucket
                bucket, filled = [], 0
            bucket.append(weight)
            filled += num_bytes
        if bucket:
            yield bucket

    def _gathered(self, parameters: list[torch.nn.Parameter]) -> Any:
        if self._section.zero_stage < 3:
            return nullcontext()
        return deepspeed.zero.GatheredParameters(parameters, modifier_rank=None)


def _load_policy(
    model_folder: str, section: LearnerSection, head: Head, device: torch.device
) -> tuple[Any, PolicyModel]:
    """Return the causal language model and what wraps it, with adapters and reference as the section has it."""
    transformers_logging.disable_progress_bar()
    attention.register()

    def load() -> Any:
        model: Any = AutoModelForCausalLM.from_pretrained(
            model_folder, dtype=getattr(torch, section.dtype), attn_implementation=attention.NAME
        )
        return model.to(device)

    model = load()
    if section.lora is not None:
        add_adapters(model, section.lora)
    policy = PolicyModel(model, head)
    if isinstance(section.objective, PolicyGradientObjective) and section.objective.kl_coef > 0:
        frozen = None
        if section.lora is None:
            frozen = PolicyModel(load().eval().requires_grad_(False), head)
        policy.refer_to(frozen)
    model.train()
    if section.activation_checkpointing:
        model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    return model, policy


def _deepspeed_config(
    section: LearnerSection, num_micro_batches: int, num_parameters: int, hidden_size: int
) -> dict[str, Any]:
    """Return DeepSpeed's own configuration."""
    # Buffers of the default size, 5e8 elements, are allocated however small the model is.
    bucket_size = min(num_parameters, 500_000_000)
    return {
        "train_micro_batch_size_per_gpu": section.micro_batch_size,
        "gradient_accumulation_steps": num_micro_batches,
        "gradient_clipping": section.grad_clip,
        "bf16": {"enabled": section.dtype == "bfloat16"},
        "steps_per_print": 2**31,
        "zero_allow_untested_optimizer": True,
        # Else an offloaded optimizer would have to be DeepSpeed's own, which needs a compiler at run time.
        "zero_force_ds_cpu_optimizer": False,
        "zero_optimization": {
            "stage": section.zero_stage,
            "offload_optimizer": {"device": section.offload_optimizer},
            "reduce_bucket_size": bucket_size,
            "allgather_bucket_size": bucket_size,
            # Matrices are spread over the ranks, vectors (norms, biases) are not worth it.
            "stage3_param_persistence_threshold": 10 * hidden_size,
        },
    }
