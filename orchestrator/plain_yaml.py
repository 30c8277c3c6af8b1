"""YAML as plain data: words, numbers, true, false, null, lists, mappings, none of them easily taken for another.

Scalars are those of YAML 1.2, so `1e-5` is a number, and `on`, `1:30` and `2026-01-01` are words; whole numbers are
decimal and begin with no zero, so `010` and `0x10` are words too, and are refused where a number is required.
"""

import re
from typing import Any, Never

import yaml

from orchestrator.errors import UserError


class _Loader(yaml.SafeLoader):
    def fetch_tag(self) -> Never:
        raise yaml.scanner.ScannerError(None, None, "a tag (`!...`), which plain data has none of", self.get_mark())

    def compose_mapping_node(self, anchor: Any) -> yaml.MappingNode:
        """Refuse keys that are no words or are given twice, and keys without a value: all under it commented out?"""
        node: yaml.MappingNode = super().compose_mapping_node(anchor)
        seen: set[str] = set()
        for key, value in node.value:
            if key.tag not in (_TAG + "str", _TAG + "merge"):
                raise _error(f"a key must be a word, got {key.value if isinstance(key.value, str) else 'more'}", key)
            if key.value in seen:
                raise _error(f"{key.value!r} is given twice", key)
            if value.tag == _TAG + "null" and not value.value:
                raise _error(f"{key.value!r} has no value; write null for none", key)
            seen.add(key.value)
        return node


# YAML 1.1's scalars, which the base class has, would read 010 as 8, 1:30 as 90, `on` as true and 1e-5 as a word.
_Loader.yaml_implicit_resolvers = {}
_TAG = "tag:yaml.org,2002:"
for _name, _pattern, _first in (
    ("null", r"(|~|null|Null|NULL)$", ["", *"~nN"]),
    ("bool", r"(true|True|TRUE|false|False|FALSE)$", [*"tTfF"]),
    ("int", r"[-+]?(0|[1-9][0-9]*)$", [*"-+0123456789"]),
    ("float", r"[-+]?(\.[0-9]+|[0-9]+\.[0-9]*)([eE][-+]?[0-9]+)?$", [*"-+.0123456789"]),
    ("float", r"[-+]?[0-9]+[eE][-+]?[0-9]+$", [*"-+0123456789"]),
    ("float", r"([-+]?\.(inf|Inf|INF)|\.(nan|NaN|NAN))$", [*"-+."]),
    ("merge", r"<<$", ["<"]),
):
    _Loader.add_implicit_resolver(_TAG + _name, re.compile(_pattern), _first)


def parse(text: str, source: str) -> Any:
    """Return the data that `text` holds; None if it holds nothing.

    Raises:
        UserError: if it is not plain YAML; begins with `source` and names the line.
    """
    try:
        return yaml.load(text, Loader=_Loader)
    except yaml.MarkedYAMLError as error:
        where = f"line {error.problem_mark.line + 1}" if error.problem_mark else "it"
        raise UserError(f"{source}: plain YAML is required, got in {where}: {error.problem}") from None
    except RecursionError:
        raise UserError(f"{source}: plain YAML is required, got lists or mappings nested too deeply") from None
    except (yaml.YAMLError, ValueError) as error:
        raise UserError(f"{source}: plain YAML is required, got: {str(error).splitlines()[0]}") from None


def _error(problem: str, node: yaml.Node) -> yaml.MarkedYAMLError:
    return yaml.constructor.ConstructorError(None, None, problem, node.start_mark)
