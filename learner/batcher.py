"""Joins the graded rollouts of a step into what the ranks learn from."""

from collections import Counter
from collections.abc import Collection, Sequence
from dataclasses import dataclass
from typing import TypeVar

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import ray
import torch

from learner.advantages import focal_weights, group_advantages, overlong_penalty
from learner.aggregation import token_weights
from learner.config import DistillationObjective, Objective, PolicyGradientObjective
from learner.errors import LearnerError
from learner.methods import resolved
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
    """[N]; False keeps the row's place but leaves out all its tokens."""
    token_weights: npt.NDArray[np.float32]
    """[N] what the loss of each token of the row is multiplied by in the loss of the step (`learner.aggregation`)."""
    num_tokens: int
    """Completion tokens of the rows that train, 0 where all are masked: what summed metrics are divided by."""


def groups_that_teach(summaries: Sequence[pa.RecordBatch]) -> dict[str, bool]:
    """Return prompt_id -> whether the grades of its rollouts differ, in order of appearance.

    What differs has two verdicts or more, and not all of them equal. Groups of which this is False teach nothing by
    comparison (dynamic sampling, arXiv 2503.14476).

    Args:
        summaries: `rewards.grader_actor.summary` of the rollouts.
    """
    rows = _Rows.read(summaries)
    grades, valid = rows.by_group(rows.grades), rows.by_group(rows.has_verdict)
    return dict(zip(rows.prompt_ids, _varied(grades, valid).tolist(), strict=True))


def verdict_metrics(summaries: Sequence[pa.RecordBatch]) -> dict[str, float]:
    """Return `reward/status/<status>`, counts, and `reward/pass_rate`, the mean grade of those with a verdict."""
    return _Rows.read(summaries).verdict_metrics()


@dataclass(frozen=True, slots=True, kw_only=True)
class Batcher:
    """Turns grades into advantages and weights, by the recipe's objective.

    - `policy_gradient`: a rollout without a verdict does not train and leaves its group, so that each group has its
      own n. A group is the rows of one prompt_id. So it is with a distillation section, too: both parts of the loss
      have the same tokens.
    - `distillation`: every rollout trains, with or without a verdict, since the teacher judges each token and the grade
      is not used; all advantages are 0, and all tokens weigh the same.
    """

    objective: Objective
    max_new_tokens: int
    """Longest completion, `rollouts.max_new_tokens` of the recipe."""

    def pack(
        self,
        step: int,
        shards: Sequence[ray.ObjectRef[pa.RecordBatch]],
        summaries: Sequence[pa.RecordBatch],
        *,
        blended: bool = False,
        padding: Collection[str] = frozenset(),
    ) -> tuple[TrainBatch, dict[str, float]]:
        """Return the batch of a step and the metrics of its grades.

        Args:
            step: number of the optimizer step.
            shards: references to the rollouts; never fetched here.
            summaries: one per shard, row by row alike, `rewards.grader_actor.summary`; rewards in [0, 1].
            blended: whether the rollouts were drawn from a blend with the teacher, whose pass rate is not the
                student's.
            padding: prompt_ids whose groups only fill the batch: they do not train.

        Returns:
            The batch, and the metrics. With every objective:

            - `reward/status/<status>`: counts of rollouts (`ungraded` where there is no grade)
            - `reward/pass_rate`: mean grade of the rollouts with a verdict; absent without any

            With a policy gradient also, over the groups that are not padding:

            - `reward/zero_variance_groups`: share whose members' rewards are equal or fewer than two
            - `reward/groups/none`, `first_quarter`, `second_quarter`, `third_quarter`, `last_quarter`, `all`: shares of
              the groups with a verdict by pass rate: 0, (0, 1/4], (1/4, 1/2], (1/2, 3/4], (3/4, 1), 1
            - `reward/focal_weight`: mean; `reward/focal_weight_active`: mean over groups whose pass rate is neither 0
              nor 1, absent without any
            - `reward/overlong_penalty`: mean over the rollouts with a verdict of what their length adds to the reward,
              0 or less; only with `overlong`
            - `advantage/abs_mean`: over the rollouts that train
            - `batch/tokens_masked`: share of the tokens of rollouts with a verdict that do not train
            - `batch/padding_groups`: count

        Raises:
            LearnerError: if no rollout could train.
            ValueError: for rewards that the objective cannot use (`group_advantages`).
        """
        assert len(shards) == len(summaries), f"{len(shards)} shards, {len(summaries)} summaries"
        rows = _Rows.read(summaries, padding)
        trains = self._trains(rows)
        self._check_usable(step, rows)
        metrics = rows.verdict_metrics()
        advantages = np.zeros(len(trains), np.float32)
        if isinstance(self.objective, PolicyGradientObjective):
            groups = _Groups.read(self.objective, rows, blended=blended, max_new_tokens=self.max_new_tokens)
            advantages = groups.advantages()
            metrics |= groups.metrics() | _training_metrics(rows, trains, advantages)
        batch = TrainBatch(
            step=step,
            shards=tuple(shards),
            advantages=advantages,
            trains=trains,
            token_weights=self._token_weights(rows.num_tokens, trains),
            num_tokens=int(rows.num_tokens[trains].sum()),
        )
        return batch, metrics

    def _check_usable(self, step: int, rows: "_Rows") -> None:
        """Refuse a batch of which nothing could be learned; one that the recipe masks whole is no mistake."""
        usable = rows.has_verdict if isinstance(self.objective, PolicyGradientObjective) else ~rows.is_padding
        if rows.num_tokens[usable].sum() == 0:
            counts = ", ".join(f"{status} {count}" for status, count in sorted(Counter(rows.statuses).items()))
            raise LearnerError(f"step {step} needs a completion to learn from, got none of {len(usable)} ({counts})")

    def _trains(self, rows: "_Rows") -> npt.NDArray[np.bool_]:
        if isinstance(self.objective, DistillationObjective):
            return ~rows.is_padding
        trains = rows.has_verdict & ~rows.is_padding
        return trains & ~rows.is_truncated if self.objective.truncated == "mask" else trains

    def _token_weights(
        self, num_tokens: npt.NDArray[np.int64], trains: npt.NDArray[np.bool_]
    ) -> npt.NDArray[np.float32]:
        method, aggregation_tokens = "token_mean", self.max_new_tokens
        if isinstance(self.objective, PolicyGradientObjective):
            method = resolved(self.objective).aggregation
            aggregation_tokens = self.objective.aggregation_tokens or self.max_new_tokens
        weights = token_weights(num_tokens, trains, method=method, aggregation_tokens=aggregation_tokens)
        return weights.astype(np.float32)


@dataclass(frozen=True, slots=True, kw_only=True)
class _Rows:
    """The summaries of all shards, one after another; N rows in P groups of at most G."""

    prompt_ids: tuple[str, ...]
    """[P]."""
    grades: npt.NDArray[np.float64]
    """[N]; 0 where there is no verdict."""
    statuses: tuple[str, ...]
    """[N]."""
    has_verdict: npt.NDArray[np.bool_]
    """[N]."""
    is_truncated: npt.NDArray[np.bool_]
    """[N] whether the completion was cut off at its longest."""
    is_padding: npt.NDArray[np.bool_]
    """[N]."""
    num_tokens: npt.NDArray[np.int64]
    """[N]."""
    mean_logprobs: npt.NDArray[np.float64]
    """[N] nats."""
    group: npt.NDArray[np.int64]
    """[N] which group, numbered by first appearance."""
    member: npt.NDArray[np.int64]
    """[N] which place in it, by order of appearance."""

    @classmethod
    def read(cls, summaries: Sequence[pa.RecordBatch], padding: Collection[str] = frozenset()) -> "_Rows":
        """Join the summaries; a rollout that comes twice is refused, since it would be learned from twice."""
        names = ("prompt_id", "sample_index", "reward", "status", "num_tokens", "finish_reason", "mean_logprob")
        columns = {name: [value for part in summaries for value in part.column(name).to_pylist()] for name in names}
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
        grades = [reward if verdict else 0.0 for reward, verdict in zip(columns["reward"], verdicts, strict=True)]
        return cls(
            prompt_ids=tuple(numbers),
            grades=np.array(grades, np.float64),
            statuses=tuple(status or "ungraded" for status in columns["status"]),
            has_verdict=np.array(verdicts, np.bool_),
            is_truncated=np.array([reason == "length" for reason in columns["finish_reason"]], np.bool_),
            is_padding=np.array([prompt_id in padding for prompt_id in columns["prompt_id"]], np.bool_),
            num_tokens=np.array(columns["num_tokens"], np.int64),
            mean_logprobs=np.array(columns["mean_logprob"], np.float64),
            group=np.array(group, np.int64),
            member=np.array(member, np.int64),
        )

    def verdict_metrics(self) -> dict[str, float]:
        """Return the metrics of the grades alone; see `Batcher.pack`."""
        metrics = {f"reward/status/{status}": float(count) for status, count in sorted(Counter(self.statuses).items())}
        if self.has_verdict.any():
            metrics["reward/pass_rate"] = float(self.grades[self.has_verdict].mean())
        return metrics

    def by_group(self, values: npt.NDArray[_Scalar]) -> npt.NDArray[_Scalar]:
        """[N] -> [P, G], with 0 (False) where a group is smaller than the largest."""
        grouped = np.zeros((len(self.prompt_ids), int(self.member.max(initial=-1)) + 1), dtype=values.dtype)
        grouped[self.group, self.member] = values
        return grouped


@dataclass(frozen=True, slots=True, kw_only=True)
class _Groups:
    """The rewards of a step, P groups of at most G; for the policy gradient."""

    objective: PolicyGradientObjective
    rows: _Rows
    grades: npt.NDArray[np.float64]
    """[P, G]."""
    valid: npt.NDArray[np.bool_]
    """[P, G] whether there is a verdict; False in padding."""
    penalties: npt.NDArray[np.float64]
    """[P, G], 0 or less."""
    focal_gamma: float

    @classmethod
    def read(cls, objective: PolicyGradientObjective, rows: _Rows, *, blended: bool, max_new_tokens: int) -> "_Groups":
        """Put the rows into their groups."""
        penalties = np.zeros(len(rows.grades), np.float64)
        if objective.overlong is not None:
            penalties = overlong_penalty(
                rows.num_tokens,
                max_new_tokens=max_new_tokens,
                buffer_tokens=objective.overlong.buffer_tokens,
                penalty=objective.overlong.penalty,
            )
        return cls(
            objective=objective,
            rows=rows,
            grades=rows.by_group(rows.grades),
            valid=rows.by_group(rows.has_verdict & ~rows.is_padding),
            penalties=rows.by_group(penalties),
            focal_gamma=0.0 if blended and objective.focal_while_blending == "off" else objective.focal_gamma,
        )

    def advantages(self) -> npt.NDArray[np.float32]:
        """Return [N]."""
        method = resolved(self.objective).advantage
        grouped = group_advantages(
            self._outcomes() + torch.from_numpy(self.penalties),
            method=method,
            focal_gamma=self.focal_gamma,
            reward_wrong=self.objective.reward_wrong,
            reward_correct=self.objective.reward_correct,
            valid=torch.from_numpy(self.valid),
            std_ddof=self.objective.std_ddof,
            outcomes=self._outcomes(),
            correct_at=self._correct_at(),
            mean_logprobs=self._mean_logprobs() if method == "ds_grpo" else None,
            ds_coef=self.objective.ds_coef,
        )
        advantages: npt.NDArray[np.float32] = grouped.numpy()[self.rows.group, self.rows.member].astype(np.float32)
        return advantages

    def metrics(self) -> dict[str, float]:
        """Return what `Batcher.pack` tells of groups."""
        is_padding = self.rows.by_group(self.rows.is_padding).any(axis=1)
        weights = focal_weights(
            self._outcomes(),
            focal_gamma=self.focal_gamma,
            reward_wrong=self.objective.reward_wrong,
            reward_correct=self.objective.reward_correct,
            valid=torch.from_numpy(self.valid),
            correct_at=self._correct_at(),
        ).numpy()
        shaped = self._outcomes().numpy() + self.penalties
        pass_rates = self._pass_rates()
        metrics = {
            "reward/zero_variance_groups": float((~_varied(shaped, self.valid))[~is_padding].mean()),
            "reward/focal_weight": float(weights[~is_padding].mean()),
            "batch/padding_groups": float(is_padding.sum()),
            **_histogram(pass_rates[self.valid.any(axis=1)]),
        }
        active = (pass_rates > 0) & (pass_rates < 1)
        if active.any():
            metrics["reward/focal_weight_active"] = float(weights[active].mean())
        if self.objective.overlong is not None:
            metrics["reward/overlong_penalty"] = float(self.penalties[self.valid].mean())
        return metrics

    def _outcomes(self) -> torch.Tensor:
        return torch.from_numpy(self._rewards(self.grades))

    def _mean_logprobs(self) -> torch.Tensor:
        return torch.from_numpy(self.rows.by_group(self.rows.mean_logprobs))

    def _correct_at(self) -> float | None:
        if self.objective.correct_at is None:
            return None
        # Grades travel as float32, and one equal to the threshold must reach it.
        return float(self._rewards(np.array(np.float32(self.objective.correct_at), np.float64)))

    def _rewards(self, grades: npt.NDArray[np.float64]) -> npt.NDArray[np.float64]:
        # Exact at grades 0 and 1, by which wrong and correct ones are told apart.
        return self.objective.reward_wrong * (1 - grades) + self.objective.reward_correct * grades

    def _pass_rates(self) -> npt.NDArray[np.float64]:
        """Return [P], shares of correct ones, or mean grades where nothing says from which grade on one is correct."""
        threshold = self.objective.correct_at
        passed = self.grades if threshold is None else (self.grades >= np.float32(threshold)).astype(np.float64)
        rates: npt.NDArray[np.float64] = (passed * self.valid).sum(axis=1) / self.valid.sum(axis=1).clip(min=1)
        return rates


def _training_metrics(
    rows: _Rows, trains: npt.NDArray[np.bool_], advantages: npt.NDArray[np.float32]
) -> dict[str, float]:
    graded, masked = rows.num_tokens[rows.has_verdict], rows.num_tokens[rows.has_verdict & ~trains]
    return {
        "advantage/abs_mean": float(np.abs(advantages[trains]).mean()) if trains.any() else 0.0,
        "batch/tokens_masked": float(masked.sum() / graded.sum()),
    }


def _histogram(pass_rates: npt.NDArray[np.float64]) -> dict[str, float]:
    """Return the shares of groups by pass rate."""
    names = ("none", "first_quarter", "second_quarter", "third_quarter", "last_quarter", "all")
    bins = np.where(pass_rates == 1, 5, np.ceil(4 * pass_rates)).astype(np.int64)
    shares = np.bincount(bins, minlength=len(names)) / len(pass_rates)
    return {f"reward/groups/{name}": float(share) for name, share in zip(names, shares, strict=True)}


def _varied(values: npt.NDArray[np.float64], valid: npt.NDArray[np.bool_]) -> npt.NDArray[np.bool_]:
    """Return bool [P], which groups of [P, G] have two valid members with different values."""
    highest = np.where(valid, values, -np.inf).max(axis=1, initial=-np.inf)
    lowest = np.where(valid, values, np.inf).min(axis=1, initial=np.inf)
    varied: npt.NDArray[np.bool_] = highest > lowest
    return varied
