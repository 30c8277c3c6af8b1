"""The list of all settings, so that a new knob shows in review. Well under a second.

`recipe_fields.txt` is written by `python -m tests.unit.test_recipe_fields > tests/unit/recipe_fields.txt`.
"""

import types
import typing
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from pydantic import BaseModel

from orchestrator.recipe import Recipe

LIST = Path(__file__).with_name("recipe_fields.txt")


def settings(section: type[BaseModel], path: str) -> Iterator[str]:
    """Yield one line for each setting: path, type, constraints, default."""
    for name, field in section.model_fields.items():
        inner = list(sections_in(field.annotation))
        for each in inner:
            tag = f"[{each.model_fields['type'].default}]" if len(inner) > 1 else ""
            yield from settings(each, f"{path}{name}{tag}.")
        if not inner:
            default = "required" if field.is_required() else f"= {field.default!r}"
            yield " ".join([f"{path}{name}: {kind(field.annotation)}", *map(str, field.metadata), default])


def kind(annotation: Any) -> str:
    if typing.get_origin(annotation) is typing.Union:
        return " | ".join(map(kind, typing.get_args(annotation)))
    if typing.get_origin(annotation) is typing.Annotated:
        inner, *fields = typing.get_args(annotation)
        return " ".join([kind(inner), *(str(constraint) for field in fields for constraint in field.metadata)])
    return annotation.__name__ if isinstance(annotation, type) else str(annotation).removeprefix("typing.")


def sections_in(annotation: Any) -> Iterator[type[BaseModel]]:
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        yield annotation
    elif typing.get_origin(annotation) in (typing.Union, types.UnionType, typing.Annotated):
        for inner in typing.get_args(annotation):
            yield from sections_in(inner)


def test_the_settings_are_those_of_the_list() -> None:
    assert list(settings(Recipe, "")) == LIST.read_text(encoding="utf-8").splitlines()


if __name__ == "__main__":
    print("\n".join(settings(Recipe, "")))
