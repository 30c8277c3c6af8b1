"""The recipe: one YAML file, read once, refused whole if anything in it is wrong, written back resolved as JSON."""

import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Self

from pydantic import Field, ValidationError, model_validator

from actors.config import (
    BlenderSection,
    BlendingSection,
    EngineSection,
    InterleavedInjectionSection,
    ModelPoolSection,
    RolloutsSection,
    TorchEngineSection,
)
from learner.config import (
    DistillationObjective,
    DistillationSection,
    LearnerSection,
    PolicyGradientObjective,
    distillation_of,
    require_default,
)
from learner.methods import resolved
from orchestrator import plain_yaml
from orchestrator.config import (
    CheckpointsSection,
    ClusterSection,
    DataSection,
    EvaluationSection,
    TrainingSection,
)
from orchestrator.errors import UserError
from orchestrator.faults import sentences, shown
from rewards.config import GradersSection
from rewards.section import Section


class Recipe(Section):
    """Everything a run is made from."""

    name: str = Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]{0,99}$")
    """Of the run; its folder and its actors' namespace begin with it."""
    seed: int = Field(default=0, ge=0)
    """Of every random number of the run."""
    students: ModelPoolSection
    """The model being trained, and the actors that sample from it."""
    teachers: ModelPoolSection | None = None
    """The frozen teacher and its actors; none for reinforcement learning."""
    engine: EngineSection = TorchEngineSection()
    """What runs the models in student and teacher actors."""
    data: DataSection
    """The prompts."""
    rollouts: RolloutsSection = RolloutsSection()
    """What is sampled at each step."""
    blending: BlendingSection | None = None
    """TRB; without it, rollouts are the student's own from the first step."""
    graders: GradersSection = GradersSection()
    """The grader actors."""
    learner: LearnerSection
    """The objective and the optimizer."""
    training: TrainingSection
    """How long the run is."""
    evaluation: EvaluationSection = EvaluationSection()
    """Held-out prompts."""
    checkpoints: CheckpointsSection = CheckpointsSection()
    """What a run can be resumed from."""
    cluster: ClusterSection = ClusterSection()
    """The Ray cluster."""

    @property
    def distillation(self) -> DistillationSection | None:
        """How the teacher enters the loss; none where it does not."""
        return distillation_of(self.learner.objective)

    @model_validator(mode="after")
    def distillation_needs_a_teacher(self) -> Self:
        """Divergences and blends are relative to a teacher."""
        if self.teachers is None and self.distillation is not None:
            where = "" if self.learner.objective.type == "distillation" else ".distillation"
            raise ValueError(
                f"teachers.model must name a teacher, since learner.objective{where} distils one; got none"
            )
        if self.teachers is None and isinstance(self.blending, BlenderSection):
            raise ValueError("teachers.model must name a teacher, since there is a blending section; got none")
        return self

    @model_validator(mode="after")
    def a_teacher_has_a_use(self) -> Self:
        """A teacher that nothing asks would only take memory."""
        if self.teachers is not None and not isinstance(self.blending, BlenderSection) and self.distillation is None:
            raise ValueError(
                "teachers must be left out, since nothing uses it: learner.objective.type is "
                f"{self.learner.objective.type} and there is no blending section"
            )
        return self

    @model_validator(mode="after")
    def a_group_needs_two_rollouts(self) -> Self:
        """Group-relative advantages compare the completions of one prompt."""
        objective = self.learner.objective
        if not isinstance(objective, PolicyGradientObjective) or self.rollouts.group_size >= 2:
            return self
        if (objective.advantage or objective.method) != "reinforce":
            raise ValueError(
                f"rollouts.group_size must be at least 2, since learner.objective.method is {objective.method} and "
                f"compares the completions of one prompt; got {self.rollouts.group_size}"
            )
        if self.rollouts.dynamic_sampling is not None:
            raise ValueError(
                "rollouts.group_size must be at least 2 where rollouts.dynamic_sampling asks whether the members of a "
                f"group differ; got {self.rollouts.group_size}"
            )
        return self

    @model_validator(mode="after")
    def refills_are_of_rewards(self) -> Self:
        """A distilled group always teaches something."""
        if self.rollouts.dynamic_sampling is not None and self.learner.objective.type != "policy_gradient":
            raise ValueError(
                "rollouts.dynamic_sampling must be left out, since learner.objective.type is "
                f"{self.learner.objective.type}, which learns from every group"
            )
        return self

    @model_validator(mode="after")
    def settings_of_a_method_have_an_effect(self) -> Self:
        """A setting that the method does not look at would mislead whoever reads the recipe."""
        objective = self.learner.objective
        if not isinstance(objective, PolicyGradientObjective):
            return self
        method = resolved(objective)
        if method.aggregation != "fixed":
            self._require_default("aggregation_tokens", f"tokens are aggregated by {method.aggregation}")
        if method.surrogate == "reinforce":
            for name in ("clip_low", "clip_high"):
                self._require_default(name, "the surrogate reinforce clips nothing")
        if method.advantage != "grpo":
            self._require_default("std_ddof", f"the advantage {method.advantage} does not ask for it")
        if method.advantage != "ds_grpo":
            self._require_default("ds_coef", f"the advantage is {method.advantage}")
        if not isinstance(self.blending, BlenderSection):
            self._require_default("focal_while_blending", "nothing is blended")
        if self.rollouts.dynamic_sampling is not None and method.advantage in ("reinforce", "ds_grpo"):
            raise ValueError(
                f"rollouts.dynamic_sampling must be left out with the advantage {method.advantage}, which learns from "
                "groups of equal rewards, too"
            )
        if objective.overlong is not None and objective.overlong.buffer_tokens > self.rollouts.max_new_tokens:
            raise ValueError(
                f"learner.objective.overlong.buffer_tokens must be at most rollouts.max_new_tokens "
                f"({self.rollouts.max_new_tokens}), got {objective.overlong.buffer_tokens}"
            )
        return self

    def _require_default(self, name: str, reason: str) -> None:
        try:
            require_default(self.learner.objective, name, reason)
        except ValueError as error:
            raise ValueError(f"learner.objective.{error}") from None

    @model_validator(mode="after")
    def a_distillation_comes_to_pass(self) -> Self:
        """Fine-tuning to the last step leaves nothing of it, and a cut law biases its estimate by samples."""
        objective, section, rollouts = self.learner.objective, self.distillation, self.rollouts
        if isinstance(objective, DistillationObjective) and objective.sft_warmup_steps >= self.training.num_steps:
            raise ValueError(
                f"learner.objective.sft_warmup_steps must be below training.num_steps ({self.training.num_steps}), "
                f"got {objective.sft_warmup_steps}"
            )
        if section is not None and section.signal == "sampled" and (rollouts.top_p < 1 or rollouts.top_k is not None):
            name, came = ("top_p", rollouts.top_p) if rollouts.top_p < 1 else ("top_k", rollouts.top_k)
            raise ValueError(
                f"rollouts.{name} must be left out where the teacher's signal is sampled, got {came}: the estimate "
                "needs tokens from the student's whole law"
            )
        return self

    @model_validator(mode="after")
    def the_batch_divides_over_ranks(self) -> Self:
        """Every rank takes the same number of micro-batches."""
        total, ranks, micro = self.rollouts.rollouts_per_step, self.learner.world_size, self.learner.micro_batch_size
        if total % (ranks * micro):
            raise ValueError(
                f"rollouts.prompts_per_step x rollouts.group_size ({total}) must be a multiple of "
                f"learner.world_size x learner.micro_batch_size ({ranks} x {micro} = {ranks * micro})"
            )
        return self

    @model_validator(mode="after")
    def distillation_samples_at_temperature_one(self) -> Self:
        """The teacher's scores made while blending are the ones the loss uses, and the loss is at temperature 1."""
        if self.distillation is not None and self.rollouts.temperature != 1.0:
            raise ValueError(
                "rollouts.temperature must be 1.0 where a teacher is distilled, got "
                f"{self.rollouts.temperature}; blending: {{type: temperature_warmup}} warms up at another one"
            )
        return self

    @model_validator(mode="after")
    def a_blend_needs_whole_laws(self) -> Self:
        """A token that a truncated teacher forbids has no mass in mu either, so no budget could ever be spent."""
        rollouts = self.rollouts
        if isinstance(self.blending, BlenderSection) and (rollouts.top_p < 1 or rollouts.top_k is not None):
            name, came = ("top_p", rollouts.top_p) if rollouts.top_p < 1 else ("top_k", rollouts.top_k)
            raise ValueError(
                f"rollouts.{name} must be left out while two models are blended, got {came}: where the teacher's law "
                "is cut, the blend has no mass, and the trust region would switch itself off"
            )
        return self

    @model_validator(mode="after")
    def a_blend_has_what_it_asks_for(self) -> Self:
        """Each kind of blend needs to see something that not every layout shows."""
        section, size = self.blending, self.rollouts.support_size
        if not isinstance(section, BlenderSection):
            return self
        is_one_program = self.engine.type == "vllm" and section.layout == "one_engine"
        if is_one_program and section.draft_length == "measured":
            raise ValueError(
                "blending.draft_length must be a number or adaptive when blending.layout is one_engine and engine is "
                "vllm, where both models are one program; got measured"
            )
        if isinstance(section, InterleavedInjectionSection) and size != "full" and not is_one_program:
            raise ValueError(
                "rollouts.support_size must be full when blending.type is skd, since it asks for the teacher's "
                f"likeliest tokens; got {size}"
            )
        return self

    @model_validator(mode="after")
    def the_loss_has_its_support(self) -> Self:
        """A loss over the student's likeliest ids, and a blend, need log-probs on at least as many."""
        section, kept = self.distillation, self.rollouts.support_size
        if kept == "full":
            return self
        if isinstance(self.blending, BlenderSection) and kept == 0:
            raise ValueError("rollouts.support_size must be at least 1 while two models are blended, got 0")
        if section is None or section.signal in ("hidden", "sampled", "full"):
            return self
        name = (
            "learner.objective" if self.learner.objective.type == "distillation" else "learner.objective.distillation"
        )
        if section.support != "teacher" and section.support_size > kept:
            raise ValueError(
                f"rollouts.support_size must be at least {name}.support_size ({section.support_size}), got {kept}"
            )
        return self

    @model_validator(mode="after")
    def the_engine_can_tell_the_signal(self) -> Self:
        """vLLM hands out log-probs at requested ids, and nothing else of the teacher."""
        section = self.distillation
        if section is None or self.engine.type != "vllm":
            return self
        if section.signal == "full" and self.rollouts.support_size != "full":
            raise ValueError(
                "rollouts.support_size must be full where the teacher's signal is full and engine is vllm, got "
                f"{self.rollouts.support_size}"
            )
        if section.signal == "hidden" or (section.signal == "support" and section.support != "student"):
            asked = "signal hidden" if section.signal == "hidden" else f"support {section.support}"
            raise ValueError(
                f"engine must be torch where the teacher's signal is more than log-probs at the student's ids "
                f"({asked}), got vllm"
            )
        return self

    @model_validator(mode="after")
    def pass_at_k_needs_k_samples(self) -> Self:
        """The unbiased estimate of pass@k is over subsets of k samples."""
        if self.evaluation.num_prompts and not self.evaluation.pass_at:
            raise ValueError("evaluation.pass_at must hold at least one k, got none")
        wrong = [k for k in self.evaluation.pass_at if not 1 <= k <= self.evaluation.num_samples]
        if wrong and self.evaluation.num_prompts:
            raise ValueError(
                f"evaluation.pass_at must lie between 1 and evaluation.num_samples ({self.evaluation.num_samples}), "
                f"got {wrong[0]}"
            )
        return self


def load_recipe(path: str | Path, overrides: Sequence[str] = ()) -> Recipe:
    """Read, override and validate a recipe.

    Args:
        path: of the YAML file.
        overrides: `section.key=value` each; the value is read as YAML.

    Raises:
        UserError: one line per fault, each with the path of the setting, what came and what is allowed.
    """
    path = Path(path)
    try:
        text = path.read_text(encoding="utf-8")
    except OSError as error:
        raise UserError(f"{path}: a recipe must be a readable file, got: {error.strerror}") from None
    except UnicodeDecodeError:
        raise UserError(f"{path}: a recipe must be UTF-8 text, got bytes that are not") from None
    data = plain_yaml.parse(text, str(path))
    if data is None:
        raise UserError(f"{path}: a recipe must hold settings, got an empty file")
    if isinstance(data, dict):
        for override in overrides:
            _apply(data, override)
        _find_files(data.get("data"), path.parent)
    return recipe_from(data, str(path))


def recipe_from(data: Any, source: str) -> Recipe:
    """Validate settings that were already read; `source` begins each line of the error.

    Raises:
        UserError: as `load_recipe` does.
    """
    try:
        return Recipe.model_validate(data)
    except ValidationError as error:
        raise UserError("\n".join(f"{source}: {sentence}" for sentence in sentences(error, Recipe))) from None


def _find_files(section: Any, folder: Path) -> None:
    """Name prompt files by their whole path, looked for where the command is run and then beside the recipe."""
    for key in ("path", "held_out_path"):
        given = section.get(key) if isinstance(section, dict) else None
        if isinstance(given, str):
            found = next((file for file in (given, str(folder / given)) if os.path.exists(file)), given)
            section[key] = os.path.abspath(found) if os.path.exists(found) else given


def _apply(data: dict[str, Any], override: str) -> None:
    """Set one setting, making the sections on its way; the recipe's own mappings may be shared, so they are copied."""
    name, equals, value = override.partition("=")
    *sections, key = name.strip().split(".")
    if not equals or not all((*sections, key)):
        raise UserError(f"an override must be section.key=value, got {shown(override)}")
    if not value.strip():
        raise UserError(f"an override must be section.key=value, got {override!r} without a value; write null for none")
    for section in sections:
        inner = data.get(section)
        if isinstance(inner, str) and section == "engine":
            inner = {"type": inner}
        if inner is not None and not isinstance(inner, dict):
            raise UserError(f"{name}: {section} is a value, not a section, so nothing in it can be set")
        data[section] = inner = dict(inner or {})
        data = inner
    data[key] = plain_yaml.parse(value, name)
