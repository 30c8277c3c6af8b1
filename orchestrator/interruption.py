"""Ctrl-C, once: stop after the step that is being taken. Twice: stop now."""

import signal
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import FrameType


class Interruption:
    """Whether the run has been told to stop."""

    def __init__(self) -> None:
        self.requested = False

    @contextmanager
    def listening(self, say: Callable[[str], None]) -> Iterator[None]:
        """While in this context, the first SIGINT or SIGTERM only asks to stop; the second raises KeyboardInterrupt."""

        def ask(signum: int, frame: FrameType | None) -> None:
            if self.requested:
                raise KeyboardInterrupt
            self.requested = True
            say("stopping after this step; once more to stop at once")

        before = {number: signal.signal(number, ask) for number in (signal.SIGINT, signal.SIGTERM)}
        try:
            yield
        finally:
            for number, handler in before.items():
                signal.signal(number, handler)
