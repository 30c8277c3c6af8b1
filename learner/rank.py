"""One learner rank: the body of a Ray actor around `DeepSpeedEngine`."""

import os
import socket
from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import ray
import torch

from actors.experience import rollouts_from_arrow
from actors.head import Head
from actors.weights import PolicyWeights, pack_bucket
from learner.batcher import TrainBatch
from learner.config import LearnerSection
from learner.micro_batches import TrainRow, build_micro_batch, deal_rows

if TYPE_CHECKING:
    from learner.deepspeed_engine import DeepSpeedEngine
    from learner.objective import LossPlan

_BUCKET_BYTES = 256 * 2**20
"""Size of one object of published weights: large enough for few objects, small enough to hold two."""


@dataclass(frozen=True, slots=True, kw_only=True)
class StepReport:
    """What an optimizer step did; the same on all ranks."""

    policy_version: int
    """Optimizer steps applied so far, this one included."""
    loss: float
    """What the step makes smaller: the sum over its tokens of weight x loss."""
    grad_norm: float
    """Before clipping."""
    learning_rate: float
    """That the step was taken with."""
    metrics: Mapping[str, float]
    """The loss's own, each a mean per token (`learner.losses`)."""
    num_tokens: int
    """Completion tokens learned from."""


class LearnerRank:
    """Learns its share of every batch together with the other ranks.

    Args:
        name: for people: of the actor, and before each line that it logs.
        rank: from 0; rank 0 publishes.
        world_size: number of ranks.
        section: the recipe's.
        model_folder: of the student, on a disk that this rank's machine sees.
        rollouts_per_step: N of every batch.
        num_steps: of the whole run, for what changes over it.
        head: how the sampler read the logits, and so does the loss.
        signal: what the rollouts carry of the teacher: support, sampled, full or hidden.
        teacher_folder: of the teacher, on a disk that this rank's machine sees; for the signal `hidden` only.
        teacher_dtype: of the teacher's weights where it computes its hidden states, "float32" or "bfloat16".

    Raises:
        ValueError: if N rollouts do not fill whole micro-batches on all ranks.
    """

    def __init__(
        self,
        *,
        name: str,
        rank: int,
        world_size: int,
        section: LearnerSection,
        model_folder: str,
        rollouts_per_step: int,
        num_steps: int,
        head: Head,
        signal: str = "support",
        teacher_folder: str | None = None,
        teacher_dtype: str = "float32",
    ) -> None:
        torch.set_num_threads(section.threads)
        self._name = name
        self._rank = rank
        self._world_size = world_size
        self._section = section
        self._model_folder = model_folder
        self._num_micro_batches = rollouts_per_step // section.rollouts_per_round
        self._num_steps = num_steps
        self._head = head
        self._signal = signal
        self._teacher_folder, self._teacher_dtype = teacher_folder, teacher_dtype
        self._engine: DeepSpeedEngine | None = None
        self._plan: LossPlan | None = None

    def __repr__(self) -> str:
        return self._name

    def address(self) -> tuple[str, int]:
        """Return this machine's address and a port that is free on it now."""
        with socket.socket() as probe:
            probe.bind(("", 0))
            host: str = ray.util.get_node_ip_address()
            return host, int(probe.getsockname()[1])

    def connect(self, master_address: str, master_port: int, *, one_machine: bool) -> None:
        """Join the other ranks, who must do so at the same time, and load the model."""
        os.environ.update(
            RANK=str(self._rank),
            LOCAL_RANK="0",
            WORLD_SIZE=str(self._world_size),
            MASTER_ADDR=master_address,
            MASTER_PORT=str(master_port),
        )
        if one_machine:
            os.environ["GLOO_SOCKET_IFNAME"] = "lo"
        # Imported here: it takes seconds, and the process that only creates this actor has no need of it.
        from learner.deepspeed_engine import DeepSpeedEngine, join_process_group
        from learner.objective import LossPlan
        from learner.policy_model import load_output_head

        device = torch.device("cuda" if self._section.num_gpus else "cpu")
        join_process_group(device)
        self._engine = DeepSpeedEngine(
            self._model_folder,
            self._section,
            num_micro_batches=self._num_micro_batches,
            num_steps=self._num_steps,
            head=self._head,
            device=device,
        )
        teacher_head = None
        if self._signal == "hidden" and self._teacher_folder is not None:
            dtype = getattr(torch, self._teacher_dtype)
            teacher_head = load_output_head(self._teacher_folder, self._head, device=device, dtype=dtype)
        self._plan = LossPlan(
            self._section.objective,
            num_steps=self._num_steps,
            signal=self._signal,
            temperature=self._head.temperature,
            vocab_size=self._head.vocab_size or self._engine.logits_width,
            teacher_head=teacher_head,
        )

    def step(self, batch: TrainBatch) -> StepReport:
        """Learn from this rank's share of the batch.

        Raises:
            NonFiniteLossError: if the step could not be applied; the weights are as before.
            ValueError: if the batch does not fit the recipe.
        """
        rows = self._rows(batch)
        mine = deal_rows(
            [row.length for row in rows],
            world_size=self._world_size,
            micro_batch_size=self._section.micro_batch_size,
        )[self._rank]
        assert self._plan is not None, "connect() comes first"
        packing, support_size = self._section.packing, self._plan.support_size
        # One at a time: those of a whole step may hold the teacher's law of every token.
        micro_batches = (
            build_micro_batch([rows[i] for i in indices], packing=packing, support_size=support_size)
            for indices in mine
        )
        loss = self._plan.at(batch.step)
        outcome = self._connected.step(micro_batches, loss=loss, num_tokens=batch.num_tokens)
        return StepReport(
            policy_version=self._connected.policy_version,
            loss=outcome.loss,
            grad_norm=outcome.grad_norm,
            learning_rate=outcome.learning_rate,
            metrics=outcome.metrics,
            num_tokens=batch.num_tokens,
        )

    def publish(self) -> PolicyWeights | None:
        """Put the current weights into the object store; rank 0 returns where they are, the others None."""
        buckets = []
        for bucket in self._connected.gathered_weights(_BUCKET_BYTES):
            if self._rank == 0:
                buckets.append(ray.put(pack_bucket(bucket)))
        if self._rank != 0:
            return None
        return PolicyWeights(policy_version=self._connected.policy_version, buckets=tuple(buckets))

    def save(self, folder: str, client_state: Mapping[str, Any]) -> None:
        """Write what `load` needs into a folder that all ranks share."""
        self._connected.save(folder, client_state)

    def load(self, folder: str) -> dict[str, Any]:
        """Continue from a folder that `save` wrote; return its client state."""
        return self._connected.load(folder)

    def save_hf(self, folder: str) -> None:
        """Write the weights, with the student's tokenizer, as a Hugging Face folder."""
        self._connected.save_hf(folder, self._model_folder)

    @property
    def _connected(self) -> "DeepSpeedEngine":
        assert self._engine is not None, "connect() comes first"
        return self._engine

    @staticmethod
    def _rows(batch: TrainBatch) -> list[TrainRow]:
        """Read all shards, without copying their arrays, and join them with what the batcher decided."""
        rollouts = [rollout for shard in ray.get(list(batch.shards)) for rollout in rollouts_from_arrow(shard)]
        return [
            TrainRow(rollout=rollout, advantage=float(advantage), trains=bool(trains), token_weight=float(weight))
            for rollout, advantage, trains, weight in zip(
                rollouts, batch.advantages, batch.trains, batch.token_weights, strict=True
            )
        ]
