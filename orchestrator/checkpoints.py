"""What a run is resumed from: one folder per checkpoint, complete or not there at all."""

import json
import shutil
from pathlib import Path
from typing import TYPE_CHECKING

from learner.errors import LearnerError
from orchestrator.config import CheckpointsSection
from orchestrator.errors import RunError, UserError
from orchestrator.run_folder import RunFolder, write_failed

if TYPE_CHECKING:  # so that a run without a checkpoint is refused before Ray and torch are loaded
    from learner.group import LearnerGroup


class Checkpoints:
    """Writes, prunes and finds the checkpoints of a run.

    Draws are keyed by the prompt, and prompts by their index, so the learner's state and the number of steps taken say
    everything: prompt position, budget and random numbers follow from them. `model/` is an ordinary Hugging Face
    folder.
    """

    def __init__(self, folder: RunFolder, section: CheckpointsSection, learner: "LearnerGroup") -> None:
        self._folder, self._section, self._learner = folder, section, learner

    def save_if_due(self, num_steps: int) -> None:
        """Save after that many optimizer steps, if the recipe says so."""
        if self._section.every_steps and num_steps % self._section.every_steps == 0:
            self.save(num_steps)

    def save(self, num_steps: int) -> Path:
        """Save unless it is already saved; return the checkpoint's folder.

        Raises:
            RunError: if it cannot be written; the checkpoints before it stay.
        """
        target = self._folder.checkpoints / f"step_{num_steps:06d}"
        if target.exists():
            return target
        draft = self._folder.checkpoints / f".step_{num_steps:06d}"
        try:
            shutil.rmtree(draft, ignore_errors=True)
            draft.mkdir()
            self._learner.save(str((draft / "learner").absolute()), {"num_steps": num_steps})
            self._learner.save_hf(str((draft / "model").absolute()))
            if not all((draft / made).is_file() for made in ("model/config.json", "learner/learner.json")):
                raise RunError(
                    f"{target} could not be written: the learner's ranks wrote it on another machine; "
                    "training.folder must be on a file system that all nodes mount"
                )
            (draft / "state.json").write_text(json.dumps({"num_steps": num_steps}) + "\n", encoding="utf-8")
            draft.rename(target)
        except OSError as error:
            raise write_failed(target, error) from None
        except LearnerError as error:
            shutil.rmtree(draft, ignore_errors=True)
            free = shutil.disk_usage(self._folder.path).free >> 20
            raise RunError(f"{target} could not be written ({free} MiB are free on that disk): {error}") from None
        for old in _complete(self._folder.checkpoints)[: -self._section.keep]:
            shutil.rmtree(old, ignore_errors=True)
        return target

    def load_latest(self) -> int:
        """Load the newest checkpoint into the learner; return the number of optimizer steps it was saved after."""
        latest = latest_checkpoint(self._folder)
        self._learner.load(str((latest / "learner").absolute()))
        return int(json.loads((latest / "state.json").read_text(encoding="utf-8"))["num_steps"])


def latest_checkpoint(folder: RunFolder) -> Path:
    """Return the newest complete checkpoint of a run.

    Raises:
        UserError: if there is none.
    """
    complete = _complete(folder.checkpoints)
    if not has_checkpoint(folder):
        raise UserError(
            f"{folder.path} must hold a checkpoint to resume from, got none; start it again with `tutelage train`"
        )
    return complete[-1]


def has_checkpoint(folder: RunFolder) -> bool:
    """Return whether the run can be resumed."""
    return bool(_complete(folder.checkpoints))


def _complete(checkpoints: Path) -> list[Path]:
    return sorted(path for path in checkpoints.glob("step_*") if (path / "state.json").is_file())
