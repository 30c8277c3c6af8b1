"""A training run of TRL, whose steps are timed from outside by the file steps.txt; runs in the peers' environment.

Settings: method (grpo or distillation), student, teacher, prompts (rows of prompt and reference), group_size,
rollouts_per_step, num_steps, new_tokens.
"""

import json
import sys
from pathlib import Path
from typing import Any

import torch
from datasets import Dataset
from transformers import TrainerCallback


class Steps(TrainerCallback):
    """Writes one line at the end of each step."""

    def __init__(self, file: Path) -> None:
        self._file = file

    def on_step_end(self, *_: Any, **__: Any) -> None:
        """Say that a step is over."""
        with self._file.open("a") as lines:
            lines.write("step\n")


def is_right(completions: list[str], reference: list[str], **_: Any) -> list[float]:
    """Return 1 where what follows the only # is the reference."""
    return [float(text.split("#")[1:] == [right]) for text, right in zip(completions, reference, strict=True)]


def run(folder: Path, settings: Any) -> Any:
    """Train, and return how many tokens each completion had."""
    torch.set_num_threads(1)
    common = {
        "output_dir": str(folder / "trl"), "use_cpu": True, "bf16": False, "seed": 0, "report_to": "none",
        "save_strategy": "no", "logging_steps": 1, "disable_tqdm": True, "shuffle_dataset": False,
        "per_device_train_batch_size": settings["rollouts_per_step"], "gradient_accumulation_steps": 1,
        "gradient_checkpointing": False, "max_steps": settings["num_steps"], "learning_rate": 1e-5,
        "max_completion_length": settings["new_tokens"], "temperature": 1.0, "top_k": 0, "top_p": 1.0,
    }  # fmt: skip
    dataset = Dataset.from_list(settings["prompts"])
    if settings["method"] == "grpo":
        from trl import GRPOConfig, GRPOTrainer

        trainer = GRPOTrainer(
            model=settings["student"], reward_funcs=is_right, train_dataset=dataset,
            args=GRPOConfig(**common, num_generations=settings["group_size"]),
        )  # fmt: skip
    else:
        from trl import DistillationConfig, DistillationTrainer

        trainer = DistillationTrainer(
            model=settings["student"], teacher_model=settings["teacher"],
            train_dataset=dataset.remove_columns("reference"), args=DistillationConfig(**common, beta=1.0),
        )  # fmt: skip
    trainer.add_callback(Steps(folder / "steps.txt"))
    trainer.train()
    lengths = [row["completions/mean_length"] for row in trainer.state.log_history if "completions/mean_length" in row]
    return {"mean_lengths": lengths}


if __name__ == "__main__":
    where = Path(sys.argv[1])
    outcome = run(where, json.loads((where / "settings.json").read_text()))
    (where / "result.json").write_text(json.dumps(outcome))
