"""Deals the rollouts of a step to ranks and micro-batches, and pads them into tensors.

Rollouts are dealt by length, so that those padded together are of about one length and all ranks have about the same
work. Where a rollout lands depends on the lengths and their order alone, and the learned step does not depend on it.
"""

from collections.abc import Sequence
from dataclasses import dataclass, fields
from typing import Any

import numpy as np
import torch
from torch import Tensor

from actors.experience import Rollout, TeacherScores


@dataclass(frozen=True, slots=True, kw_only=True)
class TrainRow:
    """A rollout and what the batcher decided about it."""

    rollout: Rollout
    advantage: float
    trains: bool

    @property
    def length(self) -> int:
        """Prompt and completion tokens."""
        return len(self.rollout.prompt.token_ids) + self.rollout.completion.num_tokens


@dataclass(frozen=True, slots=True, kw_only=True)
class MicroBatch:
    """B rollouts, padded on the right to L input tokens.

    The completions lie in the last T input positions, the window: position t of the window holds the token that the
    input position L - T + t predicts. Completions of rows with longer prompts begin later in the window.
    """

    input_ids: Tensor
    """[B, L] prompt and completion without the last token, which predicts nothing."""
    attention_mask: Tensor
    """[B, L] 1 at tokens, 0 at padding."""
    token_ids: Tensor
    """[B, T] the completion's tokens in the window, 0 elsewhere."""
    loss_mask: Tensor
    """[B, T] bool: True at the completion's tokens of rows that train."""
    behaviour_logprobs: Tensor
    """[B, T] nats; 0 outside the completion."""
    advantages: Tensor
    """[B]."""
    support_ids: Tensor | None
    """[B, T, K], or None if a row that trains has no teacher signal."""
    support_teacher_logprobs: Tensor | None
    """[B, T, K] nats, or None likewise."""
    support_teacher_tails: Tensor | None
    """[B, T] nats, the teacher's mass outside these ids, or None likewise."""
    rollouts: tuple[tuple[str, int], ...]
    """[B] (prompt_id, sample_index), to name a rollout in an error."""

    def to(self, device: torch.device) -> "MicroBatch":
        """Return the same on another device."""
        values = {f.name: getattr(self, f.name) for f in fields(self)}
        moved: dict[str, Any] = {k: v.to(device) if isinstance(v, Tensor) else v for k, v in values.items()}
        return MicroBatch(**moved)


def deal_rows(lengths: Sequence[int], *, world_size: int, micro_batch_size: int) -> list[list[list[int]]]:
    """Return row numbers [world_size][num_micro_batches][micro_batch_size]; each row once.

    Rows are sorted by falling length (so that the largest need of memory shows first), cut into micro-batches, and
    these dealt to the ranks in turn: the ranks' n-th micro-batches are neighbours in length.

    Raises:
        ValueError: if the rows do not fill whole micro-batches on every rank.

    Example:
        >>> deal_rows([5, 9, 7, 8], world_size=2, micro_batch_size=1)
        [[[1], [2]], [[3], [0]]]
    """
    per_round = world_size * micro_batch_size
    if not lengths or len(lengths) % per_round:
        raise ValueError(
            f"rollouts per step must be a multiple of learner.world_size {world_size} x learner.micro_batch_size "
            f"{micro_batch_size}, got {len(lengths)}; change learner.micro_batch_size, or how many rollouts are sampled"
        )
    order = sorted(range(len(lengths)), key=lambda row: (-lengths[row], row))
    micro_batches = [order[i : i + micro_batch_size] for i in range(0, len(order), micro_batch_size)]
    return [micro_batches[rank::world_size] for rank in range(world_size)]


def build_micro_batch(rows: Sequence[TrainRow], *, support_size: int | None) -> MicroBatch:
    """Return the padded tensors of some rows.

    Args:
        rows: B of them.
        support_size: how many ids of each row's support to take; None for all.

    Raises:
        ValueError: for an empty prompt, whose first token nothing predicts, or supports of different sizes.
    """
    prompts = [np.asarray(row.rollout.prompt.token_ids, np.int64) for row in rows]
    completions = [row.rollout.completion for row in rows]
    for row, prompt in zip(rows, prompts, strict=True):
        if len(prompt) == 0:
            raise ValueError(f"a prompt must have at least one token, got none in {row.rollout.prompt.prompt_id}")
    shortest_prompt = min(len(prompt) for prompt in prompts)
    # A window has at least one position, also where all completions are empty.
    longest = max(shortest_prompt + 1, *(row.length for row in rows))
    width = longest - shortest_prompt
    starts = [len(prompt) - shortest_prompt for prompt in prompts]

    input_ids = np.zeros((len(rows), longest - 1), np.int64)
    attention_mask = np.zeros((len(rows), longest - 1), np.int64)
    for i, (prompt, completion) in enumerate(zip(prompts, completions, strict=True)):
        tokens = np.concatenate([prompt, completion.token_ids])[:-1]
        input_ids[i, : len(tokens)] = tokens
        attention_mask[i, : len(tokens)] = 1

    masks = [np.full(c.num_tokens, row.trains) for row, c in zip(rows, completions, strict=True)]
    support_ids, support_teacher_logprobs, support_teacher_tails = _support(rows, starts, width, support_size)
    return MicroBatch(
        input_ids=torch.from_numpy(input_ids),
        attention_mask=torch.from_numpy(attention_mask),
        token_ids=_in_window([c.token_ids for c in completions], starts, width, np.int64),
        loss_mask=_in_window(masks, starts, width, np.bool_),
        behaviour_logprobs=_in_window([c.behaviour_logprobs for c in completions], starts, width, np.float32),
        advantages=torch.tensor([row.advantage for row in rows], dtype=torch.float32),
        support_ids=support_ids,
        support_teacher_logprobs=support_teacher_logprobs,
        support_teacher_tails=support_teacher_tails,
        rollouts=tuple((row.rollout.prompt.prompt_id, row.rollout.sample_index) for row in rows),
    )


def _support(
    rows: Sequence[TrainRow], starts: Sequence[int], width: int, support_size: int | None
) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
    """Return the teacher's support of the rows, ids and log-probs [B, T, K] and tails [B, T]; None where a row that
    trains has none."""
    ids: list[np.ndarray[Any, Any]] = []
    logprobs: list[np.ndarray[Any, Any]] = []
    tails: list[np.ndarray[Any, Any]] = []
    for row in rows:
        scores = row.rollout.teacher
        if scores is not None and scores.teacher_logprobs is not None:
            ids.append(scores.support_ids[:, :support_size])
            logprobs.append(scores.teacher_logprobs[:, :support_size])
            tails.append(_tail(scores, support_size))
        elif row.trains:
            return None, None, None
        else:
            ids.append(np.zeros((0, 0)))
            logprobs.append(np.zeros((0, 0)))
            tails.append(np.zeros(0))
    sizes = {values.shape[1] for values in ids if len(values)}
    if len(sizes) > 1:
        raise ValueError(f"rollouts of one step must store supports of one size, got {sorted(sizes)}")
    size = max(sizes, default=0)
    return (
        _in_window(ids, starts, width, np.int64, size),
        _in_window(logprobs, starts, width, np.float32, size),
        _in_window(tails, starts, width, np.float32),
    )


def _tail(scores: TeacherScores, support_size: int | None) -> np.ndarray[Any, Any]:
    """Return [T], the teacher's log mass outside the first ids of the stored support."""
    assert scores.teacher_logprobs is not None
    assert scores.teacher_tail_logprobs is not None
    if support_size is None:
        return scores.teacher_tail_logprobs
    beyond = scores.teacher_logprobs[:, support_size:].astype(np.float64)
    return np.asarray(np.logaddexp.reduce(np.concatenate([beyond, scores.teacher_tail_logprobs[:, None]], 1), axis=1))


def _in_window(
    rows: Sequence[np.ndarray[Any, Any]], starts: Sequence[int], width: int, dtype: Any, *inner: int
) -> Tensor:
    """Put arrays [T_i, *inner] at their starts in a window [B, T, *inner] of zeros."""
    window = np.zeros((len(rows), width, *inner), dtype)
    for i, (values, start) in enumerate(zip(rows, starts, strict=True)):
        if len(values):
            window[i, start : start + len(values)] = values
    return torch.from_numpy(window)
