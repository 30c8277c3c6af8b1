"""What rollouts cost: plain, plain with teacher scores, lockstep, speculative in one engine and over actors.

    python -m tests.benchmarks.rollouts [--json] [--engine torch|vllm|all]

An untrained student and a trained teacher of the addition task, the same prompts, every completion of the same length
(no token ends one). The figure is emitted tokens per CPU second of all processes at work, one thread each, since wall
times on shared cores say little; each figure is the best of the repeats, whose order alternates. The yardstick is
`plain+scoring`: what ordinary on-policy distillation pays, a rollout of the student and the teacher's scores of it.
"""

import argparse
import gc
import json
import logging
import os
import shutil
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, redirect_stdout
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import ray
import torch

from actors.behaviours import TrustRegion
from actors.config import ModelPoolSection, TorchEngineSection, TrustRegionSection, VllmEngineSection
from actors.engines.build import EngineSpec, build_engine
from actors.engines.environment import engine_environment
from actors.engines.protocol import SequenceRequest
from actors.experience import Prompt, rollouts_from_arrow
from actors.head import Head
from actors.meter import Meter, meter_of
from actors.one_engine import TorchPair, VllmPair
from actors.sampling import BlendedSampler, PlainSampler, SampleJob
from actors.weights import PolicyWeights
from learner.tiny_models import make_tiny_models, tiny_folder

EPSILONS = (0.001, 0.005, 0.02, 0.05)
BATCHES = (1, 16, 64)
NUM_TOKENS = 80
SUPPORT_SIZE = 16
REPEATS = {"torch": 3, "vllm": 2}


@dataclass(frozen=True, slots=True, kw_only=True)
class Outcome:
    """One batch of rollouts."""

    cpu_s: float
    meter: Meter
    acceptance: float | None = None
    """Share of emitted tokens that are the student's drafts."""


Run = Callable[[int, float, int], Outcome]
"""(batch, epsilon, repeat) -> what came of it."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Mode:
    """One way to make rollouts."""

    name: str
    engine: str
    run: Run
    takes_epsilon: bool = True


def untrained_student(folder: Path) -> str:
    """Save the addition student as it is before any training, and return where."""
    from transformers import AutoConfig, AutoModelForCausalLM

    trained = tiny_folder("addition-student")
    torch.manual_seed(0)
    model: Any = AutoModelForCausalLM.from_config(AutoConfig.from_pretrained(trained))
    shutil.copytree(trained, folder)
    model.save_pretrained(folder)
    return str(folder)


def spec_of(engine: str, model: str) -> EngineSpec:
    """Everything that is pinned: one thread, float32, K = 16."""
    section = TorchEngineSection() if engine == "torch" else VllmEngineSection()
    return EngineSpec(
        section=section, model=model, seed=0, head=Head(stop_token_ids=()), support_size=SUPPORT_SIZE,
        max_model_len=8 + NUM_TOKENS, on_gpu=False,
    )  # fmt: skip


def prompts(batch: int, name: str) -> list[Prompt]:
    """Sums of two numbers, as token ids."""
    ids = [(1, 4 + i % 10, 5 + i % 9, 14, 6 + i % 8, 4 + i % 7, 20) for i in range(batch)]
    return [
        Prompt(prompt_id=f"{name}-{i}", text="", token_ids=tokens, task="addition", reference="0")
        for i, tokens in enumerate(ids)
    ]


def requests(batch: int, name: str) -> list[SequenceRequest]:
    """The same, for an engine."""
    return [
        SequenceRequest(prompt_id=p.prompt_id, sample_index=0, prompt_ids=p.token_ids, max_new_tokens=NUM_TOKENS)
        for p in prompts(batch, name)
    ]


@contextmanager
def local_modes(engine: str, student: str, teacher: str) -> Iterator[list[Mode]]:
    """The modes whose models are in this process."""
    spec = spec_of(engine, student)
    ours, theirs = build_engine(spec), build_engine(replace(spec, model=teacher))
    kind: Any = TorchPair if engine == "torch" else VllmPair
    lockstep = kind(spec, teacher, TrustRegionSection(draft_length=1))
    speculative = kind(spec, teacher, TrustRegionSection(draft_length="adaptive"))

    def plain(batch: int, epsilon: float, repeat: int) -> Outcome:
        began = time.process_time()
        ours.generate(requests(batch, f"{batch}-{repeat}"))
        return Outcome(cpu_s=time.process_time() - began, meter=Meter(num_tokens=batch * NUM_TOKENS))

    def scoring(batch: int, epsilon: float, repeat: int) -> Outcome:
        asked = requests(batch, f"{batch}-{repeat}")
        began = time.process_time()
        made = ours.generate(asked)
        theirs.score_completions(
            [r.prompt_ids for r in asked], [g.token_ids for g in made], [g.support_ids for g in made]
        )
        seconds = time.process_time() - began
        return Outcome(cpu_s=seconds, meter=Meter(num_tokens=batch * NUM_TOKENS, num_passes=batch))

    def blended(pair: Any) -> Run:
        def run(batch: int, epsilon: float, repeat: int) -> Outcome:
            asked = requests(batch, f"{batch}-{repeat}")
            began = time.process_time()
            sampled, meter = pair.sample(asked, TrustRegion(epsilon=epsilon))
            seconds = time.process_time() - began
            assert len(sampled.tokens.token_ids) == batch * NUM_TOKENS
            return Outcome(cpu_s=seconds, meter=meter, acceptance=float(sampled.tokens.accepted.mean()))

        return run

    yield [
        Mode(name="plain", engine=engine, run=plain, takes_epsilon=False),
        Mode(name="plain+scoring", engine=engine, run=scoring, takes_epsilon=False),
        Mode(name="lockstep", engine=engine, run=blended(lockstep)),
        Mode(name="speculative-one-engine", engine=engine, run=blended(speculative)),
    ]
    for each in (ours, theirs):
        each.shutdown()
    gc.collect()


@contextmanager
def actor_modes(engine: str, student: str, teacher: str) -> Iterator[list[Mode]]:
    """The mode whose models and blending service are actors of a Ray cluster."""
    spec = spec_of(engine, student)
    students, teachers = ModelPoolSection(model=student, num_cpus=0.5), ModelPoolSection(model=teacher, num_cpus=0.5)
    plain = PlainSampler(students, spec, teachers, replace(spec, model=teacher))
    sampler = BlendedSampler(plain, TrustRegionSection(draft_length="adaptive"), spec)
    sampler.start()
    assert plain.students is not None
    assert plain.teachers is not None
    assert sampler.blenders is not None
    actors = [*plain.students.actors, *plain.teachers.actors, *sampler.blenders.actors]

    def cpu_s() -> float:
        return sum(ray.get([actor.__ray_call__.remote(lambda _: time.process_time()) for actor in actors]))

    def run(batch: int, epsilon: float, repeat: int) -> Outcome:
        job = SampleJob(
            prompts=prompts(batch, f"{batch}-{repeat}"), group_size=1, behaviour=TrustRegion(epsilon=epsilon),
            weights=PolicyWeights(policy_version=0, buckets=()), max_new_tokens=NUM_TOKENS,
        )  # fmt: skip
        began = cpu_s()
        shards = ray.get(sampler.sample(job))
        seconds = cpu_s() - began
        rollouts = [rollout for shard in shards for rollout in rollouts_from_arrow(shard)]
        assert sum(rollout.completion.num_tokens for rollout in rollouts) == batch * NUM_TOKENS
        accepted = np.concatenate([rollout.blend.accepted for rollout in rollouts if rollout.blend is not None])
        return Outcome(cpu_s=seconds, meter=meter_of(shards), acceptance=float(accepted.mean()))

    yield [Mode(name="speculative-actors", engine=engine, run=run)]
    sampler.close()
    plain.close()


def distance(student: str, teacher: str) -> tuple[float, float]:
    """Return the mean KL(teacher || student) on the student's own rollouts, and the share of beta < 1 at 0.02."""
    spec = replace(spec_of("torch", student), support_size=None)
    ours, theirs = build_engine(spec), build_engine(replace(spec, model=teacher))
    asked = requests(16, "distance")
    made = ours.generate(asked)
    scores = theirs.score_completions(
        [r.prompt_ids for r in asked], [g.token_ids for g in made], [g.support_ids for g in made]
    )
    s = torch.from_numpy(np.concatenate([g.support_logprobs for g in made])).double()
    t = torch.from_numpy(np.concatenate([score.support_logprobs[0] for score in scores])).double()
    beta = TrustRegion(epsilon=0.02).target(s, t).beta
    return float((t.exp() * (t - s)).sum(-1).mean()), float((beta < 1).double().mean())


def measure(modes: list[Mode], kl: float) -> list[dict[str, Any]]:
    """Return a row for each mode, epsilon and batch; the repeats of all go round in turn."""
    best: dict[tuple[str, float, int], Outcome] = {}
    for repeat in range(REPEATS[modes[0].engine]):
        order = modes if repeat % 2 == 0 else modes[::-1]
        for batch in BATCHES:
            for mode in order:
                for epsilon in EPSILONS if mode.takes_epsilon else (0.0,):
                    outcome = mode.run(batch, epsilon, repeat)
                    key = (mode.name, epsilon, batch)
                    if key not in best or outcome.cpu_s < best[key].cpu_s:
                        best[key] = outcome
    rows = []
    for mode in modes:
        for epsilon in EPSILONS if mode.takes_epsilon else (0.0,):
            for batch in BATCHES:
                outcome = best[mode.name, epsilon, batch]
                num_tokens = outcome.meter.num_tokens
                rows.append(
                    {
                        "mode": mode.name,
                        "engine": mode.engine,
                        "epsilon": epsilon,
                        "batch": batch,
                        "tokens_per_cpu_s": round(num_tokens / outcome.cpu_s, 1),
                        "acceptance": None if outcome.acceptance is None else round(outcome.acceptance, 4),
                        "teacher_passes_per_token": round(outcome.meter.num_passes / num_tokens, 4),
                        "kl_teacher_student": round(kl, 3),
                    }
                )
    return rows


def with_ratios(rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Add each row's speed over that of plain+scoring with the same engine and batch."""
    yardstick = {(r["engine"], r["batch"]): r["tokens_per_cpu_s"] for r in rows if r["mode"] == "plain+scoring"}
    for row in rows:
        row["ratio_to_yardstick"] = round(row["tokens_per_cpu_s"] / yardstick[row["engine"], row["batch"]], 3)
    return rows


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=str(__doc__).splitlines()[0])
    parser.add_argument("--json", action="store_true", help="print the rows as one JSON list and nothing else")
    parser.add_argument("--engine", choices=("torch", "vllm", "all"), default="all")
    options = parser.parse_args()
    pinned = {"OMP_NUM_THREADS": "1", **engine_environment(VllmEngineSection())}
    if any(os.environ.get(name) != value for name, value in pinned.items()):
        # They are read when Python, torch and vLLM start.
        os.execve(sys.executable, [sys.executable, "-m", "tests.benchmarks.rollouts", *sys.argv[1:]],
                  {**os.environ, **pinned})  # fmt: skip
    torch.set_num_threads(1)
    folder = Path(tempfile.mkdtemp(prefix="tb"))
    with redirect_stdout(sys.stderr):
        try:
            rows = _rows(folder, ("torch", "vllm") if options.engine == "all" else (options.engine,))
        finally:
            ray.shutdown()
            shutil.rmtree(folder, ignore_errors=True)
    if options.json:
        print(json.dumps(rows))
    else:
        table(rows)


def _rows(folder: Path, engines: tuple[str, ...]) -> list[dict[str, Any]]:
    make_tiny_models(["addition-student", "addition-teacher"])
    student, teacher = untrained_student(folder / "student"), str(tiny_folder("addition-teacher"))
    os.environ["RAY_AUTH_MODE"] = "disabled"
    ray.init(num_cpus=4, include_dashboard=False, log_to_driver=False, logging_level=logging.WARNING,
             namespace="benchmark", _temp_dir=str(folder / "ray"))  # fmt: skip
    kl, below_one = distance(student, teacher)
    print(f"KL(teacher || student) {kl:.2f} nats; beta < 1 on {below_one:.0%} of rows at 0.02")
    rows = []
    for engine in engines:
        for modes in (local_modes, actor_modes):
            with modes(engine, student, teacher) as made:
                rows += measure(made, kl)
    return with_ratios(rows)


def table(rows: list[dict[str, Any]]) -> None:
    """Print the rows as a Markdown table."""
    names = ("mode", "engine", "epsilon", "batch", "tokens_per_cpu_s", "ratio_to_yardstick", "acceptance",
             "teacher_passes_per_token", "kl_teacher_student")  # fmt: skip
    print("| " + " | ".join(names) + " |")
    print("| " + " | ".join("---" for _ in names) + " |")
    for row in rows:
        print("| " + " | ".join("" if row[name] is None else str(row[name]) for name in names) + " |")


if __name__ == "__main__":
    main()
