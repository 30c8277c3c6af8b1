"""What a step's rollouts say of themselves: lengths, budget, blend, distance to the teacher, staleness."""

from collections.abc import Sequence
from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.compute as pc

from actors.experience import rollouts_from_arrow


def rollout_metrics(shards: Sequence[pa.RecordBatch], step: int, epsilon: float) -> dict[str, float]:
    """Return the metrics of the rollouts learned from at `step`, sampled at that budget (nats).

    `rollout/…`: tokens, completion length, share cut off at the longest length, staleness (steps behind, of the oldest
    token). With a teacher also `blend/epsilon`, `blend/beta` and `blend/divergence` (means over tokens),
    `blend/budget_used` (mean divergence over epsilon; absent where epsilon is 0), `blend/accepted` (share of drafts
    kept), `blend/full_teacher` (share of positions with beta = 1), `blend/student_rows` (share with beta = 0 though
    epsilon is above 0).
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
    beta = _flat(table, "beta")
    if len(beta):
        divergence = _flat(table, "divergence")
        metrics |= {
            "blend/epsilon": epsilon,
            "blend/beta": float(beta.mean(dtype=np.float64)),
            "blend/divergence": float(divergence.mean(dtype=np.float64)),
            "blend/accepted": float(_flat(table, "accepted").mean()),
            "blend/full_teacher": float((beta == 1).mean()),
        }
        if epsilon > 0:
            metrics["blend/budget_used"] = metrics["blend/divergence"] / epsilon
            metrics["blend/student_rows"] = float((beta == 0).mean())
    return metrics


def kl_to_teacher(shard: pa.RecordBatch) -> list[float]:
    """Return, for each rollout, the mean over its tokens of KL(student || teacher) in nats.

    On a support smaller than the vocabulary, all that lies outside counts as one outcome, which can only lower the
    divergence; on the full support it is exact.
    """
    means = []
    for rollout in rollouts_from_arrow(shard):
        scores = rollout.teacher
        assert scores is not None
        assert scores.teacher_logprobs is not None
        assert scores.teacher_tail_logprobs is not None
        ours = np.concatenate([scores.student_logprobs, scores.student_tail_logprobs[:, None]], 1).astype(np.float64)
        theirs = np.concatenate([scores.teacher_logprobs, scores.teacher_tail_logprobs[:, None]], 1).astype(np.float64)
        present = np.isfinite(ours)
        gap = np.where(present, ours - np.where(present, theirs, 0.0), 0.0)
        means.append(float((np.exp(ours) * gap).sum(1).mean()))
    return means


def _flat(table: pa.Table, column: str) -> npt.NDArray[Any]:
    return np.asarray(pc.list_flatten(table[column]).to_numpy())
