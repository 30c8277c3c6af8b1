"""The recipe's sections on what drives a run: data, training, evaluation, checkpoints, the cluster."""

from typing import Annotated, Literal

from pydantic import Field

from rewards.section import Section


class AdditionData(Section):
    """Generated sums of two numbers, with carry steps in the worked solution."""

    type: Literal["addition"] = "addition"
    """Which prompts."""
    max_digits: int = Field(default=3, ge=1, le=9)
    """Most digits of each number."""


class CountdownData(Section):
    """Generated 3-number countdown: reach the target with + - *, each number used once."""

    type: Literal["countdown"] = "countdown"
    """Which prompts."""


class FileData(Section):
    """Prompts from JSONL or Parquet files: rows with `prompt` or `messages`, `reference`, and optionally `id`."""

    type: Literal["file"] = "file"
    """Which prompts."""
    path: str
    """The training prompts (.jsonl or .parquet): looked for where the command is run, then beside the recipe."""
    held_out_path: str | None = None
    """The prompts of the evaluation; without them nothing is evaluated."""
    task: Literal["addition", "countdown", "math"]
    """Which grader judges the completions."""
    system_prompt: str | None = None
    """Put before every prompt, as a message of the chat template."""
    shuffle: bool = True
    """Whether each epoch has its own order, drawn from the recipe's seed; the order of the file otherwise."""


DataSection = Annotated[AdditionData | CountdownData | FileData, Field(discriminator="type")]


class TrainingSection(Section):
    """How long the run is and where it is written."""

    num_steps: int = Field(ge=1)
    """Optimizer steps; each learns from one batch of rollouts."""
    folder: str = "runs"
    """Run folders are made in this folder."""


class EvaluationSection(Section):
    """Held-out prompts, sampled from the student alone before the first step, after the last, and in between."""

    num_prompts: int = Field(default=128, ge=0)
    """How many held-out prompts; 0 turns evaluation off."""
    num_samples: int = Field(default=8, ge=1)
    """Completions of each."""
    pass_at: tuple[int, ...] = Field(default=(1, 8), strict=False)
    """The k of the reported pass@k, none above num_samples."""
    every_steps: int = Field(default=0, ge=0)
    """Also after every so many steps; 0 means only before and after."""


class CheckpointsSection(Section):
    """What a run can be resumed from."""

    every_steps: int = Field(default=50, ge=0)
    """A checkpoint after every so many steps; one is always written at the end."""
    keep: int = Field(default=2, ge=1)
    """How many of the newest are kept."""


class ClusterSection(Section):
    """The Ray cluster."""

    address: str | None = None
    """Of a running cluster (`auto`, HOST:PORT); RAY_ADDRESS counts as well. Otherwise a local one is started."""
    num_cpus: int | None = Field(default=None, ge=1)
    """CPUs of a local cluster; those of the machine by default."""
    object_store_gib: float = Field(default=1.0, ge=0.1, le=65536)
    """Object store of a local cluster."""
    dashboard: bool = True
    """Whether a local cluster has Ray's dashboard."""
