"""Ctrl-C once and twice, by real signals to this process. Milliseconds."""

import os
import signal

import pytest

from orchestrator.interruption import Interruption


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_the_first_signal_asks_and_the_second_stops_at_once(number: signal.Signals) -> None:
    before, stop, said = signal.getsignal(number), Interruption(), list[str]()
    with stop.listening(said.append):
        assert not stop.requested
        os.kill(os.getpid(), number)
        assert stop.requested
        assert said == ["stopping after this step; once more to stop at once"]
        with pytest.raises(KeyboardInterrupt):
            os.kill(os.getpid(), number)
    assert signal.getsignal(number) is before


def test_a_signal_of_either_kind_is_the_second_after_the_other() -> None:
    stop = Interruption()
    with stop.listening(lambda _: None):
        os.kill(os.getpid(), signal.SIGTERM)
        with pytest.raises(KeyboardInterrupt):
            os.kill(os.getpid(), signal.SIGINT)
