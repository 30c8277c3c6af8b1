"""The completions that the torch engine samples by itself: a row each, as arrays, and their random numbers."""

from collections.abc import Sequence
from typing import Any

import numpy as np
import numpy.typing as npt

from actors.engines.protocol import SequenceRequest
from actors.random_numbers import Purpose, Words, keyed_uniforms, prompt_keys

_NUM_AHEAD = 32
"""Random numbers drawn ahead for each row."""


class Running:
    """The rows as arrays [n]: what each holds and where it stands."""

    def __init__(self, seed: int, requests: Sequence[SequenceRequest]) -> None:
        self._seed, self._requests = seed, requests
        self.owners = np.zeros(0, np.intp)
        """Number of each row's request."""
        self.last_tokens, self.lengths, self.num_left = (np.zeros(0, np.int64) for _ in range(3))
        self._ahead = np.zeros((_NUM_AHEAD, 0))
        self._turn = 0

    def __len__(self) -> int:
        return len(self.owners)

    def admit(self, numbers: Sequence[int]) -> None:
        """Append a row for each request of these numbers."""
        texts = [self._requests[i].token_ids for i in numbers]
        left = [self._requests[i].num_left for i in numbers]
        self.owners = np.append(self.owners, np.array(numbers, np.intp))
        self.last_tokens = np.append(self.last_tokens, [text[-1] for text in texts])
        self.lengths = np.append(self.lengths, [len(text) for text in texts])
        self.num_left = np.append(self.num_left, left)
        self._ahead = np.concatenate([self._ahead, self._drawn_ahead(slice(-len(numbers), None))], axis=1)

    def uniforms(self) -> npt.NDArray[np.float64]:
        """Return the [n] uniforms of the next tokens."""
        if self._turn == _NUM_AHEAD:
            self._turn = 0
            self._ahead = self._drawn_ahead(slice(None))
        ahead: npt.NDArray[np.float64] = self._ahead[self._turn]
        return ahead

    def append(self, tokens: npt.NDArray[np.int64]) -> None:
        """Add one token [n] to each row."""
        self.last_tokens, self.lengths, self.num_left = tokens, self.lengths + 1, self.num_left - 1
        self._turn += 1

    def keep(self, rows: Sequence[int]) -> None:
        """Drop all rows but these, which are renumbered in this order."""
        self.owners, self.last_tokens = self.owners[rows], self.last_tokens[rows]
        self.lengths, self.num_left = self.lengths[rows], self.num_left[rows]
        self._ahead = self._ahead[:, rows]

    def _drawn_ahead(self, rows: slice) -> npt.NDArray[np.float64]:
        """Return uniforms [_NUM_AHEAD, n] of which the next turn's are those of the next tokens."""
        requests = [self._requests[i] for i in self.owners[rows]]
        prompts = np.array([len(request.prompt_ids) for request in requests])
        return uniforms_from(
            prompt_keys(self._seed, [request.prompt_id for request in requests]),
            np.array([request.sample_index for request in requests]),
            self.lengths[rows] - prompts - self._turn,
            _NUM_AHEAD,
            Purpose.TOKEN,
        )


def uniforms_from(
    keys: Words, samples: npt.NDArray[Any], first: npt.NDArray[Any], num_positions: int, purpose: Purpose
) -> npt.NDArray[np.float64]:
    """Return uniforms [num_positions, n] of the positions from `first` [n] on, which may be below 0: never used."""
    positions = np.maximum(first + np.arange(num_positions)[:, None], 0).ravel()
    drawn: npt.NDArray[np.float64] = keyed_uniforms(
        np.tile(keys, (num_positions, 1)), np.tile(samples, num_positions), positions, purpose
    )
    return drawn.reshape(num_positions, len(keys))
