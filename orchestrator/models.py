"""Where a recipe's models come from, and what can be said of them without loading them."""

import json
import os
import re
from pathlib import Path
from typing import Any

from actors.config import RolloutsSection
from learner.tiny_models import TINY_MODELS, make_tiny_models, tiny_folder
from orchestrator.errors import RunError, UserError
from orchestrator.faults import did_you_mean
from orchestrator.recipe import Recipe


def check_models(recipe: Recipe) -> list[str]:
    """Check that the recipe's models exist and speak one vocabulary; return a line on each for the user.

    Models on the Hub, and tiny ones that are not made yet, are taken on trust until the run starts.

    Raises:
        UserError: if a folder is missing or incomplete, a tiny name is unknown, or student and teacher differ in
            their vocabularies.
    """
    lines = [f"students.model: {check_model('students.model', recipe.students.model)}"]
    if recipe.teachers is not None:
        lines.append(f"teachers.model: {check_model('teachers.model', recipe.teachers.model)}")
        _check_same_vocabulary(recipe)
    for pool in (recipe.students, recipe.teachers):
        if recipe.engine.type == "vllm" and pool is not None:
            _check_length(pool.model, recipe.rollouts)
    folder, stop_token = _local_folder(recipe.students.model), recipe.rollouts.stop_token
    if folder is not None and stop_token is not None and stop_token not in _vocabulary(folder):
        raise UserError(f"rollouts.stop_token must be a token of {recipe.students.model!r}, got {stop_token!r}")
    return lines


def make_models(*models: str) -> None:
    """Make those of the models that are tiny ones and not made yet, side by side; look for those on the Hub.

    Raises:
        UserError: if the Hub does not have or give one, or cannot be asked.
        RunError: if one could not be made.
    """
    for name in (model.removeprefix("hub:") for model in models if model.startswith("hub:")):
        from huggingface_hub import hf_hub_download

        try:
            hf_hub_download(name, "config.json")
        except (OSError, ValueError) as error:
            reason = str(error).strip().splitlines()[0]
            raise UserError(f"hub:{name} must be a model that the Hugging Face Hub gives, got: {reason}") from None
    try:
        make_tiny_models(model.removeprefix("tiny:") for model in models if model.startswith("tiny:"))
    except (RuntimeError, OSError) as error:
        raise RunError(str(error)) from None


def model_location(model: str) -> str:
    """Return what `from_pretrained` takes for a recipe's model: a folder, or a name on the Hub."""
    if model.startswith("tiny:"):
        return str(tiny_folder(model.removeprefix("tiny:")))
    if model.startswith("hub:"):
        return model.removeprefix("hub:")
    return str(Path(model).absolute())


def has_config(model: str) -> bool:
    """Whether `model_config` can be asked without a network."""
    return _local_folder(model) is not None


def model_config(model: str) -> dict[str, Any]:
    """Return a model's `config.json`, that of its language part where it has several; the model must be there.

    Raises:
        UserError: if it does not say how large its vocabulary and hidden states are.
    """
    if model.startswith("hub:"):
        from huggingface_hub import hf_hub_download

        file = Path(hf_hub_download(model.removeprefix("hub:"), "config.json"))
    else:
        file = Path(model_location(model)) / "config.json"
    config = _read_json(file)
    config = config.get("text_config", config)
    sizes = {"vocab_size": config.get("vocab_size"), "hidden_size": config.get("hidden_size", config.get("n_embd"))}
    for name, size in sizes.items():
        if not isinstance(size, int):
            raise UserError(f"{file}: must say {name} as a whole number, got {size!r}")
    return {**config, **sizes}


def located(recipe: Recipe) -> Recipe:
    """Return the recipe with its models named by what `from_pretrained` takes, for processes with another home."""
    pools = {"students": recipe.students, "teachers": recipe.teachers}
    update = {
        name: pool.model_copy(update={"model": model_location(pool.model)})
        for name, pool in pools.items()
        if pool is not None and not pool.model.startswith("hub:")
    }
    return recipe.model_copy(update=update)


def check_model(setting: str, model: str) -> str:
    """Check one model and return a line on it; `setting` is how an error names it."""
    if model.startswith("tiny:"):
        name = model.removeprefix("tiny:")
        if name not in TINY_MODELS:
            known = [f"tiny:{each}" for each in TINY_MODELS]
            raise UserError(f"{setting} must be {' or '.join(known)}, got {model!r}{did_you_mean(model, known)}")
        made = (tiny_folder(name) / "config.json").exists()
        return f"{model}, {'in' if made else 'will be made in'} {tiny_folder(name)}"
    if model.startswith("hub:"):
        if not re.fullmatch(r"hub:[\w.-]+(/[\w.-]+)?", model, re.ASCII):
            raise UserError(f"{setting} must be hub:OWNER/NAME for a model on the Hugging Face Hub, got {model!r}")
        return f"{model.removeprefix('hub:')} on the Hugging Face Hub, looked for when the run starts"
    folder = Path(model)
    if not os.path.isdir(folder):  # also False for what can be no path at all
        raise UserError(
            f"{setting} must be an existing Hugging Face folder, got {model!r}; "
            "for a model on the Hub write hub:NAME, for a built-in small one tiny:NAME"
        )
    for name in ("config.json", "tokenizer.json"):
        if not (folder / name).is_file():
            inner = folder / "model"
            hint = f" (did you mean {inner}?)" if (inner / name).is_file() else ""
            raise UserError(f"{setting} must be a Hugging Face folder with a {name}, got {model!r} without one{hint}")
        _read_json(folder / name)
    if not any(file.suffix in (".safetensors", ".bin") for file in folder.iterdir()):
        raise UserError(f"{setting} must be a Hugging Face folder with weights (.safetensors), got {model!r} without")
    return str(folder.absolute())


def _check_same_vocabulary(recipe: Recipe) -> None:
    """Every token must mean the same to both, or their log-probs cannot be compared."""
    assert recipe.teachers is not None
    student, teacher = recipe.students.model, recipe.teachers.model
    ours, theirs = _local_folder(student), _local_folder(teacher)
    if ours is None or theirs is None:
        return
    compare_vocabularies(_vocabulary(ours), _vocabulary(theirs), recipe)
    for folder in (ours, theirs):
        _read_json(folder / "config.json")


def _check_length(model: str, rollouts: RolloutsSection) -> None:
    """The vLLM engine refuses sequences longer than a model has positions for, unless they are scaled."""
    folder = _local_folder(model)
    config = _read_json(folder / "config.json") if folder is not None else {}
    limit, scaling = config.get("max_position_embeddings"), config.get("rope_parameters") or config.get("rope_scaling")
    is_scaled = isinstance(scaling, dict) and scaling.get("rope_type", "default") != "default"
    longest = rollouts.max_prompt_tokens + rollouts.max_new_tokens
    if isinstance(limit, int) and not is_scaled and longest > limit:
        raise UserError(
            f"rollouts.max_prompt_tokens + rollouts.max_new_tokens must be at most {limit}, the positions of "
            f"{model!r}, for engine vllm; got {longest}"
        )


def compare_vocabularies(ours: dict[str, int], theirs: dict[str, int], recipe: Recipe) -> None:
    """Raise a UserError unless student and teacher give every token the same id."""
    assert recipe.teachers is not None
    differing = sorted(token for token in ours.keys() | theirs.keys() if ours.get(token) != theirs.get(token))
    if differing:
        raise UserError(
            f"teachers.model must have the student's vocabulary, token for token; {len(differing)} tokens differ, "
            f"for example {differing[0]!r} (students.model {recipe.students.model!r} has {len(ours)} tokens, "
            f"teachers.model {recipe.teachers.model!r} has {len(theirs)})"
        )


def _local_folder(model: str) -> Path | None:
    if model.startswith("hub:"):
        return None
    folder = Path(model_location(model))
    return folder if (folder / "config.json").exists() else None


def _vocabulary(folder: Path) -> dict[str, int]:
    file = folder / "tokenizer.json"
    tokenizer = _read_json(file)
    try:
        inner = tokenizer["model"]["vocab"]
        vocabulary = dict(inner) if isinstance(inner, dict) else {token: i for i, (token, *_) in enumerate(inner)}
        return vocabulary | {token["content"]: token["id"] for token in tokenizer.get("added_tokens", [])}
    except (KeyError, TypeError, ValueError):
        raise UserError(
            f"{file}: must be the tokenizer of a Hugging Face folder, got one without a vocabulary"
        ) from None


def _read_json(file: Path) -> Any:
    try:
        data = json.loads(file.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        raise UserError(f"{file}: must be a readable JSON file of a Hugging Face folder, got: {error}") from None
    if not isinstance(data, dict):
        raise UserError(f"{file}: must hold a JSON object, got {type(data).__name__}")
    return data
