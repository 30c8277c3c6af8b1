"""What a step's rollouts say of themselves: lengths, budget, blend, distance to the teacher, what they took."""

from collections.abc import Sequence
from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.compute as pc

from actors.experience import rollouts_from_arrow
from actors.meter import meter_of

_QUANTILES = (0.1, 0.5, 0.9)


def rollout_metrics(shards: Sequence[pa.RecordBatch], step: int) -> dict[str, float]:
    """Return the metrics of the rollouts sampled for `step`; means are over tokens, divergences in nats.

    - `rollout/…`: tokens, completion length, share cut off at the longest length, staleness (steps behind, of the
      oldest token).
    - with a teacher, `blend/…`: `epsilon` (absent where the behaviour policy keeps no budget); `beta`, its quantiles
      `beta_p10`, `beta_p50`, `beta_p90`, `full_teacher` and `student_rows` (shares of positions with beta 1, and with
      beta 0 although epsilon is above 0); `divergence` = KL(mu || student), `budget_used` = divergence / epsilon;
      `teacher_divergence` = KL(mu || teacher), over positions where it is finite, and `teacher_forbids`, the share
      where it is not; `accepted`, the share of emitted tokens that are the student's drafts.
    - what they took, `speculation/…`: `draft_length` (mean), `passes_per_token` and `scored_per_token` (passes of the
      teacher over a sequence, and positions that it scored, per emitted token), `drafted_per_token`, `bytes_per_token`
      (between students, service and teachers), `reopened` (sequences that went on after an actor was lost).
    - `time/student_tokens_per_s`, `time/teacher_tokens_per_s`: tokens drafted, positions scored, per second at work.
    """
    table = pa.Table.from_batches(shards)
    tokens = pc.list_value_length(table["token_ids"]).to_numpy()
    versions = _flat(table, "policy_versions")
    metrics = {
        "rollout/num_tokens": float(tokens.sum()),
        "rollout/length": float(tokens.mean()),
        "rollout/truncated": float(np.mean([reason == "length" for reason in table["finish_reason"].to_pylist()])),
        "rollout/staleness": float(step - versions.min()),
    }
    return metrics | _blend_metrics(table) | _cost_metrics(shards)


def _blend_metrics(table: pa.Table) -> dict[str, float]:
    beta, epsilon = _flat(table, "beta"), _flat(table, "epsilon")
    if not len(beta):
        return {}
    divergence, to_teacher = _flat(table, "divergence"), _flat(table, "teacher_divergence")
    if np.isnan(divergence).any():  # drawn from a law made of the student alone, of which no divergence is known
        return {}
    metrics = {"blend/divergence": _mean(divergence), "blend/accepted": _mean(_flat(table, "accepted"))}
    known, finite = ~np.isnan(to_teacher), np.isfinite(to_teacher)
    if known.any():
        metrics["blend/teacher_forbids"] = 1 - _mean(finite[known])
    if finite.any():
        metrics["blend/teacher_divergence"] = _mean(to_teacher[finite])
    if not np.isnan(beta).any():
        metrics |= {"blend/beta": _mean(beta), "blend/full_teacher": _mean(beta == 1)}
        quantiles = np.quantile(beta, _QUANTILES)
        metrics |= {f"blend/beta_p{100 * q:.0f}": float(v) for q, v in zip(_QUANTILES, quantiles, strict=True)}
    if not np.isnan(epsilon).any():
        metrics["blend/epsilon"] = float(epsilon.max())
        if metrics["blend/epsilon"] > 0:
            metrics["blend/budget_used"] = metrics["blend/divergence"] / _mean(epsilon)
            metrics["blend/student_rows"] = _mean(beta == 0)
    return metrics


def _cost_metrics(shards: Sequence[pa.RecordBatch]) -> dict[str, float]:
    meter = meter_of(shards)
    if not meter.num_tokens:
        return {}
    metrics = {}
    if meter.num_drafted:
        metrics = {
            "speculation/draft_length": meter.num_drafted / meter.num_passes,
            "speculation/drafted_per_token": meter.num_drafted / meter.num_tokens,
            "speculation/reopened": float(meter.num_reopened),
        }
    if meter.num_scored:
        metrics |= {
            "speculation/passes_per_token": meter.num_passes / meter.num_tokens,
            "speculation/scored_per_token": meter.num_scored / meter.num_tokens,
            "speculation/bytes_per_token": meter.wire_bytes / meter.num_tokens,
        }
    if meter.student_s:
        metrics["time/student_tokens_per_s"] = (meter.num_drafted or meter.num_tokens) / meter.student_s
    if meter.teacher_s:
        metrics["time/teacher_tokens_per_s"] = meter.num_scored / meter.teacher_s
    return metrics


def kl_to_teacher(shard: pa.RecordBatch) -> list[float]:
    """Return, for each rollout, the mean over its tokens of KL(student || teacher) in nats, on its support and tail."""
    scores = [rollout.teacher for rollout in rollouts_from_arrow(shard)]
    return [float(each.kl_to_teacher().mean(dtype=np.float64)) for each in scores if each is not None]


def _mean(values: npt.NDArray[Any]) -> float:
    return float(values.mean(dtype=np.float64))


def _flat(table: pa.Table, column: str) -> npt.NDArray[Any]:
    return np.asarray(pc.list_flatten(table[column]).to_numpy())
