"""One whole training step, ours against TRL's: `python -m tests.benchmarks.step [--json] [--system tutelage|trl|all]`.

Rollout, grading, loss and update of 32 completions of exactly 64 tokens: the weights are such that the token that ends
a text is never drawn. Student and teacher are the same random Qwen3 models on both sides, as are prompts, float32, the
micro-batch of 32 and one thread a process. `cpu_s_per_step` is user and system time of the whole tree of processes
(Ray's daemons and our actors among them) from the end of step 2 to the end of the last, over the steps between;
`peak_mib` is the largest sum of their proportional set sizes (PSS), read every second, so that shared memory
counts once.
"""

import argparse
import json
import os
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from contextlib import redirect_stdout
from pathlib import Path
from typing import Any

import yaml

from tests.benchmarks.peers import CODE, environment, peers_python

VOCABS = (4_096, 32_768)
METHODS = {"grpo": 8, "distillation": 1}
"""Method -> completions of each prompt."""
ROLLOUTS_PER_STEP = 32
NEW_TOKENS = 64
NUM_STEPS = 10
FIRST_STEPS = 2
"""Not measured."""
RAY = {"RAY_ADDRESS": "", "RAY_worker_niceness": "0", "RAY_AUTH_MODE": "disabled"}
"""A local cluster, whose actors do not stand back behind other work."""
POLL_S = 0.05
MEMORY_EVERY_S = 1.0
CHARACTERS = ("<pad>", "<bos>", *"0123456789+:#")
STUDENT = {"hidden_size": 128, "num_hidden_layers": 4}
TEACHER = {"hidden_size": 256, "num_hidden_layers": 6}
COLUMNS = ("system", "method", "V", "cpu_s_per_step", "peak_mib")


def make_model(folder: Path, vocab: int, *, hidden_size: int, num_hidden_layers: int, seed: int) -> str:
    """Save a random Qwen3 with a character tokenizer of `vocab` tokens, the last of which, `<eos>`, is never drawn."""
    import torch
    from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers
    from transformers import GenerationConfig, PreTrainedTokenizerFast, Qwen3Config, Qwen3ForCausalLM

    names = [*CHARACTERS, *(f"<{i}>" for i in range(len(CHARACTERS), vocab - 1)), "<eos>"]
    tokenizer = Tokenizer(models.WordLevel({name: i for i, name in enumerate(names)}, unk_token="<pad>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Split(Regex(r"[\s\S]"), "isolated")
    tokenizer.decoder = decoders.Fuse()
    PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, bos_token="<bos>", eos_token="<eos>", pad_token="<pad>", padding_side="left"
    ).save_pretrained(folder)
    torch.manual_seed(seed)
    model = Qwen3ForCausalLM(
        Qwen3Config(
            vocab_size=vocab, hidden_size=hidden_size, intermediate_size=3 * hidden_size,
            num_hidden_layers=num_hidden_layers, num_attention_heads=4, num_key_value_heads=2, head_dim=32,
            max_position_embeddings=128, tie_word_embeddings=False,
            pad_token_id=0, bos_token_id=1, eos_token_id=vocab - 1,
        )
    )  # fmt: skip
    with torch.no_grad():
        # The first coordinate of every hidden state is large and positive, and its product with this row below -50.
        model.model.embed_tokens.weight[:, 0] = 1.0
        model.lm_head.weight[-1] = 0.0
        model.lm_head.weight[-1, 0] = -10.0
    model.generation_config = GenerationConfig(pad_token_id=0, bos_token_id=1, eos_token_id=vocab - 1)
    model.save_pretrained(folder)
    return str(folder)


def prompts(num_prompts: int) -> list[dict[str, str]]:
    """Return sums of two three-digit numbers, all different."""
    pairs = [(100 + 7 * i % 900, 101 + 11 * i % 899) for i in range(num_prompts)]
    return [{"prompt": f"{a}+{b}:", "reference": str(a + b)} for a, b in pairs]


def trl_command(method: str, group_size: int, student: str, teacher: str, folder: Path) -> list[str]:
    """Write the settings of TRL's run, and return how it is started."""
    settings = {
        "method": method, "student": student, "teacher": teacher, "group_size": group_size,
        "rollouts_per_step": ROLLOUTS_PER_STEP, "num_steps": NUM_STEPS, "new_tokens": NEW_TOKENS,
        "prompts": prompts(NUM_STEPS * ROLLOUTS_PER_STEP // group_size),
    }  # fmt: skip
    (folder / "settings.json").write_text(json.dumps(settings))
    return [str(peers_python()), str(CODE / "training.py"), str(folder)]


def tutelage_command(method: str, group_size: int, student: str, teacher: str, folder: Path) -> list[str]:
    """Write a recipe and its prompts, and return how it is trained."""
    rows = prompts(NUM_STEPS * ROLLOUTS_PER_STEP // group_size)
    (folder / "prompts.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    distils = method == "distillation"
    objective: dict[str, Any] = {"type": "distillation", "divergence": "reverse_kl", "signal": "hidden"}
    if not distils:
        objective = {"type": "policy_gradient", "method": "dapo", "focal_gamma": 0.0}
    recipe = {
        "name": method,
        "students": {"model": student},
        "engine": "torch",
        "data": {"type": "file", "path": str(folder / "prompts.jsonl"), "task": "addition", "shuffle": False},
        "rollouts": {
            "prompts_per_step": ROLLOUTS_PER_STEP // group_size, "group_size": group_size,
            "max_prompt_tokens": 16, "max_new_tokens": NEW_TOKENS, "support_size": 0,
        },
        "learner": {"objective": objective, "micro_batch_size": ROLLOUTS_PER_STEP, "learning_rate": 1e-5},
        "training": {"num_steps": NUM_STEPS, "folder": str(folder / "runs")},
        "evaluation": {"num_prompts": 0},
        "checkpoints": {"every_steps": 0},
        "cluster": {"num_cpus": 4, "object_store_gib": 0.25, "dashboard": False},
        **({"teachers": {"model": teacher}} if distils else {}),
    }  # fmt: skip
    (folder / "recipe.yaml").write_text(yaml.safe_dump(recipe))
    return [sys.executable, "-m", "orchestrator.cli", "train", str(folder / "recipe.yaml")]


def measure(command: Sequence[str], *, peer: bool, folder: Path) -> dict[str, float]:
    """Run a training and return its CPU seconds per step and its peak memory in MiB."""
    ticks = os.sysconf("SC_CLK_TCK")
    ends: list[float] = []
    peak = read_memory = 0.0
    with (folder / "log.txt").open("w") as log:
        run = subprocess.Popen(command, env={**environment(peer=peer), **RAY}, cwd=folder, stdout=log, stderr=log)
        try:
            while run.poll() is None and len(ends) < NUM_STEPS:
                time.sleep(POLL_S)
                if num_steps(folder) > len(ends):
                    ends.append(sum(map(cpu_ticks, tree(run.pid))) / ticks)
                if time.monotonic() - read_memory > MEMORY_EVERY_S:
                    peak, read_memory = max(peak, sum(map(pss_mib, tree(run.pid)))), time.monotonic()
            run.wait(timeout=300)
        finally:
            if run.poll() is None:
                run.send_signal(signal.SIGINT)
                run.wait()
    if run.returncode or len(ends) < NUM_STEPS or set(lengths(folder)) != {NEW_TOKENS}:
        raise RuntimeError(
            f"{command[0]} must take {NUM_STEPS} steps of {NEW_TOKENS} tokens a completion and exit with 0, got "
            f"{len(ends)} steps of {lengths(folder)} and {run.returncode}: {(folder / 'log.txt').read_text()[-3000:]}"
        )
    return {"cpu_s_per_step": (ends[-1] - ends[FIRST_STEPS - 1]) / (NUM_STEPS - FIRST_STEPS), "peak_mib": peak}


def num_steps(folder: Path) -> int:
    """Return how many steps are over: lines of TRL's steps.txt or of our metrics.jsonl."""
    files = [folder / "steps.txt", *folder.glob("runs/*/metrics.jsonl")]
    return sum(file.read_text().count("\n") for file in files if file.exists())


def lengths(folder: Path) -> list[float]:
    """Return the mean length of the completions of each step, from TRL's log or our metrics."""
    if (folder / "result.json").exists():
        return list(json.loads((folder / "result.json").read_text())["mean_lengths"])
    lines = [line for file in folder.glob("runs/*/metrics.jsonl") for line in file.read_text().splitlines()]
    return [json.loads(line)["rollout/length"] for line in lines]


def tree(root: int) -> list[int]:
    """Return a process and all that descend from it."""
    children: dict[int, list[int]] = {}
    for entry in Path("/proc").iterdir():
        if entry.name.isdigit() and (fields := stat(int(entry.name))):
            children.setdefault(int(fields[1]), []).append(int(entry.name))
    found = [root]
    for process in found:
        found += children.get(process, [])
    return found


def stat(process: int) -> list[str]:
    """Return what /proc/PID/stat says after the name, from the state on; nothing if the process is gone."""
    try:
        return Path(f"/proc/{process}/stat").read_text().rpartition(")")[2].split()
    except OSError:
        return []


def cpu_ticks(process: int) -> int:
    """Return user and system time, with that of children that have ended."""
    return sum(map(int, stat(process)[11:15]))


def pss_mib(process: int) -> float:
    """Return the proportional set size."""
    try:
        lines = Path(f"/proc/{process}/smaps_rollup").read_text().splitlines()
    except OSError:
        return 0.0
    return sum(int(line.split()[1]) for line in lines if line.startswith("Pss:")) / 1024


def as_table(rows: Sequence[dict[str, Any]]) -> str:
    """Return a Markdown table."""
    lines = ["| " + " | ".join(COLUMNS) + " |", "|" + " --- |" * len(COLUMNS)]
    for r in rows:
        figures = (f"{r['V']:,}", f"{r['cpu_s_per_step']:.2f}", f"{r['peak_mib']:,.0f}")
        lines.append("| " + " | ".join((r["system"], r["method"], *figures)) + " |")
    return "\n".join(lines)


def main() -> None:
    """Measure both; with --json stdout holds one JSON list alone."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--json", action="store_true", help="print a JSON list of rows")
    parser.add_argument("--system", choices=("tutelage", "trl", "all"), default="all")
    parser.add_argument("--vocab", type=int, choices=VOCABS, help="this size alone")
    options = parser.parse_args()
    commands = {"tutelage": tutelage_command, "trl": trl_command}
    systems = list(commands) if options.system == "all" else [options.system]
    rows = []
    with redirect_stdout(sys.stderr), tempfile.TemporaryDirectory(prefix="step") as name:
        for vocab in [options.vocab] if options.vocab else VOCABS:
            student = make_model(Path(name, f"student-{vocab}"), vocab, seed=0, **STUDENT)
            teacher = make_model(Path(name, f"teacher-{vocab}"), vocab, seed=1, **TEACHER)
            for method, group_size in METHODS.items():
                for system in systems:
                    print(f"{system}, {method}, V {vocab}", file=sys.stderr)
                    folder = Path(name, "run")
                    folder.mkdir()
                    command = commands[system](method, group_size, student, teacher, folder)
                    found = measure(command, peer=system != "tutelage", folder=folder)
                    rows.append({"system": system, "method": method, "V": vocab, **found})
                    print(as_table(rows[-1:]).splitlines()[-1], file=sys.stderr)
                    shutil.rmtree(folder)
    print(json.dumps(rows) if options.json else as_table(rows))


if __name__ == "__main__":
    main()
