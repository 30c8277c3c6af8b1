"""The real command, in processes of its own: what mistakes, a full disk and Ctrl-C lead to. About 3 minutes."""

import json
import os
import re
import resource
import signal
import socket
import subprocess
import sys
import time
import uuid
from collections.abc import Iterator
from pathlib import Path
from threading import Thread

import pyarrow.parquet as pq
import pytest

ROOT = Path(__file__).resolve().parents[2]
QUICKSTART = "deploy/recipes/quickstart.yaml"
COMMAND = (sys.executable, "-m", "orchestrator.cli")
LOCAL = ("cluster.num_cpus=4", "cluster.dashboard=false", "cluster.object_store_gib=0.2")
"""A cluster of the command's own, large enough for the quickstart and no larger."""
REINFORCE = ("teachers=null", "blending=null", "learner.objective={type: policy_gradient}", "rollouts.group_size=8",
             "rollouts.prompts_per_step=8", "training.num_steps=500", "evaluation.num_prompts=0")  # fmt: skip
"""The quickstart without a teacher, which starts in half the time, and without an end."""
MARK = "TUTELAGE_TEST_MARK"
"""Set for a command, and so for every process that it leads to."""


def environment(**more: str) -> dict[str, str]:
    return {name: value for name, value in os.environ.items() if name != "RAY_ADDRESS"} | more


def run(*arguments: str, **more: str) -> subprocess.CompletedProcess[str]:
    """Run the command to its end."""
    return subprocess.run(
        [*COMMAND, *arguments], cwd=ROOT, env=environment(**more), capture_output=True, text=True, timeout=240
    )


def complaint(done: subprocess.CompletedProcess[str], code: int = 2) -> str:
    """Return what a command that failed wrote to stderr: sentences for a user, and never a traceback."""
    assert done.returncode == code, done.stderr
    assert "Traceback" not in done.stderr + done.stdout
    return done.stderr.strip()


class Run:
    """A training run in the background, the leader of a process group as it is in a terminal."""

    def __init__(self, *arguments: str) -> None:
        self._mark, self._lines = uuid.uuid4().hex, list[str]()
        self.process = subprocess.Popen(
            [*COMMAND, *arguments], cwd=ROOT, env=environment(**{MARK: self._mark}),
            stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, start_new_session=True,
        )  # fmt: skip
        assert self.process.stdout is not None
        self._reader = Thread(target=self._lines.extend, args=[self.process.stdout], daemon=True)
        self._reader.start()

    @property
    def text(self) -> str:
        return "".join(self._lines)

    @property
    def folder(self) -> Path:
        match = re.search(r"^run folder: (.+)$", self.text, re.MULTILINE)
        assert match is not None, self.text
        return Path(match[1])

    def wait_for(self, pattern: str, limit_s: float = 240.0) -> None:
        deadline = time.monotonic() + limit_s
        while not re.search(pattern, self.text, re.MULTILINE):
            assert self.process.poll() is None, self.text
            assert time.monotonic() < deadline, self.text
            time.sleep(0.05)

    def interrupt(self) -> None:
        """Press Ctrl-C: the whole process group gets the signal."""
        os.killpg(self.process.pid, signal.SIGINT)

    def end(self, limit_s: float) -> int:
        """Wait for the command to end by itself; return its exit code."""
        code = self.process.wait(limit_s)
        self._reader.join(10)
        return code

    def processes(self) -> list[str]:
        """The command lines of all that the command led to and that still runs."""
        found = []
        for folder in Path("/proc").glob("[0-9]*"):
            try:
                if f"{MARK}={self._mark}".encode() in (folder / "environ").read_bytes():
                    found.append((folder / "cmdline").read_bytes().replace(b"\0", b" ").decode(errors="replace"))
            except (FileNotFoundError, ProcessLookupError, PermissionError):
                continue
        return found

    def orphans(self) -> list[str]:
        """What is left of it some seconds after it has ended."""
        deadline = time.monotonic() + 20
        while self.processes() and time.monotonic() < deadline:
            time.sleep(0.2)
        return self.processes()


@pytest.fixture
def started(tmp_path: Path) -> Iterator[list[Run]]:
    """Hold the runs of a test, to kill what a failed one leaves behind."""
    runs: list[Run] = []
    yield runs
    for each in runs:
        if each.process.poll() is None:
            each.process.kill()


def lines(file: Path) -> list[dict[str, float]]:
    return [json.loads(line) for line in file.read_text(encoding="utf-8").splitlines()]


# ---- without a cluster


def test_check_prints_the_resolved_recipe_which_is_a_recipe_itself(tmp_path: Path) -> None:
    before = resource.getrusage(resource.RUSAGE_CHILDREN)
    done = run("check", QUICKSTART, "training.num_steps=7", "engine=vllm")
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    assert done.returncode == 0
    assert json.loads(done.stdout)["training"] == {"num_steps": 7, "folder": "runs"}
    assert done.stderr.splitlines()[-1] == f"{QUICKSTART} is in order"
    # 0.6 s on an idle machine. Loading torch or Ray as well takes 3 s or more.
    assert after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime < 2.5
    resolved = tmp_path / "resolved.json"
    resolved.write_text(done.stdout, encoding="utf-8")
    assert run("check", str(resolved)).stdout == done.stdout


def test_check_loads_none_of_the_heavy_libraries() -> None:
    script = f"""import sys; sys.argv = ["tutelage", "check", {QUICKSTART!r}]
from orchestrator.cli import main
try: main()
finally: print(*sorted({{name.partition(".")[0] for name in sys.modules}}), file=sys.stderr)"""
    done = subprocess.run([sys.executable, "-c", script], cwd=ROOT, capture_output=True, text=True, check=True)
    loaded = set(done.stderr.splitlines()[-1].split())
    assert "pydantic" in loaded
    assert loaded & {"torch", "ray", "vllm", "deepspeed", "transformers", "pyarrow"} == set()


@pytest.mark.parametrize(
    ("command", "said"),
    [
        ([], "RECIPE training.num_steps=50"),
        (["train"], "Starts a Ray cluster on this machine and stops it at the end"),
        (["check"], "nothing is started"),
        (["eval"], "Which task's held-out prompts and grader: addition, countdown, or math."),
        (["resume"], "from its newest checkpoint, in the same folder"),
    ],
)
def test_every_command_explains_itself(command: list[str], said: str) -> None:
    done = run(*command, "--help")
    assert done.returncode == 0
    assert said in " ".join(done.stdout.split())


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["trian"], "No such command 'trian'. Did you mean 'train'?"),
        (["train"], "Missing argument 'RECIPE'."),
        (["train", "nowhere.yaml"], "tutelage: nowhere.yaml: a recipe must be a readable file, got: No such file or"),
        (["train", "deploy"], "File 'deploy' is a directory."),
        (["train", QUICKSTART, "training.num_step=3"], "training.num_step is not a setting (did you mean num_steps?)"),
        (["train", QUICKSTART, "students.model=models/student"], "students.model must be an existing Hugging Face f"),
        (["train", QUICKSTART, f"name={'x' * 300}"], "name must be of the form"),
        (["check", QUICKSTART, "students.num_actors"], "an override must be section.key=value, got 'stud"),
        (["check", QUICKSTART, "seed=x", "data.max_digits=0"], "seed must be a whole number, got 'x'\ntutelage: "),
        (["check", QUICKSTART, "data={type: file, path: nowhere.jsonl, task: math}"], "data.path must be a readable"),
        (["train", QUICKSTART, "training.folder=/dev/null/x"], "training.folder must be a folder that can be wr"),
        (["resume", "deploy"], "tutelage: a run folder must hold a recipe.json, got 'deploy' without one"),
        (["resume", "nowhere"], "tutelage: a run folder must hold a recipe.json, got 'nowhere' without one"),
        (["eval", "tiny:addition-student"], "Missing option '--task'."),
        (["eval", "nowhere", "--task", "addition"], "CHECKPOINT must be an existing Hugging Face folder, got"),
        (["eval", "tiny:addition", "--task", "adition"], "--task must be one of addition, countdown, math, got"),
        (["eval", "tiny:addition-student", "--task", "math"], "--data must name a file of prompts, since --task math"),
        (["eval", "tiny:addition-student", "--task", "addition", "--samples", "0"], "Invalid value for '--samples': 0"),
        (["eval", "x", "--task", "addition", "--samples", "4", "--pass-at", "8"], "--pass-at must lie between 1 and"),
        (["eval", "x", "--task", "addition", "--data", "x.csv"], "--data must name a .jsonl or .parquet file"),
        (["eval", "hub:nobody/nothing", "--task", "addition"], "hub:nobody/nothing must be a model that the"),
    ],
)  # fmt: skip
def test_a_users_mistake_is_told_in_a_sentence_and_ends_with_code_2(arguments: list[str], said: str) -> None:
    assert said in complaint(run(*arguments))


def test_a_run_folder_that_cannot_be_resumed_is_refused(tmp_path: Path) -> None:
    recipe = tmp_path / "recipe.json"
    recipe.write_text("{cut", encoding="utf-8")
    assert f"{recipe}: must be the resolved recipe of a run, got: " in complaint(run("resume", str(tmp_path)))
    recipe.write_text("[]", encoding="utf-8")
    assert f"{recipe}: a recipe must be a section of settings, got []" in complaint(run("resume", str(tmp_path)))
    recipe.write_text(run("check", QUICKSTART).stdout, encoding="utf-8")
    assert f"{tmp_path} must hold a checkpoint to resume from, got none" in complaint(run("resume", str(tmp_path)))


# ---- with a cluster


def test_an_address_that_leads_to_no_cluster_is_refused_in_seconds(tmp_path: Path) -> None:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        address = f"127.0.0.1:{free.getsockname()[1]}"
    began = time.monotonic()
    done = run("train", QUICKSTART, f"training.folder={tmp_path}", RAY_ADDRESS=address)
    assert complaint(done).splitlines() == [
        f"tutelage: RAY_ADDRESS must lead to a running Ray cluster, got '{address}': nothing answers there "
        "(Connection refused)"
    ]
    assert time.monotonic() - began < 120  # mostly imports; Ray itself would try for many minutes


@pytest.mark.ray
@pytest.mark.timeout(600)
def test_more_actors_than_the_cluster_holds_are_refused(tmp_path: Path, started: list[Run]) -> None:
    started.append(run := Run("train", QUICKSTART, f"training.folder={tmp_path}", *LOCAL[1:],
                              "cluster.num_cpus=1", "students.num_actors=3"))  # fmt: skip
    assert run.end(240) == 2
    assert "the recipe's actors must fit the cluster: they reserve 3 CPUs (students 1.5 + teachers 0.5 + " in run.text
    assert "the cluster has 1; lower num_actors or num_cpus in those sections" in run.text
    assert "Traceback" not in run.text
    assert run.orphans() == []


@pytest.mark.ray
@pytest.mark.timeout(300)
def test_ctrl_c_while_the_actors_start_ends_the_command_and_leaves_nobody(tmp_path: Path, started: list[Run]) -> None:
    started.append(early := Run("train", QUICKSTART, f"training.folder={tmp_path}"))
    early.wait_for(r"^dashboard: ")
    early.interrupt()
    assert early.end(120) == 130
    assert "Traceback" not in early.text
    assert early.orphans() == []


@pytest.mark.ray
@pytest.mark.timeout(900)
def test_a_full_disk_and_ctrl_c_end_a_run_that_can_go_on(tmp_path: Path, started: list[Run]) -> None:
    """One run, ended in two ways; each time what it wrote is whole, and no process is left."""
    started.append(
        full := Run(
            "train",
            QUICKSTART,
            f"training.folder={tmp_path}",
            *LOCAL,
            *REINFORCE,
            "checkpoints.every_steps=2",
        )
    )
    full.wait_for(r"^step [3-9]")
    assert len(full.processes()) > 4  # else nobody would be missed below
    # No file of this one process may grow any more: what a full disk is to it.
    resource.prlimit(full.process.pid, resource.RLIMIT_FSIZE, (0, resource.RLIM_INFINITY))
    assert full.end(60) == 1
    folder = full.folder
    assert re.search(r"^tutelage: .* could not be written: .*File too large. The run stops; what was written before is "
                     "kept$", full.text, re.MULTILINE)  # fmt: skip
    assert full.text.splitlines()[-1] == f"continue with: tutelage resume {folder}"
    assert "Traceback" not in full.text
    assert full.orphans() == []
    files = sorted((folder / "rollouts").iterdir())
    assert [pq.read_metadata(file).num_rows for file in files] == [64] * len(files)
    steps = [line["step"] for line in lines(folder / "metrics.jsonl")]
    assert steps == list(range(len(steps)))
    assert 3 <= len(steps) <= len(files)

    started.append(once := Run("resume", str(folder)))
    once.wait_for(r"^step ")
    once.interrupt()
    assert once.end(60) == 130
    assert "stopping after this step; once more to stop at once" in once.text
    assert once.text.splitlines()[-1] == f"continue with: tutelage resume {folder}"
    assert "Traceback" not in once.text
    assert once.orphans() == []
    steps = [line["step"] for line in lines(folder / "metrics.jsonl")]
    assert steps == list(range(len(steps)))
    checkpoint = folder / "checkpoints" / f"step_{len(steps):06d}"
    assert checkpoint.is_dir()

    assert f"(did you mean {checkpoint}/model?)" in complaint(run("eval", str(checkpoint), "--task", "addition"))
    request = (str(checkpoint / "model"), "--task", "addition", "--prompts", "8", "--samples", "4", "--pass-at", "1,4")
    done = run("eval", *request)
    assert done.returncode == 0, done.stderr
    assert re.search(r"pass@4 .* \d\.\d{3} ± \d\.\d{3}", done.stdout)
    weights = checkpoint / "model" / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:1000])
    assert f"tutelage: {checkpoint}/model could not be evaluated: " in complaint(run("eval", *request), code=1)
