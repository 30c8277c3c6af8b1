"""Pools of equal actors: started together, named, restarted by Ray when they die."""

from collections.abc import Callable, Mapping
from typing import Any

import ray


class Pool:
    """The actors of one kind. Their names are `KIND-0`, `KIND-1`, … within the run's namespace."""

    def __init__(
        self,
        kind: str,
        build: Callable[[str], tuple[type, tuple[Any, ...], Mapping[str, Any]]],
        *,
        num_actors: int,
        num_cpus: float,
        num_gpus: float = 0.0,
        environment: Mapping[str, str],
        max_concurrency: int = 1,
    ) -> None:
        """Start them; `build` gives the class and its arguments for a name. `wait` tells when they are ready."""
        self.kind = kind
        self.actors: list[Any] = []
        for index in range(num_actors):
            name = f"{kind}-{index}"
            cls, args, kwargs = build(name)
            self.actors.append(
                ray.remote(cls)
                .options(
                    name=name,
                    num_cpus=num_cpus,
                    num_gpus=num_gpus,
                    max_restarts=-1,
                    max_task_retries=0,
                    max_concurrency=max_concurrency,
                    runtime_env={"env_vars": dict(environment)},
                )
                .remote(*args, **kwargs)
            )

    def __len__(self) -> int:
        return len(self.actors)

    def __getitem__(self, index: int) -> Any:
        """The actor that serves shard `index`; shards go round."""
        return self.actors[index % len(self.actors)]

    def wait(self) -> None:
        """Return once every actor is ready; raises what an actor raised while starting."""
        ray.get([actor.ready.remote() for actor in self.actors])

    def close(self) -> None:
        """End the actors."""
        for actor in self.actors:
            ray.kill(actor)
        self.actors = []
