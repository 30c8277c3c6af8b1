"""The environment of the systems compared with, and how code runs inside it.

TRL and verl pin other libraries than Tutelage does, so they live in an environment of their own, in the user's cache
folder, made at the first use. Torch is the version that this Python has, so that both sides compute with one library.
Of verl only the functions of its losses are of use without a GPU: it is installed without its dependencies, beside the
few libraries that these functions import.
"""

import hashlib
import json
import os
import subprocess
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch

from deploy.environment import TORCH_INDEX, index_options

ROOT = Path(__file__).resolve().parents[2]
CODE = Path(__file__).resolve().parent / "peer_code"
"""Scripts that run in either environment; they import nothing of Tutelage at their top."""
TRL = ("trl==1.16.0", "transformers==5.24.0", "accelerate==1.15.0", "datasets==5.2.0")
VERL = ("verl==0.9.1",)
VERL_IMPORTS = (
    "tensordict==0.15.3", "omegaconf==2.3.1", "codetiming==1.4.0", "orjson==3.13.0", "pillow==13.0.0", "ray==2.60.0",
)  # fmt: skip


def peers_python() -> Path:
    """Return the Python that has TRL and verl; makes its environment at the first call.

    Raises:
        SystemExit: if it cannot be made, with one sentence for the user.
    """
    torch_pin = f"torch=={torch.__version__}"
    wanted = json.dumps([sys.version, torch_pin, TRL, VERL, VERL_IMPORTS])
    cache = Path(os.environ.get("TUTELAGE_CACHE") or Path.home() / ".cache" / "tutelage")
    folder = cache / f"peers-{hashlib.sha256(wanted.encode()).hexdigest()[:8]}"
    python, complete = folder / "bin" / "python", folder / "complete.json"
    if complete.exists():
        return python
    print(f"Making the environment of the peers in {folder}", file=sys.stderr, flush=True)
    _uv("venv", "--clear", "--python", sys.executable, str(folder))
    install = ("pip", "install", "--python", str(python), *index_options())
    if not _uv_succeeds(*install, "--no-deps", torch_pin):
        _uv(*install, "--no-deps", "--index", TORCH_INDEX, torch_pin)
    _uv(*install, torch_pin, *TRL, *VERL_IMPORTS)
    _uv(*install, "--no-deps", *VERL)
    complete.write_text(wanted)
    return python


class Worker:
    """A process of one environment that runs `peer_code/<name>.py` and forks for each thing it is asked.

    Args:
        name: of a script that calls `measuring.serve`.
        modules: what it imports before it forks.
        peer: whether it runs in the peers' environment, which does not see this repository, or in this one.
    """

    def __init__(self, name: str, modules: Sequence[str], *, peer: bool) -> None:
        self._script = CODE / f"{name}.py"
        command = [peers_python() if peer else sys.executable, self._script, *modules]
        self._process = subprocess.Popen(
            command, env=environment(peer=peer), text=True, stdin=subprocess.PIPE, stdout=subprocess.PIPE
        )

    def ask(self, settings: Mapping[str, Any]) -> Any:
        """Return the answer to some settings, both JSON; arrays go through .npz files that the settings name.

        Raises:
            RuntimeError: if the process dies of it; its reason is on stderr.
        """
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        print(json.dumps(settings), file=self._process.stdin, flush=True)
        line = self._process.stdout.readline()
        if not line:
            raise RuntimeError(f"{self._script} must answer {dict(settings)}, got none (its reason is above).")
        return json.loads(line)

    def __enter__(self) -> "Worker":
        return self

    def __exit__(self, *_: object) -> None:
        self._process.communicate()


def environment(*, peer: bool) -> dict[str, str]:
    """Return the variables of a measured process: one thread, off-line, and this repository only where it is ours."""
    pinned = {
        "OMP_NUM_THREADS": "1",
        "MKL_NUM_THREADS": "1",
        "HF_HUB_OFFLINE": "1",
        "TOKENIZERS_PARALLELISM": "false",
        "TRL_EXPERIMENTAL_SILENCE": "1",
    }
    inherited = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    return {**inherited, **pinned} if peer else {**inherited, **pinned, "PYTHONPATH": str(ROOT)}


def save_arrays(path: Path, arrays: Mapping[str, torch.Tensor]) -> None:
    """Write tensors as one .npz file."""
    numpy_arrays: dict[str, Any] = {name: value.detach().numpy() for name, value in arrays.items()}
    np.savez(path, **numpy_arrays)


def load_arrays(path: Path) -> dict[str, torch.Tensor]:
    """Return what `save_arrays` wrote."""
    with np.load(path) as arrays:
        return {name: torch.from_numpy(arrays[name]) for name in arrays.files}


def _uv(*arguments: str) -> None:
    if not _uv_succeeds(*arguments):
        packages = ", ".join(argument for argument in arguments if "==" in argument) or "an empty environment"
        sys.exit(
            f"The environment of the peers needs {packages}, which uv could not make (its reason is above): allow PyPI "
            "or a mirror of it in pip's configuration, or leave this benchmark out."
        )


def _uv_succeeds(*arguments: str) -> bool:
    command = [sys.executable, "-m", "uv", *arguments, "--quiet"]
    return subprocess.run(command, stdout=sys.stderr, check=False).returncode == 0
