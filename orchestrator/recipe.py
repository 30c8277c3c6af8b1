"""The recipe: one YAML file, read once, refused whole if anything in it is wrong, written back resolved as JSON."""

import difflib
import re
import types
import typing
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Self

import yaml
from pydantic import BaseModel, Field, ValidationError, model_validator

from actors.config import BlendingSection, EngineSection, ModelPoolSection, RolloutsSection, TorchEngineSection
from learner.config import LearnerSection
from orchestrator.config import (
    CheckpointsSection,
    ClusterSection,
    DataSection,
    EvaluationSection,
    TrainingSection,
)
from orchestrator.errors import UserError
from rewards.config import GradersSection
from rewards.section import Section


class Recipe(Section):
    """Everything a run is made from."""

    name: str = Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]*$")
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

    @model_validator(mode="after")
    def distillation_needs_a_teacher(self) -> Self:
        """Reverse KL and blending are relative to a teacher."""
        if self.teachers is None and self.learner.objective.type == "reverse_kl":
            raise ValueError("teachers.model must name a teacher, since learner.objective.type is reverse_kl; got none")
        if self.teachers is None and self.blending is not None:
            raise ValueError("teachers.model must name a teacher, since there is a blending section; got none")
        return self

    @model_validator(mode="after")
    def a_teacher_has_a_use(self) -> Self:
        """A teacher that nothing asks would only take memory."""
        if self.teachers is not None and self.blending is None and self.learner.objective.type != "reverse_kl":
            raise ValueError(
                "teachers must be left out, since nothing uses it: learner.objective.type is "
                f"{self.learner.objective.type} and there is no blending section"
            )
        return self

    @model_validator(mode="after")
    def a_group_needs_two_rollouts(self) -> Self:
        """Group-relative advantages compare the completions of one prompt."""
        if self.learner.objective.type == "policy_gradient" and self.rollouts.group_size < 2:
            raise ValueError(
                f"rollouts.group_size must be at least 2, since learner.objective.method is "
                f"{self.learner.objective.method} and compares the completions of one prompt; "
                f"got {self.rollouts.group_size}"
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
        if self.teachers is not None and self.rollouts.temperature != 1.0:
            raise ValueError(
                f"rollouts.temperature must be 1.0 when there is a teacher, got {self.rollouts.temperature}"
            )
        return self

    @model_validator(mode="after")
    def the_loss_has_its_support(self) -> Self:
        """A loss over the student's top ids needs log-probs on at least as many."""
        objective, shipped = self.learner.objective, self.rollouts.support_size
        if objective.type == "reverse_kl" and shipped != "full":
            wanted = objective.support_size
            if wanted == "full" or wanted > shipped:
                raise ValueError(
                    f"rollouts.support_size must be at least learner.objective.support_size ({wanted}), got {shipped}"
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


class _Loader(yaml.SafeLoader):
    """Plain data only; a key given twice is an error, and 1e-5 is a number as in YAML 1.2."""

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        seen: set[Any] = set()
        for key_node, _ in node.value:
            key = self.construct_object(key_node, deep=True)
            if not isinstance(key, str):
                raise yaml.constructor.ConstructorError(None, None, f"a key must be a word, got {key!r}",
                                                        key_node.start_mark)  # fmt: skip
            if key in seen:
                raise yaml.constructor.ConstructorError(None, None, f"{key!r} is given twice", key_node.start_mark)
            seen.add(key)
        return super().construct_mapping(node, deep)


_Loader.add_implicit_resolver(
    "tag:yaml.org,2002:float",
    re.compile(r"^[-+]?(\.[0-9]+|[0-9]+(\.[0-9]*)?)([eE][-+]?[0-9]+)?$"),
    list("-+0123456789."),
)
# The pattern above also matches whole numbers, which must stay whole: try the integer first.
for _first in "-+0123456789":
    _resolvers = _Loader.yaml_implicit_resolvers[_first]
    _resolvers.sort(key=lambda item: item[0] != "tag:yaml.org,2002:int")


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
    data = _parse(text, str(path))
    if data is None:
        raise UserError(f"{path}: a recipe must hold settings, got an empty file")
    if not isinstance(data, dict):
        raise UserError(f"{path}: a recipe must be a mapping of sections, got a {type(data).__name__}")
    for override in overrides:
        _apply(data, override)
    return recipe_from(data, str(path))


def recipe_from(data: Mapping[str, Any], source: str) -> Recipe:
    """Validate settings that were already read; `source` begins each line of the error."""
    try:
        return Recipe.model_validate(data)
    except ValidationError as error:
        lines = [f"{source}: {_sentence(fault, data)}" for fault in error.errors(include_url=False)]
        raise UserError("\n".join(lines)) from None


def _parse(text: str, source: str) -> Any:
    try:
        return yaml.load(text, Loader=_Loader)  # noqa: S506 - a subclass of SafeLoader
    except yaml.MarkedYAMLError as error:
        where = f"line {error.problem_mark.line + 1}" if error.problem_mark else "the file"
        raise UserError(f"{source}: a recipe must be plain YAML, got in {where}: {error.problem}") from None
    except (yaml.YAMLError, ValueError, RecursionError) as error:
        raise UserError(f"{source}: a recipe must be plain YAML, got: {str(error).splitlines()[0]}") from None


def _apply(data: dict[str, Any], override: str) -> None:
    name, equals, value = override.partition("=")
    if not equals or not name or not all(name.split(".")):
        raise UserError(f"an override must be section.key=value, got {override!r}")
    *sections, key = name.split(".")
    for section in sections:
        inner = data.get(section)
        if isinstance(inner, str) and section == "engine":
            inner = {"type": inner}
        if inner is not None and not isinstance(inner, dict):
            raise UserError(f"{override}: {section} is a value, not a section")
        data[section] = inner = dict(inner or {})
        data = inner
    data[key] = _parse(value, override)


def _sentence(fault: Mapping[str, Any], data: Mapping[str, Any]) -> str:
    """Turn one pydantic fault into: path, what is required, what came."""
    path, kind, context = _path(fault["loc"], data), fault["type"], fault.get("ctx", {})
    if kind == "value_error":
        return str(context["error"]) if not path else f"{path}: {context['error']}"
    if kind == "extra_forbidden":
        section, _, key = path.rpartition(".")
        allowed = sorted(_settings_at(section, data))
        return f"{path} is not a setting{_did_you_mean(key, allowed)}; {section or 'a recipe'} has {', '.join(allowed)}"
    if kind == "missing":
        return f"{path} is required and missing"
    if kind in ("union_tag_invalid", "literal_error"):
        allowed = [tag.strip("'") for tag in re.split(r", | or ", context.get("expected_tags") or context["expected"])]
        came = context.get("tag", fault["input"])
        if kind == "union_tag_invalid":
            path += ".type"
        return f"{path} must be {' or '.join(allowed)}, got {came!r}{_did_you_mean(str(came), allowed)}"
    if kind == "union_tag_not_found":
        return f"{path}.type is required and missing"
    requirement = fault["msg"].removeprefix("Input should be ").removeprefix("Value should be ")
    return f"{path} must be {requirement}, got {_shortened(fault['input'])}"


def _shortened(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= 80 else text[:77] + "..."


def _did_you_mean(word: str, allowed: Sequence[str]) -> str:
    close = difflib.get_close_matches(word, allowed, n=1)
    return f" (did you mean {close[0]}?)" if close else ""


def _path(location: tuple[Any, ...], data: Any) -> str:
    """Join a pydantic location, leaving out the tags of unions, which are no settings."""
    parts = []
    for i, part in enumerate(location):
        inside = isinstance(data, Mapping) and part in data
        if inside or not isinstance(part, str) or i == len(location) - 1:
            parts.append(str(part))
            data = data[part] if inside else None
    return ".".join(parts)


def _settings_at(path: str, data: Any) -> set[str]:
    """Names of the settings of the section at `path`, following the `type` given in `data` through unions."""
    kinds: list[type[BaseModel]] = [Recipe]
    for part in filter(None, path.split(".")):
        annotations = [kind.model_fields[part].annotation for kind in kinds if part in kind.model_fields]
        kinds = [kind for annotation in annotations for kind in _sections_of(annotation)]
        data = data.get(part) if isinstance(data, Mapping) else None
        tag = data.get("type") if isinstance(data, Mapping) else None
        tagged = [k for k in kinds if "type" in k.model_fields and k.model_fields["type"].default == tag]
        kinds = tagged or kinds
    return {name for kind in kinds for name in kind.model_fields}


def _sections_of(annotation: Any) -> list[type[BaseModel]]:
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        return [annotation]
    if typing.get_origin(annotation) in (typing.Union, types.UnionType, typing.Annotated):
        return [kind for inner in typing.get_args(annotation) for kind in _sections_of(inner)]
    return []
