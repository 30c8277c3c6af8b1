"""The recipe's section on graders."""

from pydantic import Field

from rewards.section import Section


class GradersSection(Section):
    """The actors that judge completions."""

    num_actors: int = Field(default=1, ge=1)
    """How many."""
    num_cpus: float = Field(default=0.25, ge=0.001)
    """Ray CPUs that each actor reserves."""
    deadline_s: float = Field(default=5.0, gt=0)
    """Wall-clock seconds that one completion may take in a worker process; the worker is killed then."""
    num_workers: int = Field(default=1, ge=1)
    """Worker processes of each actor, started when a task first needs them; exact checkers need none."""
    memory_gib: float = Field(default=2.0, gt=0)
    """Address space that each worker process may use."""
