"""Small real models for the tutorials and tests: supervised training of a Qwen3 from scratch, in seconds.

Each is an ordinary Hugging Face folder (weights, configuration, a character tokenizer), kept in a cache and reused.
"""

import hashlib
import math
import os
import random
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType

from rewards import addition, countdown
from rewards.problem import Problem, is_held_out

_TASKS: dict[str, ModuleType] = {"addition": addition, "countdown": countdown}

CHARACTERS = "0123456789+-*/=() ,;:#>?.|abcdefghijklmnopqrstuvwxyzRLUDSG\n"
SPECIAL_TOKENS = ("<pad>", "<bos>", "<eos>", "<unk>")


@dataclass(frozen=True, slots=True, kw_only=True)
class TinyModel:
    """A model to make: its task, its size, how long it is trained."""

    task: str
    hidden_size: int
    num_layers: int
    num_steps: int
    """Optimizer steps on batches of 64 problems. A student is stopped early, so that there is something to learn."""
    seed: int


TINY_MODELS = {
    "addition-teacher": TinyModel(task="addition", hidden_size=96, num_layers=2, num_steps=300, seed=0),
    "addition-student": TinyModel(task="addition", hidden_size=64, num_layers=2, num_steps=145, seed=0),
    "countdown-student": TinyModel(task="countdown", hidden_size=96, num_layers=3, num_steps=250, seed=0),
}


def tiny_folder(name: str) -> Path:
    """Return where the named model is kept, made or not: under TUTELAGE_CACHE, or the user's cache folder."""
    cache = Path(os.environ.get("TUTELAGE_CACHE") or Path.home() / ".cache" / "tutelage")
    # The model follows from the code that makes it and its problems, so it is made anew when either changes.
    sources = [Path(__file__), Path(str(_TASKS[TINY_MODELS[name].task].__file__))]
    key = hashlib.sha256(b"".join(source.read_bytes() for source in sources)).hexdigest()[:8]
    return cache / "tiny" / f"{name}-{key}"


def make_tiny_models(names: Iterable[str]) -> None:
    """Make the named models that are not in the cache yet, side by side, each in a process of its own.

    Raises:
        RuntimeError: if one could not be made; carries the last line its process printed.
    """
    missing = [name for name in dict.fromkeys(names) if not (tiny_folder(name) / "config.json").exists()]
    # One thread each: the sums, and so the weights, are then the same on every run of one machine.
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    processes = {
        name: subprocess.Popen(
            [sys.executable, "-m", "learner.tiny_models", name],
            env=environment,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.PIPE,
            text=True,
        )
        for name in missing
    }
    try:
        for name, process in processes.items():
            _, errors = process.communicate()
            if process.returncode:
                last = errors.strip().splitlines()[-1] if errors.strip() else "no message"
                raise RuntimeError(f"tiny:{name} could not be made: {last}")
    finally:
        for process in processes.values():
            if process.poll() is None:
                process.kill()
                process.wait()


def _make(name: str) -> None:
    """Train the named model and move its folder into the cache in one step."""
    model = TINY_MODELS[name]
    target = tiny_folder(name)
    target.parent.mkdir(parents=True, exist_ok=True)
    draft = Path(tempfile.mkdtemp(prefix=f".{name}-", dir=target.parent))
    try:
        _train(model, draft)
        try:
            draft.rename(target)
        except OSError:
            if not (target / "config.json").exists():  # else another process was quicker, with the same result
                raise
    finally:
        shutil.rmtree(draft, ignore_errors=True)


def _save_tokenizer(folder: Path) -> dict[str, int]:
    """Save the character tokenizer and return its vocabulary."""
    from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    vocabulary = {token: i for i, token in enumerate([*SPECIAL_TOKENS, *CHARACTERS])}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Split(Regex(r"[\s\S]"), "isolated")
    tokenizer.decoder = decoders.Fuse()
    wrapped = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        bos_token="<bos>",
        eos_token="<eos>",
        pad_token="<pad>",
        unk_token="<unk>",
        padding_side="left",
        model_max_length=128,
        clean_up_tokenization_spaces=False,
    )
    wrapped.chat_template = (
        "{% for m in messages %}{% if m['role'] == 'user' %}{{ bos_token }}{{ m['content'] }}"
        "{% else %}{{ m['content'] }}{{ eos_token }}{% endif %}{% endfor %}"
    )
    wrapped.save_pretrained(folder)
    return vocabulary


def _train(spec: TinyModel, folder: Path) -> None:
    """Supervised training on worked solutions; the loss is on the solution only."""
    import torch
    from transformers import GenerationConfig, Qwen3Config, Qwen3ForCausalLM

    torch.set_num_threads(1)
    torch.manual_seed(spec.seed)
    vocabulary = _save_tokenizer(folder)
    pad, bos, eos = (vocabulary[token] for token in SPECIAL_TOKENS[:3])
    model = Qwen3ForCausalLM(
        Qwen3Config(
            vocab_size=len(vocabulary), hidden_size=spec.hidden_size, intermediate_size=3 * spec.hidden_size,
            num_hidden_layers=spec.num_layers, num_attention_heads=4, num_key_value_heads=2,
            head_dim=32, max_position_embeddings=128, tie_word_embeddings=True,
            rope_parameters={"rope_type": "default", "rope_theta": 10000.0},
            pad_token_id=pad, bos_token_id=bos, eos_token_id=eos,
        )
    )  # fmt: skip
    matrices = [p for name, p in model.named_parameters() if p.ndim == 2 and "embed" not in name]
    others = [p for name, p in model.named_parameters() if p.ndim != 2 or "embed" in name]
    optimizers = [
        torch.optim.Muon(matrices, lr=0.015, weight_decay=0.0, adjust_lr_fn="original"),
        torch.optim.AdamW(others, lr=3e-3, betas=(0.9, 0.98), weight_decay=0.0),
    ]

    def rate(step: int) -> float:
        return min(1.0, (step + 1) / 50) * (0.05 + 0.95 * 0.5 * (1 + math.cos(math.pi * step / spec.num_steps)))

    schedules = [torch.optim.lr_scheduler.LambdaLR(optimizer, rate) for optimizer in optimizers]
    rng = random.Random(spec.seed + 1)
    for _ in range(spec.num_steps):
        inputs, labels = _batch(spec.task, rng, vocabulary, pad, bos, eos)
        logits = model(input_ids=torch.tensor(inputs)).logits[:, :-1]
        loss = torch.nn.functional.cross_entropy(
            logits.reshape(-1, len(vocabulary)), torch.tensor(labels)[:, 1:].reshape(-1), ignore_index=-100
        )
        for optimizer in optimizers:
            optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        for optimizer, schedule in zip(optimizers, schedules, strict=True):
            optimizer.step()
            schedule.step()
    model.generation_config = GenerationConfig(pad_token_id=pad, bos_token_id=bos, eos_token_id=eos)
    model.save_pretrained(folder)


def _batch(
    task: str, rng: random.Random, vocabulary: dict[str, int], pad: int, bos: int, eos: int, size: int = 64
) -> tuple[list[list[int]], list[list[int]]]:
    """Return right-padded input ids and labels of problems that are not held out."""
    texts: list[list[int]] = []
    prompts: list[int] = []
    while len(texts) < size:
        problem: Problem = _TASKS[task].make_problem(rng)
        if not is_held_out(problem.prompt):
            prompts.append(1 + len(problem.prompt))
            texts.append([bos, *(vocabulary[c] for c in problem.prompt + problem.solution), eos])
    longest = max(map(len, texts))
    inputs = [text + [pad] * (longest - len(text)) for text in texts]
    labels = [
        [-100] * start + text[start:] + [-100] * (longest - len(text))
        for text, start in zip(texts, prompts, strict=True)
    ]
    return inputs, labels


if __name__ == "__main__":
    _make(sys.argv[1])
