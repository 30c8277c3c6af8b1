"""From prompt texts to token ids, which tokens end a completion, and what vocabulary student and teacher share."""

import json
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from transformers.utils.hub import cached_file

from actors.experience import Prompt
from actors.head import Head
from actors.tokenizer import load_tokenizer
from orchestrator.errors import UserError
from orchestrator.models import compare_vocabularies, model_location
from orchestrator.prompts import PromptText
from orchestrator.recipe import Recipe


class PromptEncoder:
    """The student's tokenizer, applied to prompts."""

    def __init__(
        self, model: str, *, stop_token: str | None, max_prompt_tokens: int, setting: str = "students.model"
    ) -> None:
        """Load the tokenizer of `model`, as a recipe names it; `setting` is how an error names it.

        Raises:
            UserError: if the model cannot be had or has no such stop token.
        """
        self._model, self._setting, self._max_prompt_tokens = model, setting, max_prompt_tokens
        self._tokenizer = _tokenizer(setting, model)
        first = self._stop_token_id(stop_token)
        others = [token_id for token_id in _ends_of_text(model, self._tokenizer) if token_id != first]
        self.stop_token_ids = (first, *others)
        """The token that ends a completion, and what else the model ends texts with, which counts as it."""

    @property
    def vocabulary(self) -> dict[str, int]:
        """Every token and its id."""
        return dict(self._tokenizer.get_vocab())

    def encode(self, prompts: Sequence[PromptText]) -> list[Prompt]:
        """Return the prompts with their token ids.

        Raises:
            UserError: for a prompt longer than the recipe allows, or a chat where the tokenizer has no template.
        """
        return [self._encode(prompt) for prompt in prompts]

    def _encode(self, prompt: PromptText) -> Prompt:
        text = self._render(prompt)
        ids = self._tokenizer(text, add_special_tokens=not prompt.messages)["input_ids"]
        if not 1 <= len(ids) <= self._max_prompt_tokens:
            raise UserError(
                f"{prompt.source or prompt.prompt_id}: a prompt must have 1 to rollouts.max_prompt_tokens = "
                f"{self._max_prompt_tokens} tokens, got {len(ids)}"
            )
        return Prompt(
            prompt_id=prompt.prompt_id,
            text=text,
            token_ids=tuple(ids),
            task=prompt.task,
            reference=prompt.reference,
        )

    def _render(self, prompt: PromptText) -> str:
        if not prompt.messages:
            return prompt.text
        if self._tokenizer.chat_template is None:
            raise UserError(
                f"{prompt.source or prompt.prompt_id}: {self._setting} must have a chat template, since the prompt is "
                f"a chat; {self._model!r} has none"
            )
        messages = [asdict(message) for message in prompt.messages]
        return str(self._tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True))

    def _stop_token_id(self, wanted: str | None) -> int:
        token_id = self._tokenizer.eos_token_id if wanted is None else self.vocabulary.get(wanted)
        if token_id is None:
            came = "none, and its tokenizer names no end-of-text token" if wanted is None else repr(wanted)
            raise UserError(f"rollouts.stop_token must be a token of {self._model!r}, got {came}")
        return int(token_id)


def shared_head(recipe: Recipe, encoder: PromptEncoder) -> Head:
    """Return how student and teacher are read as laws over one vocabulary with one stop event.

    The student's stop token is the one emitted. Where there is a teacher, the end-of-text tokens of both models count
    as it, and ids beyond the narrower of both models' heads are padding that neither draws.

    Raises:
        UserError: unless the teacher's tokenizer gives every token the student's id.
    """
    stops, temperature = list(encoder.stop_token_ids), recipe.rollouts.temperature
    if recipe.teachers is None:
        return Head(stop_token_ids=tuple(stops), temperature=temperature)
    teacher = _tokenizer("teachers.model", recipe.teachers.model)
    widths = [_vocab_size(model) for model in (recipe.students.model, recipe.teachers.model)]
    compare_vocabularies(encoder.vocabulary, teacher.get_vocab(), recipe)
    stops += [token_id for token_id in _ends_of_text(recipe.teachers.model, teacher) if token_id not in stops]
    return Head(
        stop_token_ids=tuple(token_id for token_id in stops if token_id < min(widths)),
        vocab_size=None if widths[0] == widths[1] else min(widths),
        temperature=temperature,
    )


def _ends_of_text(model: str, tokenizer: Any) -> list[int]:
    """Return the tokens that a model ends texts with, by its tokenizer and its generation settings."""
    named = _json_of(model, "generation_config.json").get("eos_token_id")
    ids = [tokenizer.eos_token_id, *(named if isinstance(named, list) else [named])]
    return list(dict.fromkeys(int(token_id) for token_id in ids if token_id is not None))


def _vocab_size(model: str) -> int:
    """The width of the model's logits, which may be more than its tokenizer's tokens."""
    config = _json_of(model, "config.json")
    size = config.get("vocab_size") or config.get("text_config", {}).get("vocab_size")
    if not isinstance(size, int):
        raise UserError(f"{model}: its config.json must have a vocab_size, got {size!r}")
    return size


def _json_of(model: str, name: str) -> dict[str, Any]:
    """Read one of a model's JSON files; empty where there is none."""
    file = cached_file(model_location(model), name, _raise_exceptions_for_missing_entries=False)
    return {} if file is None else dict(json.loads(Path(str(file)).read_text(encoding="utf-8")))


def _tokenizer(setting: str, model: str) -> Any:
    try:
        return load_tokenizer(model_location(model))
    except (OSError, ValueError) as error:
        raise UserError(
            f"{setting} must be a model with a tokenizer, got {model!r}: {str(error).splitlines()[0]}"
        ) from None
