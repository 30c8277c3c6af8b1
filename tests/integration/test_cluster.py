"""A job sent to a cluster that `ray start` made: actor names on the dashboard's API, metrics on the metrics port."""

import json
import os
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
import urllib.request
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

pytestmark = [pytest.mark.ray, pytest.mark.timeout(600)]

ROOT = Path(__file__).parents[2]
BIN = Path(sys.executable).parent


@dataclass(frozen=True)
class Head:
    """Where the cluster's head answers."""

    dashboard: str
    metrics: str
    environment: dict[str, str]


def free_ports(count: int) -> list[int]:
    sockets = [socket.socket() for _ in range(count)]
    try:
        for each in sockets:
            each.bind(("127.0.0.1", 0))
        return [each.getsockname()[1] for each in sockets]
    finally:
        for each in sockets:
            each.close()


def get(url: str) -> str:
    with urllib.request.urlopen(url, timeout=10) as answer:
        return str(answer.read().decode())


def eventually(attempt: Any, seconds: float) -> Any:
    """Call until the answer is true; an answer that cannot be had yet counts as false."""
    deadline = time.monotonic() + seconds
    while True:
        try:
            answer = attempt()
        except OSError:
            answer = None
        if answer or time.monotonic() > deadline:
            return answer
        time.sleep(0.5)


@pytest.fixture(scope="module")
def head(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Head]:
    gcs, dashboard, agent, metrics, client = free_ports(5)
    # Unix socket paths are limited to about 107 characters, so the folder's name is short.
    temp = Path(tempfile.mkdtemp(prefix="tc"))
    environment = {name: value for name, value in os.environ.items() if name != "RAY_ADDRESS"}
    environment |= {"PATH": f"{BIN}:{environment['PATH']}", "PYTHONPATH": str(ROOT)}
    process = subprocess.Popen(
        [
            str(BIN / "ray"), "start", "--head", "--block", f"--port={gcs}",
            f"--dashboard-port={dashboard}", f"--dashboard-agent-listen-port={agent}",
            f"--metrics-export-port={metrics}", f"--ray-client-server-port={client}", "--num-cpus=4",
            f"--temp-dir={temp}", "--disable-usage-stats", f"--object-store-memory={512 * 2**20}",
        ],
        env=environment, start_new_session=True, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL,
    )  # fmt: skip
    try:
        address = f"http://127.0.0.1:{dashboard}"
        assert eventually(lambda: get(f"{address}/api/version"), 120), "the cluster has not started"
        yield Head(address, f"http://127.0.0.1:{metrics}/metrics", environment)
    finally:
        process.send_signal(signal.SIGTERM)
        process.wait(timeout=60)
        shutil.rmtree(temp, ignore_errors=True)


def test_a_submitted_job_runs_with_named_actors_and_metrics_on_the_metrics_port(head: Head, tmp_path: Path) -> None:
    submission = "tutelage-test"

    def job(verb: str, *arguments: str) -> str:
        done = subprocess.run(
            [str(BIN / "ray"), "job", verb, f"--address={head.dashboard}", *arguments],
            cwd=ROOT, env=head.environment, capture_output=True, text=True, timeout=300,
        )  # fmt: skip
        if done.returncode:
            raise OSError(done.stdout + done.stderr)
        return done.stdout

    submit = (
        "submit", "--working-dir", ".", "--no-wait", f"--submission-id={submission}", "--",
        "tutelage", "train", "deploy/recipes/quickstart.yaml", f"training.folder={tmp_path}", "students.num_actors=2",
        "students.num_cpus=0.25", "training.num_steps=5000", "blending.warmup_steps=4000", "evaluation.num_prompts=0",
        "rollouts.prompts_per_step=16", "learner.micro_batch_size=16",
    )  # fmt: skip
    # The dashboard answers before the node's agent can take jobs.
    assert eventually(lambda: job(*submit), 120)
    seen: set[str] = set()

    def names_seen_alive() -> set[str]:
        answer = json.loads(get(f"{head.dashboard}/api/v0/actors?detail=1&limit=1000"))
        actors = answer["data"]["result"]["result"]
        seen.update(actor["name"] for actor in actors if actor["state"] == "ALIVE")
        return seen

    expected = {"experience-queue", "student-0", "student-1", "teacher-0", "blending-0", "grader-0", "learner-0"}
    assert eventually(lambda: expected <= names_seen_alive(), 240), job("logs", submission)
    wanted = ("ray_tutelage_reward_pass_rate{", "ray_tutelage_blend_beta{", "ray_tutelage_time_tokens_per_s{")
    exported = eventually(lambda: all(name in get(head.metrics) for name in wanted), 120)
    assert exported, job("logs", submission)
    job("stop", "--no-wait", submission)
    assert eventually(lambda: "was stopped" in job("status", submission), 120), job("logs", submission)
    (folder,) = tmp_path.iterdir()
    assert str(folder) in job("logs", submission)
    steps = [json.loads(line)["step"] for line in (folder / "metrics.jsonl").read_text().splitlines()]
    assert steps == list(range(len(steps)))
    assert steps
