"""A pool of processes that grade, for graders that may hang, crash or exhaust memory on a hostile completion.

Only killing a process stops one long C call for sure, so each item has a deadline after which its worker gets SIGKILL
and a successor. The workers are plain subprocesses: nothing is forked, no signal handler is set and no module of the
caller is imported again, so that a pool works in a Ray actor and from any thread.

    grade() -> a thread per worker -> pipe -> worker process: checker(text, reference) -> pipe -> Grade
                    `- a timer that kills the worker at the deadline
"""

import contextlib
import json
import os
import queue
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from types import TracebackType
from typing import Self

from rewards.grade import Grade, Status, no_reward
from rewards.pool_worker import READY

_START_LIMIT_S = 120.0
"""Seconds for a worker to import its checker; far above the usual 1 to 3, for machines that are starved."""


class WorkerStartError(RuntimeError):
    """A worker process could not be started; no item is to blame."""


class GradingPool:
    """Grades items in `num_workers` processes, each started when first needed and kept warm.

    Args:
        checker: "module:function" naming a `Checker`; only the workers import it.
        num_workers: processes at most.
        deadline_s: wall-clock seconds for one item, starting of a worker not counted.
        memory_gib: address space of each worker.

    Example:
        >>> with GradingPool("rewards.addition:check", num_workers=1, deadline_s=5.0, memory_gib=1.0) as pool:
        ...     [grade.status.value for grade in pool.grade([("#12", "12"), ("#13", "12")])]
        ['correct', 'wrong']
    """

    def __init__(self, checker: str, *, num_workers: int, deadline_s: float, memory_gib: float) -> None:
        # The one used last is taken first, so that no more workers start than are needed.
        self._idle: queue.LifoQueue[_Worker] = queue.LifoQueue()
        for _ in range(num_workers):
            self._idle.put(_Worker(checker, deadline_s=deadline_s, memory_bytes=int(memory_gib * 2**30)))
        self._threads = ThreadPoolExecutor(num_workers, thread_name_prefix="grading")

    def grade(self, items: Sequence[tuple[str, str]]) -> list[Grade]:
        """Return the grades of (text, reference) items, in their order.

        An item whose worker passed the deadline is TIMED_OUT, one whose worker died or whose checker raised is CRASHED;
        neither touches the other items. May be called from several threads.

        Raises:
            WorkerStartError: if a worker cannot be started.
            RuntimeError: if the pool is closed.
        """
        return list(self._threads.map(self._grade_one, items))

    def close(self) -> None:
        """End all workers. Waits for the items in work, so for one deadline at most; items not begun are cancelled."""
        self._threads.shutdown(wait=True, cancel_futures=True)
        while not self._idle.empty():
            self._idle.get().stop()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def _grade_one(self, item: tuple[str, str]) -> Grade:
        worker = self._idle.get()
        try:
            return worker.grade(*item)
        finally:
            self._idle.put(worker)


class _Worker:
    """One worker process and its successors; used by one thread at a time."""

    def __init__(self, checker: str, *, deadline_s: float, memory_bytes: int) -> None:
        self._checker = checker
        self._deadline_s = deadline_s
        self._command = [sys.executable, "-P", "-m", "rewards.pool_worker", checker, str(deadline_s), str(memory_bytes)]
        self._process: subprocess.Popen[bytes] | None = None

    def grade(self, text: str, reference: str) -> Grade:
        process = self._running()
        request = json.dumps([text, reference]).encode("ascii") + b"\n"
        started = time.perf_counter()
        reply, is_late = _exchange(process, request, limit_s=self._deadline_s)
        if reply:
            fields = json.loads(reply)
            grade = Grade(**fields | {"status": Status(fields["status"])})
            if grade.status is Status.CRASHED:
                # A checker that raised may have left memory or state behind that would harm the next item.
                self.stop()
            return grade
        seconds = time.perf_counter() - started
        if is_late:
            self.stop()
            detail = f"the grader was killed at its deadline of {self._deadline_s:g} s"
            return no_reward(Status.TIMED_OUT, detail, seconds=seconds)
        detail = f"the grading process died with exit status {self._exit_status(process)}"
        self.stop()
        return no_reward(Status.CRASHED, detail, seconds=seconds)

    def stop(self) -> None:
        """Kill the process, if there is one, and wait for its end."""
        process, self._process = self._process, None
        if process is None:
            return
        _kill(process)
        process.wait()
        for pipe in (process.stdin, process.stdout):
            assert pipe is not None
            with contextlib.suppress(BrokenPipeError):
                pipe.close()

    @staticmethod
    def _exit_status(process: subprocess.Popen[bytes]) -> int | None:
        """Of a process that closed its pipe, so is about to end; negative is the signal that ended it."""
        with contextlib.suppress(subprocess.TimeoutExpired):
            process.wait(timeout=1.0)
        return process.returncode

    def _running(self) -> subprocess.Popen[bytes]:
        """A process that waits for a request; a new one if there is none or it died since the last item."""
        if self._process is not None and self._process.poll() is None:
            return self._process
        self.stop()
        try:
            # In a session of its own Ctrl-C does not reach it, and killing its group ends its children too.
            process = self._process = subprocess.Popen(
                self._command, env=_environment(), stdin=subprocess.PIPE, stdout=subprocess.PIPE, start_new_session=True
            )
        except OSError as error:
            raise WorkerStartError(f"a process for the grader {self._checker} cannot be started: {error}") from error
        reply, _ = _exchange(process, b"", limit_s=_START_LIMIT_S)
        if reply != READY:
            exit_status = self._exit_status(process)
            self.stop()
            raise WorkerStartError(
                f"a process for the grader {self._checker} ended with exit status {exit_status} before it was ready; "
                "its standard error says why"
            )
        return process


def _exchange(process: subprocess.Popen[bytes], request: bytes, *, limit_s: float) -> tuple[bytes, bool]:
    """Send a request and return (the reply line, False); (b"", True) if the limit passed, (b"", False) if it died.

    At the limit the process is killed, which ends every read and write on its pipes, whatever it was doing.
    """
    assert process.stdin is not None
    assert process.stdout is not None
    is_late = threading.Event()

    def kill_late() -> None:
        is_late.set()
        _kill(process)

    timer = threading.Timer(limit_s, kill_late)
    timer.start()
    try:
        process.stdin.write(request)
        process.stdin.flush()
        reply = process.stdout.readline()
    except BrokenPipeError:
        reply = b""
    finally:
        timer.cancel()
        # A timer that is just going off has ended after this, so a process seen in time is never killed later.
        timer.join()
    return (b"" if is_late.is_set() or not reply.endswith(b"\n") else reply), is_late.is_set()


def _kill(process: subprocess.Popen[bytes]) -> None:
    """SIGKILL a worker and what it started, unless its end was already seen: its id may be another's since."""
    if process.returncode is None:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)


def _environment() -> dict[str, str]:
    """The caller's environment, with this package importable and no threads, each of which reserves address space."""
    folders = [str(Path(__file__).resolve().parents[1]), os.environ.get("PYTHONPATH", "")]
    single = dict.fromkeys(("OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS", "MKL_NUM_THREADS"), "1")
    return os.environ | single | {"PYTHONPATH": os.pathsep.join(filter(None, folders))}
