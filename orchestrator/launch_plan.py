"""What a run says before it starts: how the teacher's signal travels, and what a setting means for another."""

from learner.config import PolicyGradientObjective
from learner.methods import focal_learning_rate_factor, resolved
from orchestrator import teacher_signal
from orchestrator.models import model_config
from orchestrator.recipe import Recipe
from rewards.section import Section


def with_planned_signal(recipe: Recipe) -> tuple[Recipe, list[str]]:
    """Return the recipe with `signal: auto` decided, and a line on the bytes of the teacher's signal.

    Raises:
        UserError: if the signal needs more bytes than the recipe allows.
    """
    section, teachers = recipe.distillation, recipe.teachers
    if section is None or teachers is None:
        return recipe, []
    config = model_config(teachers.model)
    plan = teacher_signal.plan(
        section,
        vocab_size=config["vocab_size"],
        hidden_size=config["hidden_size"],
        hidden_bytes=2 if recipe.engine.dtype == "bfloat16" else 4,
        blend_support_size=recipe.rollouts.support_size,
        engine_type=recipe.engine.type,
    )
    objective = recipe.learner.objective
    decided: Section = section.model_copy(update={"signal": plan.kind})
    if isinstance(objective, PolicyGradientObjective):
        decided = objective.model_copy(update={"distillation": decided})
    learner = recipe.learner.model_copy(update={"objective": decided})
    return recipe.model_copy(update={"learner": learner}), [plan.line]


def hints(recipe: Recipe) -> list[str]:
    """Return what a careful reader of the recipe would want to know."""
    objective = recipe.learner.objective
    if not isinstance(objective, PolicyGradientObjective) or objective.focal_gamma == 0:
        return []
    if resolved(objective).advantage != "grpo":  # whose mean update the factor is of
        return []
    factor = focal_learning_rate_factor(objective.focal_gamma)
    rate = recipe.learner.learning_rate
    return [
        f"focal_gamma {objective.focal_gamma:g} makes the mean update {factor:.3g} times as large; what else it does "
        f"shows against focal_gamma 0 at learner.learning_rate {factor * rate:.3g}"
    ]
