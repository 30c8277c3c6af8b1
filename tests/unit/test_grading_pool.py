"""The grading pool against real hostile processes. About 15 s."""

import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from rewards.grade import Grade, Status
from rewards.pool import GradingPool, WorkerStartError

CHECKER = "tests.unit.hostile_checker:check"
ROOT = Path(__file__).resolve().parents[2]


def is_alive(pid: int) -> bool:
    """Whether a process exists and is no zombie."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except (FileNotFoundError, ProcessLookupError):
        return False


def children(parent: int) -> set[int]:
    """The living child processes of a process."""
    ids = " ".join(path.read_text() for path in Path(f"/proc/{parent}/task").glob("*/children"))
    return {pid for pid in map(int, ids.split()) if is_alive(pid)}


def worker_of(pool: GradingPool) -> int:
    """The process id of the worker that grades next."""
    [grade] = pool.grade([("which process?", "")])
    return int(grade.detail.removeprefix("process "))


def wait_until(condition: Callable[[], object], limit_s: float = 30.0) -> None:
    deadline = time.monotonic() + limit_s
    while not condition():
        assert time.monotonic() < deadline, "the condition did not come true in time"
        time.sleep(0.02)


def hostile_pool(*, num_workers: int = 1, deadline_s: float = 1.0) -> GradingPool:
    return GradingPool(CHECKER, num_workers=num_workers, deadline_s=deadline_s, memory_gib=1.0)


@pytest.fixture(scope="module")
def pool() -> Iterator[GradingPool]:
    with hostile_pool() as shared:
        yield shared


@pytest.mark.parametrize(
    ("text", "status", "detail"),
    [
        ("sleep", Status.TIMED_OUT, "the grader was killed at its deadline of 1 s"),
        ("spin", Status.TIMED_OUT, "the grader was killed at its deadline of 1 s"),
        ("one long C call", Status.TIMED_OUT, "the grader was killed at its deadline of 1 s"),
        ("exit", Status.CRASHED, "the grading process died with exit status 3"),
        ("eat memory", Status.CRASHED, "the grader raised MemoryError: "),
        ("raise", Status.CRASHED, "the grader raised LookupError: caf\\xe9 \\ud800"),
    ],
)
def test_a_hostile_item_costs_no_other_item_its_grade(
    pool: GradingPool, text: str, status: Status, detail: str
) -> None:
    items = [(str(i), str(i - i % 2)) for i in range(20)]
    grades = pool.grade([*items[:10], (text, "0"), *items[10:]])
    hostile = grades.pop(10)
    assert hostile.status is status
    assert hostile.reward == 0.0
    assert hostile.detail.startswith(detail)
    assert len(hostile.detail) < 300
    assert [grade.status for grade in grades] == [Status.CORRECT, Status.WRONG] * 10
    assert [grade.reward for grade in grades] == [1.0, 0.0] * 10
    assert all(0 < grade.seconds < 1 for grade in grades)
    assert 1 <= hostile.seconds < 5 if status is Status.TIMED_OUT else hostile.seconds < 1


def test_a_worker_killed_from_outside_in_the_middle_of_an_item_crashes_that_item_alone() -> None:
    with hostile_pool(deadline_s=30.0) as pool:
        first = worker_of(pool)
        grades: list[Grade] = []
        thread = threading.Thread(target=lambda: grades.extend(pool.grade([("a", "a"), ("sleep", ""), ("b", "b")])))
        thread.start()
        time.sleep(0.5)
        os.kill(first, signal.SIGKILL)
        thread.join(timeout=20)
        second = worker_of(pool)
    assert [grade.status for grade in grades] == [Status.CORRECT, Status.CRASHED, Status.CORRECT]
    assert grades[1].detail == "the grading process died with exit status -9"
    assert first != second


def test_a_worker_that_died_between_items_costs_none() -> None:
    with hostile_pool() as pool:
        worker = worker_of(pool)
        os.kill(worker, signal.SIGKILL)
        wait_until(lambda: not is_alive(worker))
        assert pool.grade([("a", "a")])[0].status is Status.CORRECT


def test_a_stopped_worker_that_reads_nothing_is_killed_at_the_deadline() -> None:
    with hostile_pool() as pool:
        os.kill(worker_of(pool), signal.SIGSTOP)
        more_than_a_pipe_holds = "a" * 2**20
        late, right = pool.grade([(more_than_a_pipe_holds, ""), (more_than_a_pipe_holds, more_than_a_pipe_holds)])
    assert late.status is Status.TIMED_OUT
    assert right.status is Status.CORRECT


def test_workers_start_when_first_needed_stay_warm_and_are_gone_after_close() -> None:
    before = children(os.getpid())
    pool = hostile_pool(num_workers=2)
    assert children(os.getpid()) == before
    worker = worker_of(pool)
    assert children(os.getpid()) - before == {worker}
    assert worker_of(pool) == worker
    started = time.monotonic()
    assert {grade.status for grade in pool.grade([("sleep", "")] * 2)} == {Status.TIMED_OUT}
    assert time.monotonic() - started < 1.9, "two workers work side by side"
    pool.grade([("a", "a")] * 10)
    assert len(children(os.getpid()) - before) in (1, 2)
    pool.close()
    assert children(os.getpid()) == before
    with pytest.raises(RuntimeError):
        pool.grade([("a", "a")])


def test_what_a_killed_worker_started_is_killed_with_it() -> None:
    seconds = "61.125"
    with hostile_pool() as pool:
        [grade] = pool.grade([("leave a child", seconds)])
        assert grade.status is Status.TIMED_OUT

    def child_lives() -> bool:
        commands = (path.parent for path in Path("/proc").glob("[0-9]*/cmdline"))
        return any(is_alive(int(folder.name)) and seconds in command_of(folder) for folder in commands)

    wait_until(lambda: not child_lives(), limit_s=5.0)


def command_of(folder: Path) -> str:
    try:
        return (folder / "cmdline").read_text()
    except (FileNotFoundError, ProcessLookupError):
        return ""


@pytest.mark.parametrize("work", ["spin", "which process?"])
def test_workers_of_a_killed_caller_end_by_themselves(work: str) -> None:
    script = f"""
from rewards.pool import GradingPool
pool = GradingPool({CHECKER!r}, num_workers=1, deadline_s=1.5, memory_gib=1.0)
print(pool.grade([("which process?", "")])[0].detail, flush=True)
pool.grade([({work!r}, "")])
print("graded", flush=True)
input()
"""
    with subprocess.Popen(
        [sys.executable, "-c", script], cwd=ROOT, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    ) as caller:
        assert caller.stdout is not None
        worker = int(caller.stdout.readline().removeprefix("process "))
        if work == "spin":
            time.sleep(0.3)
        else:
            assert caller.stdout.readline() == "graded\n"
        assert is_alive(worker)
        caller.kill()
    wait_until(lambda: not is_alive(worker), limit_s=20.0)


def test_several_threads_may_grade_at_once() -> None:
    results: dict[int, list[Status]] = {}
    with hostile_pool(num_workers=2) as pool:

        def grade(index: int) -> None:
            items = [(str(i), str(i if i % 3 == index else -1)) for i in range(30)]
            results[index] = [grade.status for grade in pool.grade(items)]

        threads = [threading.Thread(target=grade, args=(index,)) for index in range(3)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join(timeout=30)
    for index in range(3):
        assert results[index] == [Status.CORRECT if i % 3 == index else Status.WRONG for i in range(30)]


def test_what_a_checker_prints_is_not_taken_for_a_reply(pool: GradingPool) -> None:
    grades = pool.grade([("print", "print"), ("a", "a")])
    assert [grade.status for grade in grades] == [Status.CORRECT, Status.CORRECT]


def test_any_text_reaches_the_checker_as_it_is(pool: GradingPool) -> None:
    texts = ["", "\n", "\x00", "a\r\nb", "\ud800", "\N{ARABIC-INDIC DIGIT ONE}", '"\\', "x" * 10**6]
    assert {grade.status for grade in pool.grade([(text, text) for text in texts])} == {Status.CORRECT}


def test_workers_import_neither_torch_nor_ray(pool: GradingPool) -> None:
    [grade] = pool.grade([("modules", "")])
    modules = set(grade.detail.split())
    assert "rewards" in modules
    assert not modules & {"torch", "ray", "vllm", "deepspeed", "transformers", "pyarrow"}


def test_a_checker_that_cannot_be_imported_is_an_error_not_a_grade() -> None:
    with GradingPool("rewards.no_such:check", num_workers=1, deadline_s=1.0, memory_gib=1.0) as pool:
        started = time.monotonic()
        with pytest.raises(WorkerStartError, match=r"rewards\.no_such:check ended with exit status 1"):
            pool.grade([("a", "a")] * 1000)
        assert time.monotonic() - started < 20, "one failed start ends the call"
