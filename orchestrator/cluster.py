"""The Ray cluster of a run: one that is there, or a local one that starts and stops with the command."""

import logging
import os
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import ray

from orchestrator.config import ClusterSection
from orchestrator.errors import UserError
from orchestrator.recipe import Recipe


@dataclass(frozen=True, slots=True, kw_only=True)
class Need:
    """Actors of one kind and what each reserves."""

    setting: str
    num_actors: int
    num_cpus: float
    num_gpus: float


@contextmanager
def connected(section: ClusterSection, namespace: str, *, log_to_driver: bool) -> Iterator[str | None]:
    """Join the cluster of the recipe or of RAY_ADDRESS, or start a local one; yield the dashboard's address, if any.

    Raises:
        UserError: if the address given leads to no cluster.
    """
    address = section.address or os.environ.get("RAY_ADDRESS")
    try:
        if address:
            context = ray.init(address=address, namespace=namespace, log_to_driver=log_to_driver,
                               logging_level=logging.WARNING)  # fmt: skip
        else:
            context = ray.init(
                namespace=namespace,
                num_cpus=section.num_cpus,
                object_store_memory=int(section.object_store_gib * 2**30),
                include_dashboard=section.dashboard,
                log_to_driver=log_to_driver,
                logging_level=logging.WARNING,
            )
    except (ConnectionError, RuntimeError, ValueError) as error:
        where = "cluster.address" if section.address else "RAY_ADDRESS"
        if not address:
            raise
        raise UserError(
            f"{where} must lead to a running Ray cluster, got {address!r}: {str(error).splitlines()[0]}"
        ) from None
    try:
        yield context.dashboard_url or None
    finally:
        ray.shutdown()


def needs(recipe: Recipe) -> list[Need]:
    """Return what the recipe's actors reserve together, the queue aside, which reserves nothing."""
    pools = [("students", recipe.students), ("teachers", recipe.teachers), ("blending", recipe.blending)]
    found = [
        Need(setting=name, num_actors=pool.num_actors, num_cpus=pool.num_cpus, num_gpus=pool.num_gpus)
        for name, pool in pools
        if pool is not None
    ]
    graders, learner = recipe.graders, recipe.learner
    found.append(Need(setting="graders", num_actors=graders.num_actors, num_cpus=graders.num_cpus, num_gpus=0.0))
    found.append(
        Need(setting="learner", num_actors=learner.world_size, num_cpus=learner.num_cpus, num_gpus=learner.num_gpus)
    )
    return found


def check_room(recipe: Recipe) -> None:
    """Refuse a recipe whose actors the connected cluster cannot hold, instead of waiting for ever.

    Raises:
        UserError: with what is needed, what the cluster has, and which numbers to lower.
    """
    nodes = [node["Resources"] for node in ray.nodes() if node["Alive"]]  # type: ignore[no-untyped-call]
    for kind, name in (("num_cpus", "CPU"), ("num_gpus", "GPU")):
        asked = {need.setting: need.num_actors * float(getattr(need, kind)) for need in needs(recipe)}
        free = [float(node.get(name, 0.0)) for node in nodes]
        if sum(asked.values()) > sum(free) + 1e-9:
            parts = " + ".join(f"{setting} {amount:g}" for setting, amount in asked.items() if amount)
            raise UserError(
                f"the recipe's actors must fit the cluster: they reserve {sum(asked.values()):g} {name}s ({parts}), "
                f"the cluster has {sum(free):g}; lower num_actors or {kind} in those sections"
            )
        for need in needs(recipe):
            amount = float(getattr(need, kind))
            if amount > max(free, default=0.0) + 1e-9:
                raise UserError(
                    f"{need.setting}.{kind} must fit one node of the cluster: it is {amount:g}, and the largest node "
                    f"has {max(free, default=0.0):g} {name}s"
                )
