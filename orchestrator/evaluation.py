"""pass@k and the distance to the teacher on held-out prompts, with standard errors over prompts."""

import math
from collections import Counter, defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import pyarrow as pa

from orchestrator.rollout_metrics import kl_to_teacher
from rewards import pass_at_k
from rewards.grade import Status
from rewards.pass_at_k import mean_and_standard_error


@dataclass(frozen=True, slots=True, kw_only=True)
class Estimate:
    """A mean over prompts."""

    mean: float
    standard_error: float

    def __str__(self) -> str:
        return f"{self.mean:.3f} ± {self.standard_error:.3f}"


@dataclass(frozen=True, slots=True, kw_only=True)
class Evaluation:
    """What the student does on held-out prompts."""

    num_prompts: int
    num_samples: int
    """Of each prompt, where every grade is a verdict."""
    statuses: Mapping[str, int]
    """How many completions had each status."""
    estimates: Mapping[str, Estimate]
    """`pass@k` for each k, and `KL to teacher` (nats per token) where there is a teacher."""

    def metrics(self) -> dict[str, float]:
        """The evaluation as flat metrics."""
        flat: dict[str, float] = {}
        for name, estimate in self.estimates.items():
            key = _key(name)
            flat |= {key: estimate.mean, f"{key}_standard_error": estimate.standard_error}
        return flat | {f"evaluation/status/{status}": float(count) for status, count in self.statuses.items()}

    def earlier(self, metrics: Mapping[str, float | None]) -> dict[str, Estimate]:
        """Return the estimates of another evaluation of the same run from its metrics, as they were written."""
        keys = {name: _key(name) for name in self.estimates}
        return {
            name: Estimate(mean=mean, standard_error=math.nan if error is None else error)
            for name, key in keys.items()
            if (mean := metrics.get(key)) is not None
            for error in [metrics.get(f"{key}_standard_error")]
        }


def evaluate(
    summaries: Sequence[pa.RecordBatch], pass_at: Sequence[int], shards: Sequence[pa.RecordBatch] = ()
) -> Evaluation:
    """Return the evaluation of graded rollouts.

    A rollout without a verdict counts neither as right nor as wrong: its prompt has one sample less, and is left out of
    pass@k where fewer than k remain.

    Args:
        summaries: prompt_id, reward and status of each rollout.
        pass_at: the k.
        shards: the rollouts themselves with a teacher's scores; without them there is no KL.
    """
    samples: dict[str, list[bool]] = defaultdict(list)
    statuses: Counter[str] = Counter()
    for summary in summaries:
        rows = zip(summary["prompt_id"].to_pylist(), summary["status"].to_pylist(), strict=True)
        for prompt_id, status in rows:
            statuses[status] += 1
            if Status(status).is_verdict:
                samples[prompt_id].append(status == Status.CORRECT)
    estimates: dict[str, Estimate] = {}
    for k in pass_at:
        counted = [graded for graded in samples.values() if len(graded) >= k]
        if counted:
            estimates[f"pass@{k}"] = _estimate([pass_at_k(len(graded), sum(graded), k) for graded in counted])
    if shards:
        by_prompt: dict[str, list[float]] = defaultdict(list)
        for shard in shards:
            for prompt_id, value in zip(shard["prompt_id"].to_pylist(), kl_to_teacher(shard), strict=True):
                by_prompt[prompt_id].append(value)
        estimates["KL to teacher"] = _estimate([sum(values) / len(values) for values in by_prompt.values()])
    return Evaluation(
        num_prompts=len(samples),
        num_samples=max(map(len, samples.values()), default=0),
        statuses=dict(sorted(statuses.items())),
        estimates=estimates,
    )


def _key(name: str) -> str:
    return "evaluation/" + name.replace(" ", "_").lower()


def _estimate(values: Sequence[float]) -> Estimate:
    mean, standard_error = mean_and_standard_error(values)
    return Estimate(mean=mean, standard_error=standard_error)
