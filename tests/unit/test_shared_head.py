"""How two models are read as laws over one vocabulary with one stop event. About 2 s."""

import json
from pathlib import Path
from typing import Any

import pytest

from orchestrator.errors import UserError
from orchestrator.recipe import Recipe, load_recipe
from orchestrator.tokenization import PromptEncoder, shared_head
from tests.exact_laws import STOP, VOCABULARY, make_model
from tests.unit.test_models import RECIPE


@pytest.fixture
def recipe(tmp_path: Path) -> Recipe:
    for name in ("student", "teacher"):
        make_model(tmp_path / name, seed=1, hidden_size=32, tied=True, scale=0.2)
    path = tmp_path / "recipe.yaml"
    path.write_text(RECIPE, encoding="utf-8")
    return load_recipe(path, [f"{name}s.model={tmp_path / name}" for name in ("student", "teacher")])


def change(recipe: Recipe, pool: str, file: str, **settings: Any) -> None:
    path = Path(getattr(recipe, pool).model) / file
    path.write_text(json.dumps(json.loads(path.read_text()) | settings), encoding="utf-8")


def encoder(recipe: Recipe, stop_token: str | None = None) -> PromptEncoder:
    return PromptEncoder(recipe.students.model, stop_token=stop_token, max_prompt_tokens=8)


def test_models_of_one_kind_are_read_as_they_are(recipe: Recipe) -> None:
    head = shared_head(recipe, encoder(recipe))
    assert head.stop_token_ids == (STOP,)
    assert head.vocab_size is None


def test_a_teacher_that_ends_texts_otherwise_is_merged_and_the_students_token_is_emitted(recipe: Recipe) -> None:
    change(recipe, "teachers", "generation_config.json", eos_token_id=[5, 6])
    assert shared_head(recipe, encoder(recipe)).stop_token_ids == (STOP, 5, 6)
    change(recipe, "students", "generation_config.json", eos_token_id=[7])
    assert shared_head(recipe, encoder(recipe)).stop_token_ids == (STOP, 7, 5, 6)
    named = shared_head(recipe, encoder(recipe, stop_token="a"))
    assert named.stop_token_ids[0] == named.stop_token_id == 4
    assert set(named.stop_token_ids) == {4, STOP, 7, 5, 6}


def test_the_wider_head_is_cut_to_the_narrower(recipe: Recipe) -> None:
    change(recipe, "teachers", "config.json", vocab_size=128)
    assert shared_head(recipe, encoder(recipe)).vocab_size == VOCABULARY


def test_tokenizers_that_differ_are_refused_with_a_token_that_does(recipe: Recipe) -> None:
    assert recipe.teachers is not None
    path = Path(recipe.teachers.model) / "tokenizer.json"
    path.write_text(path.read_text().replace('"a": 4', '"z": 4'), encoding="utf-8")
    with pytest.raises(
        UserError, match=r"must have the student's vocabulary, token for token; 2 tokens differ, for ex"
    ):
        shared_head(recipe, encoder(recipe))


def test_a_model_that_does_not_say_how_wide_it_is_is_refused(recipe: Recipe) -> None:
    change(recipe, "teachers", "config.json", vocab_size=None)
    with pytest.raises(UserError, match=r"its config.json must have a vocab_size, got None"):
        shared_head(recipe, encoder(recipe))
