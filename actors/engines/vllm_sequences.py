"""The sequences that are open in a vLLM engine: their tokens, on the host; vLLM itself has them in its prefix cache."""

import os
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from itertools import count

import numpy as np

from actors.engines.errors import LostSequenceError
from actors.engines.protocol import Ints, SequenceRequest


@dataclass(slots=True, eq=False, kw_only=True)
class OpenSequence:
    """A request and the tokens that it has so far."""

    request: SequenceRequest
    token_ids: list[int]
    """Of prompt and completion."""
    pending: Ints = field(default_factory=lambda: np.zeros(0, np.int32))
    """Ids of the last draft or score, of which a commit keeps a prefix."""

    def continued(self) -> SequenceRequest:
        """Return the request of whatever comes next."""
        completion_ids = tuple(self.token_ids[len(self.request.prompt_ids) :])
        return replace(self.request, completion_ids=completion_ids)


class OpenSequences:
    """All of an engine's, by handle."""

    def __init__(self) -> None:
        self._sequences: dict[int, OpenSequence] = {}
        # Handles of an engine that died and was started again must not be taken for new ones.
        self._handles = count(int.from_bytes(os.urandom(6), "big"))

    def open(self, requests: Sequence[SequenceRequest]) -> list[int]:
        """Admit sequences and return their handles."""
        handles = []
        for request in requests:
            handles.append(next(self._handles))
            self._sequences[handles[-1]] = OpenSequence(request=request, token_ids=list(request.token_ids))
        return handles

    def at(self, handles: Sequence[int]) -> list[OpenSequence]:
        """Return sequences by their handles.

        Raises:
            LostSequenceError: where one is not open.
        """
        unknown = [handle for handle in handles if handle not in self._sequences]
        if unknown:
            raise LostSequenceError(f"{len(unknown)} of {len(handles)} sequences are not open in this engine")
        return [self._sequences[handle] for handle in handles]

    def commit(self, handles: Sequence[int], num_accepted: Ints, replacement_ids: Ints) -> None:
        """Keep a prefix of each pending draft and append the replacement, if there is one (-1: none)."""
        for sequence, accepted, replacement in zip(
            self.at(handles), num_accepted.tolist(), replacement_ids.tolist(), strict=True
        ):
            assert accepted + (replacement >= 0) <= len(sequence.pending)
            sequence.token_ids += sequence.pending[:accepted].tolist()
            if replacement >= 0:
                sequence.token_ids.append(replacement)
            sequence.pending = sequence.pending[:0]

    def close(self, handles: Sequence[int]) -> None:
        """Forget sequences, where they are known."""
        for handle in handles:
            self._sequences.pop(handle, None)
