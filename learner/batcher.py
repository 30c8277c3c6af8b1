"""Joins the graded rollouts of a step into what the ranks learn from."""

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TypeVar

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import ray
import torch

from learner.advantages import focal_weights, group_advantages
from learner.config import Objective, PolicyGradientObjective
from learner.errors import LearnerError
from rewards.grade import Status

_Scalar = TypeVar("_Scalar", bound=np.generic)


@dataclass(frozen=True, slots=True, kw_only=True)
class TrainBatch:
    """The rollouts of one optimizer step; N of them. Every rank gets the same and takes its own share."""

    step: int
    shards: tuple[ray.ObjectRef[pa.RecordBatch], ...]
    """Rollouts as Arrow, `LEARNED_COLUMNS` of `actors.experience`; N rows together, in this order."""
    advantages: npt.NDArray[np.float32]
    """[N]; 0 where the objective has no use for one."""
    trains: npt.NDArray[np.bool_]
    """[N]; False keeps the row's place but masks all its tokens."""
    num_tokens: int
    """Completion tokens of the rows that train: what the summed loss is divided by."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Batcher:
    """Turns grades into advantages, by the recipe's objective.

    - `policy_gradient`: a rollout without a verdict does not train and leaves its group, so that each group has its
      own n. A group is the rows of one prompt_id.
    - `reverse_kl`: every rollout trains, with or without a verdict, since the teacher judges each token and the grade
      is not used; all advantages are 0.
    """

    objective: Objective

    def pack(
        self, step: int, shards: Sequence[ray.ObjectRef[pa.RecordBatch]], summaries: Sequence[pa.RecordBatch]
    ) -> tuple[TrainBatch, dict[str, float]]:
        """Return the batch of a step and the metrics of its grades.

        Args:
            step: number of the optimizer step.
            shards: references to the rollouts; never fetched here.
            summaries: one per shard, row by row alike: prompt_id, sample_index, reward in [0, 1], status, num_tokens.

        Returns:
            The batch, and the metrics: `reward/status/<status>`, counts (`ungraded` where there is none);
            `reward/pass_rate`, mean grade of the rollouts with a verdict (absent without any). With a policy gradient
            also `reward/zero_variance_groups`, the share of groups that teach nothing because their members' rewards
            are equal or fewer than two; `reward/focal_weight`, mean over groups; `advantage/abs_mean`, mean over the
            rollouts that train.

        Raises:
            LearnerError: if no rollout could train.
            ValueError: for rewards that the objective cannot use (`group_advantages`).
        """
        assert len(shards) == len(summaries), f"{len(shards)} shards, {len(summaries)} summaries"
        rows = _Rows.read(summaries)
        metrics = {f"reward/status/{status}": float(count) for status, count in sorted(Counter(rows.statuses).items())}
        if rows.has_verdict.any():
            metrics["reward/pass_rate"] = float(rows.rewards[rows.has_verdict].mean())
        if isinstance(self.objective, PolicyGradientObjective):
            advantages, group_metrics = _group_advantages(self.objective, rows)
            metrics |= group_metrics
            trains = rows.has_verdict
        else:
            advantages, trains = np.zeros(len(rows.rewards), np.float32), np.ones(len(rows.rewards), np.bool_)
        num_tokens = int(rows.num_tokens[trains].sum())
        if num_tokens == 0:
            counts = ", ".join(f"{status} {count}" for status, count in sorted(Counter(rows.statuses).items()))
            raise LearnerError(f"step {step} needs a completion to learn from, got none of {len(trains)} ({counts})")
        batch = TrainBatch(step=step, shards=tuple(shards), advantages=advantages, trains=trains, num_tokens=num_tokens)
        return batch, metrics


def _group_advantages(
    objective: PolicyGradientObjective, rows: "_Rows"
) -> tuple[npt.NDArray[np.float32], Mapping[str, float]]:
    """Return advantages [N] and the metrics of the groups."""
    grades, valid = rows.by_group(rows.rewards), rows.by_group(rows.has_verdict)
    # Exact at grades 0 and 1, which the focal weight asks for.
    rewards = torch.from_numpy(objective.reward_wrong * (1 - grades) + objective.reward_correct * grades)
    mask = torch.from_numpy(valid)
    weights = focal_weights(
        rewards,
        focal_gamma=objective.focal_gamma,
        reward_wrong=objective.reward_wrong,
        reward_correct=objective.reward_correct,
        valid=mask,
    )
    grouped = group_advantages(
        rewards,
        method=objective.method,
        focal_gamma=objective.focal_gamma,
        reward_wrong=objective.reward_wrong,
        reward_correct=objective.reward_correct,
        valid=mask,
    )
    advantages = grouped.numpy()[rows.group, rows.member].astype(np.float32)
    highest = np.where(valid, grades, -np.inf).max(axis=1)
    lowest = np.where(valid, grades, np.inf).min(axis=1)
    metrics = {
        "reward/zero_variance_groups": float((highest <= lowest).mean()),
        "reward/focal_weight": float(weights.mean()),
    }
    if rows.has_verdict.any():
        metrics["advantage/abs_mean"] = float(np.abs(advantages[rows.has_verdict]).mean())
    return advantages, metrics


@dataclass(frozen=True, slots=True, kw_only=True)
class _Rows:
    """The summaries of all shards, one after another; N rows in P groups of at most G."""

    rewards: npt.NDArray[np.float64]
    """[N]; 0 where there is no verdict."""
    statuses: tuple[str, ...]
    """[N]."""
    has_verdict: npt.NDArray[np.bool_]
    """[N]."""
    num_tokens: npt.NDArray[np.int64]
    """[N]."""
    group: npt.NDArray[np.int64]
    """[N] which group, numbered by first appearance."""
    member: npt.NDArray[np.int64]
    """[N] which place in it, by order of appearance."""

    @classmethod
    def read(cls, summaries: Sequence[pa.RecordBatch]) -> "_Rows":
        """Join the summaries; a rollout that comes twice is refused, since it would be learned from twice."""
        columns = {
            name: [value for summary in summaries for value in summary.column(name).to_pylist()]
            for name in ("prompt_id", "sample_index", "reward", "status", "num_tokens")
        }
        keys = list(zip(columns["prompt_id"], columns["sample_index"], strict=True))
        twice = [key for key, count in Counter(keys).items() if count > 1]
        assert not twice, f"a rollout is learned from once, got prompt_id, sample_index {twice[0]} more often"
        numbers: dict[str, int] = {}
        sizes: Counter[str] = Counter()
        group, member = [], []
        for prompt_id in columns["prompt_id"]:
            group.append(numbers.setdefault(prompt_id, len(numbers)))
            member.append(sizes[prompt_id])
            sizes[prompt_id] += 1
        verdicts = [status is not None and Status(status).is_verdict for status in columns["status"]]
        rewards = [reward if verdict else 0.0 for reward, verdict in zip(columns["reward"], verdicts, strict=True)]
        return cls(
            rewards=np.array(rewards, np.float64),
            statuses=tuple(status or "ungraded" for status in columns["status"]),
            has_verdict=np.array(verdicts, np.bool_),
            num_tokens=np.array(columns["num_tokens"], np.int64),
            group=np.array(group, np.int64),
            member=np.array(member, np.int64),
        )

    def by_group(self, values: npt.NDArray[_Scalar]) -> npt.NDArray[_Scalar]:
        """[N] -> [P, G], with 0 (False) where a group is smaller than the largest."""
        grouped = np.zeros((int(self.group.max()) + 1, int(self.member.max()) + 1), dtype=values.dtype)
        grouped[self.group, self.member] = values
        return grouped
