"""From prompt texts to token ids, and which token ends a completion."""

from collections.abc import Sequence
from dataclasses import asdict
from typing import Any

from transformers import AutoConfig, AutoTokenizer

from actors.experience import Prompt
from orchestrator.errors import UserError
from orchestrator.models import compare_settings, compare_vocabularies, model_location
from orchestrator.prompts import PromptText
from orchestrator.recipe import Recipe


class PromptEncoder:
    """The student's tokenizer, applied to prompts."""

    def __init__(self, model: str, *, stop_token: str | None, max_prompt_tokens: int) -> None:
        """Load the tokenizer of `model`, as a recipe names it.

        Raises:
            UserError: if the model cannot be had or has no such stop token.
        """
        self._model, self._max_prompt_tokens = model, max_prompt_tokens
        self._tokenizer = _tokenizer("students.model", model)
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
                f"{prompt.source or prompt.prompt_id}: students.model must have a chat template, since the prompt is a "
                f"chat; {self._model!r} has none"
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
    sizes = [AutoConfig.from_pretrained(model_location(model)).vocab_size for model in models]
    compare_settings("vocab_size", sizes[0], sizes[1], recipe)


def _tokenizer(setting: str, model: str) -> Any:
    try:
        return AutoTokenizer.from_pretrained(model_location(model))
    except (OSError, ValueError) as error:
        raise UserError(f"{setting} must be a model with a tokenizer, got {model!r}: {str(error).splitlines()[0]}") \
            from None
