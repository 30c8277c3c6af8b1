"""Where a run's metrics go: a JSON lines file, TensorBoard events, and Ray's metrics, which its dashboard shows."""

import json
import math
import re
from collections.abc import Mapping

from ray.util.metrics import Gauge
from torch.utils.tensorboard import SummaryWriter

from orchestrator.run_folder import RunFolder


class Sinks:
    """Writes the metrics of each step everywhere at once. Names under `time/` hold all that depends on a clock."""

    def __init__(self, folder: RunFolder, run_name: str, first_step: int) -> None:
        """Write from `first_step` on; events of later steps, from before a resume, are purged."""
        self._folder, self._run_name = folder, run_name
        self._events = SummaryWriter(str(folder.path / "tensorboard"), purge_step=first_step or None)
        self._gauges: dict[str, Gauge] = {}

    def write_step(self, step: int, metrics: Mapping[str, float]) -> None:
        """Write the metrics of a step, counted from 0."""
        self._folder.append_json(self._folder.metrics, {"step": step, **_finite(metrics)})
        self._publish(step, metrics)

    def write_evaluation(self, num_steps: int, metrics: Mapping[str, float]) -> None:
        """Write an evaluation made after that many optimizer steps."""
        self._folder.append_json(self._folder.evaluations, {"step": num_steps, **_finite(metrics)})
        self._publish(num_steps, metrics)

    def first_evaluation(self) -> dict[str, float | None]:
        """Return the metrics of the run's first evaluation."""
        with self._folder.evaluations.open(encoding="utf-8") as lines:
            first: dict[str, float | None] = json.loads(lines.readline())
        return first

    def close(self) -> None:
        """Write out what is buffered."""
        self._events.close()

    def _publish(self, step: int, metrics: Mapping[str, float]) -> None:
        for name, value in metrics.items():
            self._events.add_scalar(name, value, step)
            if name not in self._gauges:
                self._gauges[name] = Gauge(gauge_name(name), description=name, tag_keys=("run",))
            self._gauges[name].set(value, tags={"run": self._run_name})
        self._events.flush()


def gauge_name(name: str) -> str:
    """Return the name under which Ray's metrics port shows a metric, less Ray's own `ray_` before it.

    Example:
        >>> gauge_name("reward/pass_rate")
        'tutelage_reward_pass_rate'
    """
    return "tutelage_" + re.sub(r"[^A-Za-z0-9_]", "_", name)


def _finite(metrics: Mapping[str, float]) -> dict[str, float | None]:
    """JSON has no NaN; it becomes null."""
    return {name: value if math.isfinite(value) else None for name, value in metrics.items()}
