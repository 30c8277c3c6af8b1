"""From prompt texts to token ids, and which token ends a completion."""

import json
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from transformers.utils.hub import cached_file

from actors.experience import Prompt
from actors.tokenizer import load_tokenizer
from orchestrator.errors import UserError
from orchestrator.models import compare_settings, compare_vocabularies, model_location
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
        self.stop_token_id = self._stop_token_id(stop_token)

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


def check_teacher(recipe: Recipe, encoder: PromptEncoder) -> None:
    """Raise a UserError unless the recipe's teacher speaks the student's vocabulary and ends texts as it does."""
    if recipe.teachers is None:
        return
    teacher = _tokenizer("teachers.model", recipe.teachers.model)
    compare_vocabularies(encoder.vocabulary, teacher.get_vocab(), recipe)
    if recipe.rollouts.stop_token is None:
        compare_settings("eos_token_id", encoder.stop_token_id, teacher.eos_token_id, recipe)
    models = (recipe.students.model, recipe.teachers.model)
    sizes = [_vocab_size(model) for model in models]
    compare_settings("vocab_size", sizes[0], sizes[1], recipe)


def _vocab_size(model: str) -> int:
    """The width of the model's logits, which may be more than its tokenizer's tokens."""
    file = cached_file(model_location(model), "config.json")
    return int(json.loads(Path(str(file)).read_text(encoding="utf-8"))["vocab_size"])


def _tokenizer(setting: str, model: str) -> Any:
    try:
        return load_tokenizer(model_location(model))
    except (OSError, ValueError) as error:
        raise UserError(
            f"{setting} must be a model with a tokenizer, got {model!r}: {str(error).splitlines()[0]}"
        ) from None
