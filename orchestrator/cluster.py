"""The Ray cluster of a run: one that is there, or a local one that starts and stops with the command."""

import logging
import os
import socket
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import ray
from ray._private.worker import BaseContext

from actors.config import BlenderSection, PoolSection
from orchestrator.config import ClusterSection
from orchestrator.errors import UserError
from orchestrator.recipe import Recipe

_ANSWER_S = 5.0
"""How long the head of a cluster may take to answer."""
_ROUNDING = 1e-6
"""Shares of a CPU or GPU need not add up exactly."""


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
        UserError: if the address given leads to no cluster, or the machine has not the memory for a local one.
    """
    setting = "cluster.address" if section.address else "RAY_ADDRESS"
    address = section.address or os.environ.get("RAY_ADDRESS") or "local"
    options: dict[str, Any] = {
        "address": address,
        "namespace": namespace,
        "log_to_driver": log_to_driver,
        "logging_level": logging.WARNING,
    }
    try:
        # Said in so many words, since Ray without an address joins a cluster that `ray start` left on this machine.
        context = _start(section, options) if address == "local" else _join(setting, address, options)
        yield context.dashboard_url or None
    finally:
        ray.shutdown()


def _start(section: ClusterSection, options: Mapping[str, Any]) -> BaseContext:
    memory = int(section.object_store_gib * 2**30)
    try:
        return ray.init(
            num_cpus=section.num_cpus, object_store_memory=memory, include_dashboard=section.dashboard, **options
        )
    except ValueError as error:
        raise UserError(
            f"cluster.object_store_gib must leave memory for the actors, got {section.object_store_gib:g}: {error}"
        ) from None


def _join(setting: str, address: str, options: Mapping[str, Any]) -> BaseContext:
    if address != "auto":
        _check_reachable(setting, address)
    try:
        return ray.init(**options)
    except (ConnectionError, RuntimeError, ValueError) as error:
        raise UserError(
            f"{setting} must lead to a running Ray cluster, got {address!r}: {str(error).splitlines()[0]}"
        ) from None


def _check_reachable(setting: str, address: str) -> None:
    """Find out in seconds whether anything answers at an address; Ray itself keeps trying for many minutes."""
    host, colon, port = address.rpartition(":")
    if not (host and colon and port.isdecimal() and int(port) < 2**16) or "/" in host:
        raise UserError(f"{setting} must be auto, local, or HOST:PORT of the head of a Ray cluster, got {address!r}")
    try:
        socket.create_connection((host.strip("[]"), int(port)), timeout=_ANSWER_S).close()
    except OSError as error:
        raise UserError(
            f"{setting} must lead to a running Ray cluster, got {address!r}: nothing answers there "
            f"({error.strerror or error})"
        ) from None


def needs(recipe: Recipe) -> list[Need]:
    """Return what the recipe's actors reserve together, the queue aside, which reserves nothing."""
    # Where both models share an engine, the blending happens there.
    section = recipe.blending
    blending = section if isinstance(section, BlenderSection) and section.layout == "actors" else None
    pools: list[tuple[str, PoolSection | None]]
    pools = [("students", recipe.students), ("teachers", recipe.teachers), ("blending", blending)]
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
    fit(needs(recipe), [node["Resources"] for node in ray.nodes() if node["Alive"]])


def fit(needs: Sequence[Need], nodes: Sequence[Mapping[str, float]]) -> None:
    """Place actors on nodes, the largest first; `nodes` has the resources of each, as Ray names them.

    Raises:
        UserError: if one finds no room.
    """
    for kind, name in (("num_cpus", "CPU"), ("num_gpus", "GPU")):
        asked = {need.setting: need.num_actors * float(getattr(need, kind)) for need in needs}
        total = sum(float(node.get(name, 0.0)) for node in nodes)
        if sum(asked.values()) > total + _ROUNDING:
            parts = " + ".join(f"{setting} {amount:g}" for setting, amount in asked.items() if amount)
            raise UserError(
                f"the recipe's actors must fit the cluster: they reserve {sum(asked.values()):g} {name}s ({parts}), "
                f"the cluster has {total:g}; lower num_actors or {kind} in those sections"
            )
    free = [[float(node.get("CPU", 0.0)), float(node.get("GPU", 0.0))] for node in nodes]
    for need in sorted(needs, key=lambda need: (need.num_gpus, need.num_cpus), reverse=True):
        for index in range(need.num_actors):
            _place(need, index, free)


def _place(need: Need, index: int, free: list[list[float]]) -> None:
    """Take an actor's share of the first node that has room for it; actors do not stretch over nodes."""
    for node in free:
        if need.num_cpus <= node[0] + _ROUNDING and need.num_gpus <= node[1] + _ROUNDING:
            node[0] -= need.num_cpus
            node[1] -= need.num_gpus
            return
    raise UserError(
        f"each of the recipe's actors must fit one node of the cluster: for {need.setting}, number {index + 1} of "
        f"{need.num_actors}, none is left with {need.num_cpus:g} CPUs and {need.num_gpus:g} GPUs; lower "
        f"{need.setting}.num_cpus or num_gpus, or those of the actors placed before"
    )
