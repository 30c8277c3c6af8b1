"""The learner as its user sees it: all ranks together."""

import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Self

import ray
from ray.exceptions import RayActorError, RayError, RayTaskError

from actors.head import Head
from actors.weights import PolicyWeights
from learner.batcher import TrainBatch
from learner.config import LearnerSection
from learner.errors import LearnerError, NonFiniteLossError
from learner.rank import LearnerRank, StepReport

_GRACE_S = 2.0
"""How long the other ranks may take to tell their side once one has failed."""


class LearnerGroup:
    """Learner ranks as Ray actors, named learner-0, learner-1, ...

    Ranks cannot go on without each other: when one fails, all are killed and the group is of no further use; start
    another and load a checkpoint. Only a step refused because its loss was not finite leaves all as it was.

    Args:
        section: the recipe's.
        model_folder: of the student, on a disk that all ranks see.
        rollouts_per_step: N of every batch.
        num_steps: of the whole run, for what changes over it.
        namespace: Ray namespace of the actors' names; one group of ranks to a namespace.
        head: how the sampler read the logits, and so does the loss.
        signal: what the rollouts carry of the teacher: support, sampled, full or hidden.
        teacher_folder: of the teacher, on a disk that all ranks see; for the signal `hidden` only.
        teacher_dtype: of the teacher's weights where it computes its hidden states, "float32" or "bfloat16".

    Raises:
        ValueError: if N is not a multiple of world_size times micro_batch_size.
        LearnerError: if the ranks do not start.
    """

    def __init__(
        self,
        section: LearnerSection,
        *,
        model_folder: str,
        rollouts_per_step: int,
        num_steps: int,
        namespace: str,
        head: Head,
        signal: str = "support",
        teacher_folder: str | None = None,
        teacher_dtype: str = "float32",
    ) -> None:
        if rollouts_per_step < 1 or rollouts_per_step % section.rollouts_per_round:
            raise ValueError(
                f"rollouts per step must be a multiple of learner.world_size {section.world_size} x "
                f"learner.micro_batch_size {section.micro_batch_size}, got {rollouts_per_step}; change "
                "learner.micro_batch_size, or prompts or group_size of the rollouts"
            )
        self._section = section
        self._published: list[PolicyWeights] = []
        environment = {"OMP_NUM_THREADS": str(section.threads)}
        if not section.num_gpus:
            environment["DS_ACCELERATOR"] = "cpu"
        actor_class = ray.remote(LearnerRank)
        self._ranks: list[Any] = [
            actor_class.options(
                name=f"learner-{rank}",
                namespace=namespace,
                num_cpus=section.num_cpus,
                num_gpus=section.num_gpus,
                runtime_env={"env_vars": environment},
            ).remote(
                name=f"learner-{rank}",
                rank=rank,
                world_size=section.world_size,
                section=section,
                model_folder=model_folder,
                rollouts_per_step=rollouts_per_step,
                num_steps=num_steps,
                head=head,
                signal=signal,
                teacher_folder=teacher_folder,
                teacher_dtype=teacher_dtype,
            )
            for rank in range(section.world_size)
        ]
        self._connect()

    def step(self, batch: TrainBatch) -> StepReport:
        """Learn from a batch.

        Raises:
            NonFiniteLossError: if the step was not applied because a loss or gradient was not finite.
            LearnerError: if a rank failed or the step took longer than step_timeout_s; all ranks are gone then.
        """
        report: StepReport = self._call("step", lambda rank: rank.step.remote(batch))[0]
        return report

    def publish(self) -> PolicyWeights:
        """Put the current weights into the object store; they stay there until two later versions are out.

        Raises:
            LearnerError: as for `step`.
        """
        weights: PolicyWeights = self._call("publish", lambda rank: rank.publish.remote())[0]
        self._published = [*self._published[-1:], weights]
        return weights

    def save(self, folder: str, client_state: Mapping[str, Any]) -> None:
        """Write a checkpoint of all ranks, and the caller's own state, into a folder that they share.

        Raises:
            LearnerError: as for `step`.
        """
        self._call("save", lambda rank: rank.save.remote(folder, client_state))

    def load(self, folder: str) -> dict[str, Any]:
        """Continue from a checkpoint and return the caller's state.

        Raises:
            LearnerError: as for `step`; also if the checkpoint is missing or of another number of ranks.
        """
        client_state: dict[str, Any] = self._call("load", lambda rank: rank.load.remote(folder))[0]
        return client_state

    def save_hf(self, folder: str) -> None:
        """Write the weights, with the student's tokenizer, as a Hugging Face folder.

        Raises:
            LearnerError: as for `step`.
        """
        self._call("save_hf", lambda rank: rank.save_hf.remote(folder))

    def close(self) -> None:
        """Kill all ranks; published weights can no longer be read. May be called again."""
        for rank in self._ranks:
            ray.kill(rank)
        self._ranks = []
        self._published = []

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *exception: object) -> None:
        self.close()

    def _connect(self) -> None:
        timeout_s = self._section.start_timeout_s
        addresses = self._call("start", lambda rank: rank.address.remote(), timeout_s=timeout_s)
        one_machine = len({host for host, _ in addresses}) == 1
        host, port = addresses[0]
        if one_machine:
            host = "127.0.0.1"
        self._call("start", lambda rank: rank.connect.remote(host, port, one_machine=one_machine), timeout_s=timeout_s)

    def _call(self, what: str, call: Callable[[Any], Any], *, timeout_s: float | None = None) -> list[Any]:
        """Make the same call on all ranks and return their answers in order."""
        if not self._ranks:
            raise LearnerError(f"the learner's ranks are gone; cannot {what}")
        limit_s = self._section.step_timeout_s if timeout_s is None else timeout_s
        deadline = time.monotonic() + limit_s
        futures = [call(rank) for rank in self._ranks]
        pending = list(futures)
        while pending:
            ready, pending = ray.wait(pending, timeout=max(0.0, deadline - time.monotonic()))
            if not ready:
                late = ", ".join(f"learner-{futures.index(future)}" for future in pending)
                self.close()
                raise LearnerError(f"{what} must end within {limit_s:g} s, but {late} had not; all ranks were stopped")
            if _failure(ready[0]) is not None:
                self._fail(what, futures)
        return list(ray.get(futures))

    def _fail(self, what: str, futures: Sequence[Any]) -> None:
        """Raise the root cause of a failed call; kill all ranks unless they are as before."""
        ready, _ = ray.wait(list(futures), num_returns=len(futures), timeout=_GRACE_S)
        failures = [(futures.index(future), failure) for future in ready if (failure := _failure(future)) is not None]
        rank, cause = min(failures, key=lambda failure: _remoteness(failure[1]))
        if len(failures) == len(futures) and isinstance(cause, NonFiniteLossError):
            raise cause
        self.close()
        first_line = str(cause).strip().splitlines()[0] if str(cause).strip() else ""
        raise LearnerError(f"learner-{rank} failed to {what}: {type(cause).__name__}: {first_line}") from cause


def _failure(future: Any) -> Exception | None:
    """Return what a finished call raised, if it did; of an error inside the rank, that error itself."""
    try:
        ray.get(future)
    except RayTaskError as error:
        cause = error.cause
        return cause if isinstance(cause, Exception) else error
    except RayError as error:
        return error
    return None


def _remoteness(cause: Exception) -> int:
    """Order errors by how likely they follow from another: a rank that loses its peer complains of the network."""
    if isinstance(cause, RayActorError):
        return 0
    is_network = any(word in str(cause).lower() for word in ("gloo", "nccl", "connection", "peer"))
    return 2 if is_network else 1
