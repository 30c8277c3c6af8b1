"""From what pydantic finds wrong with a recipe to sentences: the setting's path, what is required, what came."""

import difflib
import re
import reprlib
import types
import typing
from collections.abc import Iterable, Mapping, Sequence
from itertools import groupby
from typing import Any

from pydantic import BaseModel, ValidationError

_REQUIREMENTS = {
    "int_type": "a whole number",
    "int_from_float": "a whole number",
    "float_type": "a number",
    "finite_number": "a finite number",
    "bool_type": "true or false",
    "string_type": "a string",
    "tuple_type": "a list",
    "model_type": "a section of settings",
    "model_attributes_type": "a section of settings",
    "string_pattern_mismatch": "of the form {pattern}",
    "string_too_short": "a non-empty string",
    "greater_than": "above {gt:g}",
    "greater_than_equal": "at least {ge:g}",
    "less_than": "below {lt:g}",
    "less_than_equal": "at most {le:g}",
    "too_long": "a list of {max_length}",
}
"""What is required where pydantic finds each kind of fault."""

# A recipe's aliases can make a small file a huge value, so only the beginning of a value is ever printed.
_SHORT = reprlib.Repr()
_SHORT.maxstring = _SHORT.maxother = 80
_SHORT.maxlevel = 2


def sentences(error: ValidationError, root: type[BaseModel]) -> list[str]:
    """Return one sentence for each setting that is wrong; `root` is the section that was validated."""
    # Where a setting may be of several kinds, each kind has a fault of its own at the same path.
    by_setting = groupby(error.errors(include_url=False), key=lambda fault: _place(fault["loc"], root)[0])
    return [_sentence(list(faults), root) for _, faults in by_setting]


def did_you_mean(word: str, allowed: Iterable[str]) -> str:
    """Return a hint at the allowed word that comes closest, or nothing."""
    close = difflib.get_close_matches(word, list(allowed), n=1)
    return f" (did you mean {close[0]}?)" if close and close[0] != word else ""


def shown(value: Any) -> str:
    """Return a value for a message, cut to a length that fits one."""
    if value is None or isinstance(value, bool):
        return "null" if value is None else str(value).lower()
    return _SHORT.repr(value)


def _sentence(faults: Sequence[Mapping[str, Any]], root: type[BaseModel]) -> str:
    kind, location, came = faults[0]["type"], faults[0]["loc"], faults[0]["input"]
    path, sections = _place(location, root)
    if kind == "value_error":
        # Our validators' sentences begin with the name of the setting, so only its section is put before them.
        section = path if sections else path.rpartition(".")[0]
        return f"{section}.{faults[0]['ctx']['error']}".removeprefix(".")
    if kind == "extra_forbidden":
        section, inner = _place(location[:-1], root)
        allowed = sorted(name for each in inner for name in each.model_fields)
        hint = did_you_mean(str(location[-1]), allowed)
        return f"{path} is not a setting{hint}; {section or 'a recipe'} has {', '.join(allowed)}"
    if kind == "missing":
        return f"{path} is required and missing"
    tags = [section.model_fields["type"].default for section in sections if "type" in section.model_fields]
    if kind == "union_tag_not_found":
        return f"{path}.type is required and missing; it is {' or '.join(tags)}"
    if kind == "union_tag_invalid":
        came = came["type"]
        return f"{path}.type must be {' or '.join(tags)}, got {shown(came)}{did_you_mean(str(came), tags)}"
    words = [word for fault in faults if fault["type"] == "literal_error" for word in _literals(fault)]
    hint = did_you_mean(came, words) if isinstance(came, str) else ""
    return f"{path or 'a recipe'} must be {' or '.join(map(_required, faults))}, got {shown(came)}{hint}"


def _required(fault: Mapping[str, Any]) -> str:
    if fault["type"] == "literal_error":
        return " or ".join(_literals(fault))
    if fault["type"] in _REQUIREMENTS:
        return _REQUIREMENTS[fault["type"]].format(**fault.get("ctx", {}))
    return str(fault["msg"]).removeprefix("Input should be ")


def _literals(fault: Mapping[str, Any]) -> list[str]:
    return re.split(r", | or ", fault["ctx"]["expected"].replace("'", ""))


def _place(location: Sequence[str | int], root: type[BaseModel]) -> tuple[str, list[type[BaseModel]]]:
    """Return the path that a recipe's writer knows for a pydantic location, and the sections that may stand there.

    A location also holds which member of a union was tried. Of sections, it says which one the rest is about; of plain
    values, it says nothing.
    """
    path: list[str] = []
    sections = [root]
    for part in location:
        if isinstance(part, int):
            path.append(str(part))
        elif len(sections) > 1:
            sections = [section for section in sections if section.model_fields["type"].default == part]
        elif sections:
            path.append(part)
            field = sections[0].model_fields.get(part)
            sections = _sections_in(field.annotation) if field is not None else []
    return ".".join(path), sections


def _sections_in(annotation: Any) -> list[type[BaseModel]]:
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        return [annotation]
    if typing.get_origin(annotation) in (typing.Union, types.UnionType, typing.Annotated):
        return [section for inner in typing.get_args(annotation) for section in _sections_in(inner)]
    return []
