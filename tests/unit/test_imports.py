"""Reading a recipe and doing mathematics load none of the heavy libraries, and each of those has its own files."""

import ast
import subprocess
import sys
from fnmatch import fnmatch
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
PACKAGES = ("orchestrator", "learner", "actors", "rewards")

RECIPE_MODULES = ("orchestrator.cli", "orchestrator.recipe", "actors.config", "learner.config", "rewards.config")
MATHEMATICS = ("actors.random_numbers", "actors.trust_region", "learner.advantages", "learner.losses")
REWARDS = tuple(f"rewards.{path.stem}" for path in sorted((ROOT / "rewards").glob("[a-z]*.py")))

HOMES = {"vllm": "actors/engines/vllm_*.py", "deepspeed": "learner/deepspeed_*.py"}
"""The only files that may import each library."""


def loaded_by(*modules: str) -> set[str]:
    """Return the top-level packages that a new interpreter holds after importing the modules."""
    script = f"import sys, {', '.join(modules)}\nprint(*{{name.partition('.')[0] for name in sys.modules}})"
    done = subprocess.run([sys.executable, "-c", script], cwd=ROOT, capture_output=True, text=True, check=True)
    return set(done.stdout.split())


def imported_packages(path: Path) -> set[str]:
    """Return the top-level packages that a file imports anywhere, functions and type checks included."""
    names: set[str] = set()
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            names |= {alias.name.partition(".")[0] for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.level == 0:
            names.add(str(node.module).partition(".")[0])
    return names


def test_reading_a_recipe_loads_no_heavy_library() -> None:
    assert loaded_by(*RECIPE_MODULES) & {"torch", "ray", "vllm", "deepspeed", "transformers"} == set()


def test_the_mathematics_loads_neither_ray_nor_vllm_nor_deepspeed() -> None:
    loaded = loaded_by(*MATHEMATICS)
    assert "torch" in loaded
    assert loaded & {"ray", "vllm", "deepspeed"} == set()


def test_judging_loads_neither_torch_nor_ray_nor_vllm_nor_deepspeed() -> None:
    assert "rewards.countdown" in REWARDS
    assert loaded_by(*REWARDS) & {"torch", "ray", "vllm", "deepspeed"} == set()


def test_the_actor_pools_do_load_ray() -> None:
    """Without this the three tests above could pass because nothing is ever seen as loaded."""
    assert "ray" in loaded_by("actors.pools")


@pytest.mark.parametrize("library", sorted(HOMES))
def test_a_library_is_imported_only_in_its_own_files(library: str) -> None:
    files = [path for package in PACKAGES for path in (ROOT / package).rglob("*.py")]
    importers = {path.relative_to(ROOT).as_posix() for path in files if library in imported_packages(path)}
    assert importers
    assert [name for name in importers if not fnmatch(name, HOMES[library])] == []
