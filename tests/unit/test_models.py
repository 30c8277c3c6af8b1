"""What is said of a recipe's models before anything is loaded. About 1 s.

The folders are real ones as far as they go: a tokenizer that `tokenizers` wrote, a configuration, a weights file.
"""

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from safetensors.numpy import save_file
from tokenizers import Tokenizer, models

from orchestrator.errors import UserError
from orchestrator.models import check_models
from orchestrator.recipe import Recipe, load_recipe

WORDS = ("<eos>", "a", "b", "c")
RECIPE = """
name: test
students: {model: tiny:addition-student}
teachers: {model: tiny:addition-teacher}
data: {type: addition}
learner: {}
training: {num_steps: 3}
"""


def model(folder: Path, words: Sequence[str] = WORDS, added: Sequence[str] = (), **config: Any) -> str:
    """Write a model's folder and return its path."""
    folder.mkdir()
    tokenizer = Tokenizer(models.WordLevel({word: i for i, word in enumerate(words)}, unk_token="<eos>"))
    tokenizer.add_special_tokens(list(added))
    tokenizer.save(str(folder / "tokenizer.json"))
    defaults = {"vocab_size": len(words), "eos_token_id": 0, "model_type": "qwen3"}
    (folder / "config.json").write_text(json.dumps(defaults | config), encoding="utf-8")
    save_file({"embedding": np.zeros((len(words), 2), np.float32)}, folder / "model.safetensors")
    return str(folder)


@pytest.fixture
def student(tmp_path: Path) -> str:
    return model(tmp_path / "student")


def recipe(folder: Path, *overrides: str) -> Recipe:
    path = folder / "recipe.yaml"
    path.write_text(RECIPE, encoding="utf-8")
    return load_recipe(path, overrides)


def complaint(folder: Path, *overrides: str) -> str:
    with pytest.raises(UserError) as caught:
        check_models(recipe(folder, *overrides))
    said = str(caught.value)
    assert "\n" not in said
    return said


def test_two_models_of_one_vocabulary_go_together(tmp_path: Path, student: str) -> None:
    teacher = model(tmp_path / "teacher")
    lines = check_models(recipe(tmp_path, f"students.model={student}", f"teachers.model={teacher}"))
    assert lines == [f"students.model: {student}", f"teachers.model: {teacher}"]


@pytest.mark.parametrize(
    ("words", "added", "said"),
    [
        (("<eos>", "a", "b"), (), "1 tokens differ, for example 'c'"),
        (("<eos>", "a", "c", "b"), (), "2 tokens differ, for example 'b'"),
        (("<eos>", "a", "b", "d"), (), "2 tokens differ, for example 'c'"),
        (WORDS, ("<think>",), "1 tokens differ, for example '<think>'"),
    ],
)
def test_a_teacher_of_another_vocabulary_is_refused(
    tmp_path: Path, student: str, words: tuple[str, ...], added: tuple[str, ...], said: str
) -> None:
    teacher = model(tmp_path / "teacher", words, added)
    complained = complaint(tmp_path, f"students.model={student}", f"teachers.model={teacher}")
    assert complained.startswith("teachers.model must have the student's vocabulary, token for token; " + said)


def test_heads_of_other_widths_and_other_ends_of_text_go_together(tmp_path: Path, student: str) -> None:
    teacher = model(tmp_path / "teacher", vocab_size=128, eos_token_id=1)
    assert len(check_models(recipe(tmp_path, f"students.model={student}", f"teachers.model={teacher}"))) == 2


def test_a_stop_token_must_be_a_token(tmp_path: Path, student: str) -> None:
    both = (f"students.model={student}", f"teachers.model={student}")
    assert complaint(tmp_path, *both, "rollouts.stop_token=zzz") == (
        f"rollouts.stop_token must be a token of {student!r}, got 'zzz'"
    )


def test_vllm_needs_a_position_for_every_token(tmp_path: Path, student: str) -> None:
    short = model(tmp_path / "short", max_position_embeddings=64)
    scaled = model(tmp_path / "scaled", max_position_embeddings=64, rope_parameters={"rope_type": "yarn", "factor": 32})
    lengths = ("rollouts.max_prompt_tokens=60", "rollouts.max_new_tokens=5")
    for engine, teacher in (("torch", short), ("vllm", student), ("vllm", scaled)):
        both = (f"students.model={student}", f"teachers.model={teacher}", f"engine={engine}")
        assert len(check_models(recipe(tmp_path, *both, *lengths))) == 2
    both = (f"students.model={student}", f"teachers.model={short}", "engine=vllm")
    assert complaint(tmp_path, *both, *lengths) == (
        "rollouts.max_prompt_tokens + rollouts.max_new_tokens must be at most 64, the positions of "
        f"{short!r}, for engine vllm; got 65"
    )


@pytest.mark.parametrize("path", ["/nowhere/at/all", "models/student", "models/teacher/", "a\0b", "Qwen/Qwen3-8B"])
def test_a_missing_folder_is_refused_with_what_else_a_model_may_be(tmp_path: Path, path: str) -> None:
    assert complaint(tmp_path, f"students.model={json.dumps(path)}") == (
        f"students.model must be an existing Hugging Face folder, got {path!r}; "
        "for a model on the Hub write hub:NAME, for a built-in small one tiny:NAME"
    )


@pytest.mark.parametrize("file", ["config.json", "tokenizer.json"])
def test_an_incomplete_folder_is_refused(tmp_path: Path, student: str, file: str) -> None:
    (Path(student) / file).unlink()
    assert complaint(tmp_path, f"students.model={student}") == (
        f"students.model must be a Hugging Face folder with a {file}, got {student!r} without one"
    )


def test_a_folder_without_weights_is_refused(tmp_path: Path, student: str) -> None:
    (Path(student) / "model.safetensors").unlink()
    assert "students.model must be a Hugging Face folder with weights" in complaint(
        tmp_path, f"students.model={student}"
    )


def test_the_folder_of_a_checkpoint_leads_to_the_model_in_it(tmp_path: Path) -> None:
    checkpoint = tmp_path / "step_000050"
    checkpoint.mkdir()
    inner = model(checkpoint / "model")
    assert f"(did you mean {inner}?)" in complaint(tmp_path, f"students.model={checkpoint}")


@pytest.mark.parametrize("content", [b"{", b"[1]", b"\xff\xfe", b"[" * 100_000, b'"x"'])
@pytest.mark.parametrize("file", ["config.json", "tokenizer.json"])
def test_a_folder_with_a_broken_file_is_refused_by_the_file(
    tmp_path: Path, student: str, file: str, content: bytes
) -> None:
    (Path(student) / file).write_bytes(content)
    assert complaint(tmp_path, f"teachers.model={student}").startswith(f"{student}/{file}: must ")


@pytest.mark.parametrize(
    "content", ["{}", '{"model": null}', '{"model": {"vocab": 3}}', '{"model": {"vocab": {}}, "added_tokens": [3]}']
)
def test_a_tokenizer_without_a_vocabulary_is_refused(tmp_path: Path, student: str, content: str) -> None:
    (Path(student) / "tokenizer.json").write_text(content, encoding="utf-8")
    both = (f"students.model={student}", f"teachers.model={student}")
    assert "must be the tokenizer of a Hugging Face folder" in complaint(tmp_path, *both)


@pytest.mark.parametrize(
    ("name", "said"),
    [
        ("tiny:adition-student", "got 'tiny:adition-student' (did you mean tiny:addition-student?)"),
        ("tiny:addition-teachr", "(did you mean tiny:addition-teacher?)"),
        ("'tiny:'", "must be tiny:addition-teacher or tiny:addition-student or tiny:countdown-student, got 'tiny:'"),
        ("'hub:'", "students.model must be hub:OWNER/NAME for a model on the Hugging Face Hub, got 'hub:'"),
        ("hub:../x/y", "students.model must be hub:OWNER/NAME"),
    ],
)
def test_a_misspelt_model_is_refused(tmp_path: Path, name: str, said: str) -> None:
    assert said in complaint(tmp_path, f"students.model={name}")


def test_models_that_are_not_here_yet_are_taken_on_trust(tmp_path: Path) -> None:
    lines = check_models(
        recipe(tmp_path, "students.model=hub:Qwen/Qwen3-1.7B-Base", "teachers.model=hub:Qwen/Qwen3-8B")
    )
    assert lines[0] == "students.model: Qwen/Qwen3-1.7B-Base on the Hugging Face Hub, looked for when the run starts"
    assert len(check_models(recipe(tmp_path))) == 2
