"""Deals the rollouts of a step to ranks and micro-batches, and lays them into tensors.

Rollouts are dealt by length, so that those of one micro-batch are of about one length and all ranks have about the same
work. Where a rollout lands depends on the lengths and their order alone, and the learned step does not depend on it.
"""

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from actors.experience import Rollout
from actors.teacher_signal import tail_beyond
from learner.losses import Tokens

_Array = npt.NDArray[Any]


@dataclass(frozen=True, slots=True, kw_only=True)
class TrainRow:
    """A rollout and what the batcher decided about it."""

    rollout: Rollout
    advantage: float
    trains: bool
    token_weight: float
    """Of each of its tokens in the loss of the whole step."""

    @property
    def length(self) -> int:
        """Prompt and completion tokens."""
        return len(self.rollout.prompt.token_ids) + self.rollout.completion.num_tokens

    @property
    def num_training_tokens(self) -> int:
        """How many of its tokens train: all of the completion or none."""
        return self.rollout.completion.num_tokens if self.trains else 0


@dataclass(frozen=True, slots=True, kw_only=True)
class MicroBatch:
    """Rollouts as the inputs of one forward pass, and the N tokens of theirs that train.

    Packed, all rollouts lie one after another in one row (R = 1); otherwise each has a row, padded on the right.
    """

    input_ids: Tensor
    """[R, L] prompt and completion without the last token, which predicts nothing."""
    position_ids: Tensor
    """[R, L], from 0 in each rollout; 0 at padding."""
    segments: tuple[tuple[int, ...], ...]
    """[R] the lengths of the sequences in each row, padding left out."""
    predictors: Tensor
    """[N] int64, the place in the flattened [R * L] inputs that predicts each token."""
    tokens: Tokens
    """N tokens, rollout after rollout, in the order of `rollouts`."""
    rollouts: tuple[tuple[str, int], ...]
    """(prompt_id, sample_index), which `tokens.rollouts` counts; to name a rollout in an error."""

    def to(self, device: torch.device) -> "MicroBatch":
        """Return the same on another device."""
        return MicroBatch(
            input_ids=self.input_ids.to(device),
            position_ids=self.position_ids.to(device),
            segments=self.segments,
            predictors=self.predictors.to(device),
            tokens=self.tokens.to(device),
            rollouts=self.rollouts,
        )


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


def build_micro_batch(rows: Sequence[TrainRow], *, packing: bool, support_size: int | None) -> MicroBatch:
    """Return the tensors of some rows; a row none of whose tokens trains is left out, unless nothing else is there.

    Args:
        rows: at least one.
        packing: whether all lie in one row of inputs instead of a padded row each.
        support_size: how many ids of each rollout's support to take, with the rest in the tail; None takes all as they
            are, 0 none. A law in the vocabulary's order is taken whole or not at all.

    Raises:
        ValueError: for an empty prompt, whose first token nothing predicts, supports of different sizes, a rollout
            without the teacher's signal that others have, or a part asked for of a law without ids.
    """
    for row in rows:
        if len(row.rollout.prompt.token_ids) == 0:
            raise ValueError(f"a prompt must have at least one token, got none in {row.rollout.prompt.prompt_id}")
    # An empty forward pass would leave this rank out of the collectives of the others.
    kept = [row for row in rows if row.num_training_tokens] or list(rows[:1])
    inputs = [_inputs(row) for row in kept]
    lengths = [len(ids) for ids in inputs]
    num_columns = sum(lengths) if packing else max(lengths)
    starts = np.cumsum([0, *lengths[:-1]]) if packing else np.arange(len(kept)) * num_columns
    num_rows = 1 if packing else len(kept)
    input_ids, position_ids = (np.zeros(num_rows * num_columns, np.int64) for _ in range(2))
    for ids, start in zip(inputs, starts, strict=True):
        input_ids[start : start + len(ids)] = ids
        position_ids[start : start + len(ids)] = np.arange(len(ids))
    predictors = [
        start + len(row.rollout.prompt.token_ids) - 1 + np.arange(row.num_training_tokens)
        for row, start in zip(kept, starts, strict=True)
    ]
    return MicroBatch(
        input_ids=torch.from_numpy(input_ids.reshape(num_rows, num_columns)),
        position_ids=torch.from_numpy(position_ids.reshape(num_rows, num_columns)),
        segments=(tuple(lengths),) if packing else tuple((length,) for length in lengths),
        predictors=torch.from_numpy(np.concatenate(predictors).astype(np.int64)),
        tokens=_tokens(kept, support_size),
        rollouts=tuple((row.rollout.prompt.prompt_id, row.rollout.sample_index) for row in kept),
    )


def _inputs(row: TrainRow) -> _Array:
    """Return the ids that the model reads: all but the last, or a prompt's only one."""
    ids = np.concatenate([np.asarray(row.rollout.prompt.token_ids, np.int64), row.rollout.completion.token_ids])
    return ids[: max(1, len(ids) - 1)]


def _tokens(rows: Sequence[TrainRow], support_size: int | None) -> Tokens:
    """Return what is known of the tokens that train, row after row."""
    counts = [row.num_training_tokens for row in rows]

    def per_token(values: Callable[[TrainRow], _Array], dtype: Any) -> Tensor:
        parts = [values(row)[:count] for row, count in zip(rows, counts, strict=True)]
        return torch.from_numpy(np.concatenate(parts).astype(dtype))

    def per_rollout(values: Sequence[float], dtype: Any) -> Tensor:
        return torch.from_numpy(np.repeat(np.asarray(values, dtype), counts))

    return Tokens(
        token_ids=per_token(lambda row: row.rollout.completion.token_ids, np.int64),
        weights=per_rollout([row.token_weight for row in rows], np.float32),
        rollouts=per_rollout(range(len(rows)), np.int64),
        behaviour_logprobs=per_token(lambda row: row.rollout.completion.behaviour_logprobs, np.float32),
        advantages=per_rollout([row.advantage for row in rows], np.float32),
        teacher_hidden=_teacher_hidden(rows),
        **_support(rows, support_size),
    )


def _support(rows: Sequence[TrainRow], support_size: int | None) -> dict[str, Tensor]:
    """Return what `Tokens` has of the teacher's support, of all N tokens; nothing where no row has one."""
    told = [row.rollout.learner_scores() for row in rows if _is_scored(row.rollout)]
    if support_size == 0 or not told:
        return {}
    _all_or_none(len(told), len(rows), "the teacher's log-probs")
    sizes = {logprobs.shape[1] for _, logprobs, _ in told}
    if len(sizes) > 1:
        raise ValueError(f"rollouts of one step must store supports of one size, got {sorted(sizes)}")
    counts = [row.num_training_tokens for row in rows]

    def joined(parts: Iterable[_Array], dtype: Any) -> Tensor:
        trained = [part[:count] for part, count in zip(parts, counts, strict=True)]
        return torch.from_numpy(np.concatenate(trained).astype(dtype, copy=False))

    ids = [part for part, _, _ in told if part is not None]
    if not ids:
        if support_size is not None:
            raise ValueError(
                f"a law of the whole vocabulary has no {support_size} first ids; set signal to full, as it was sent"
            )
        return {"support_teacher_logprobs": joined((logprobs for _, logprobs, _ in told), np.float32)}
    _all_or_none(len(ids), len(rows), "the ids of the teacher's support")
    return {
        "support_ids": joined((part[:, :support_size] for part in ids), np.int64),
        "support_teacher_logprobs": joined((logprobs[:, :support_size] for _, logprobs, _ in told), np.float32),
        "support_teacher_tails": joined(
            (tail_beyond(each, tails, support_size) for _, each, tails in told), np.float32
        ),
    }


def _is_scored(rollout: Rollout) -> bool:
    scores = rollout.teacher
    return rollout.learned is not None or (scores is not None and scores.teacher_logprobs is not None)


def _teacher_hidden(rows: Sequence[TrainRow]) -> Tensor | None:
    """Return the teacher's hidden states [N, H] in the precision that they travelled in; None where no row has them."""
    stored = [hidden[: row.num_training_tokens] for row in rows if (hidden := row.rollout.teacher_hidden) is not None]
    if not stored:
        return None
    _all_or_none(len(stored), len(rows), "the teacher's hidden states")
    values = torch.from_numpy(np.concatenate(stored))
    # Arrow has no bfloat16, so these travel as the bits of one.
    return values.view(torch.bfloat16) if values.dtype == torch.uint16 else values


def _all_or_none(num_having: int, num_rows: int, what: str) -> None:
    if num_having < num_rows:
        raise ValueError(f"all rollouts of a step must carry {what}, got {num_having} of {num_rows} with it")
