"""Whole runs of the real command on a real Ray cluster: they learn, repeat to the bit, resume, and are recorded.

Each run joins the session's cluster by RAY_ADDRESS and makes its own actors. The tiny models are made once and cached.
"""

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq
import pytest
import ray
import torch
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from transformers import AutoModelForCausalLM, AutoTokenizer

from actors.experience import Rollout, rollouts_from_arrow
from actors.trust_region import blend
from learner.tiny_models import tiny_folder
from rewards import addition
from tests.exact_laws import laws_along

pytestmark = [pytest.mark.ray, pytest.mark.timeout(600)]

ROOT = Path(__file__).parents[2]
QUICKSTART = str(ROOT / "deploy" / "recipes" / "quickstart.yaml")
COUNTDOWN = str(ROOT / "deploy" / "recipes" / "countdown-fgrpo.yaml")
SMALL = (
    "learner.learning_rate=3e-3", "learner.warmup_steps=5",
    "rollouts.prompts_per_step=16", "learner.micro_batch_size=16", "blending.warmup_steps=4", "training.num_steps=8",
    "evaluation.num_prompts=16", "evaluation.num_samples=4", "evaluation.pass_at=[1,4]", "checkpoints.every_steps=4",
)  # fmt: skip


def command(*arguments: str, address: str, **options: Any) -> subprocess.Popen[str]:
    return subprocess.Popen(
        [sys.executable, "-m", "orchestrator.cli", *arguments],
        cwd=ROOT, env={**os.environ, "RAY_ADDRESS": address}, text=True, stdout=subprocess.PIPE,
        stderr=subprocess.PIPE, **options,
    )  # fmt: skip


def finished(process: subprocess.Popen[str]) -> str:
    output, errors = process.communicate(timeout=500)
    assert process.returncode == 0, output + errors
    assert "Traceback" not in output + errors
    return output


def run(recipe: str, folder: Path, *overrides: str, address: str) -> tuple[Path, str]:
    """Run to the end; return the run folder and what was printed."""
    output = finished(command("train", recipe, f"training.folder={folder}", *overrides, address=address))
    (made,) = folder.iterdir()
    return made, output


def lines(file: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in file.read_text().splitlines()]


def timeless(file: Path) -> list[dict[str, Any]]:
    """The metrics but for what a clock decides."""
    return [{k: v for k, v in line.items() if not k.startswith("time/")} for line in lines(file)]


def recorded_kl(rollouts: list[Rollout]) -> float:
    """KL(student || teacher) on support and tail, mean over all tokens, from what the engines recorded."""
    each = []
    for rollout in rollouts:
        scores = rollout.teacher
        assert scores is not None
        assert scores.teacher_logprobs is not None
        assert scores.teacher_tail_logprobs is not None
        laws = ((scores.student_logprobs, scores.student_tail_logprobs),
                (scores.teacher_logprobs, scores.teacher_tail_logprobs))  # fmt: skip
        ours, theirs = (np.concatenate([inside, tail[:, None]], 1).astype(np.float64) for inside, tail in laws)
        each.append((np.exp(ours) * (ours - theirs)).sum(1))
    return float(np.concatenate(each).mean())


def wait_until(condition: Callable[[], bool], process: subprocess.Popen[str]) -> None:
    deadline = time.monotonic() + 300
    while not condition():
        assert process.poll() is None, process.communicate()
        assert time.monotonic() < deadline
        time.sleep(0.05)


@pytest.fixture(scope="module")
def straight(ray_cluster: str, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, str]:
    return run(QUICKSTART, tmp_path_factory.mktemp("straight"), *SMALL, address=ray_cluster)


def test_a_run_folder_is_complete_by_itself(straight: tuple[Path, str]) -> None:
    folder, output = straight
    assert str(folder) in output
    assert "before" in output
    assert "after" in output
    recipe = json.loads((folder / "recipe.json").read_text())
    assert recipe["learner"]["weight_decay"] == 0.0
    assert recipe["graders"]["deadline_s"] > 0, "defaults are filled in"
    environment = json.loads((folder / "environment.json").read_text())
    assert environment["packages"]["ray"] == ray.__version__
    assert [line["step"] for line in lines(folder / "metrics.jsonl")] == list(range(8))
    events = EventAccumulator(str(folder / "tensorboard"))
    events.Reload()
    assert len(events.Scalars("reward/pass_rate")) == 8
    model = AutoModelForCausalLM.from_pretrained(folder / "checkpoints" / "step_000008" / "model")
    tokenizer = AutoTokenizer.from_pretrained(folder / "checkpoints" / "step_000008" / "model")
    assert model.config.vocab_size == len(tokenizer)
    assert sorted(p.name for p in (folder / "checkpoints").iterdir()) == ["step_000004", "step_000008"]


def test_every_rollout_is_kept_as_it_was(straight: tuple[Path, str]) -> None:
    folder, _ = straight
    metrics = lines(folder / "metrics.jsonl")
    seen = set()
    for step, line in enumerate(metrics):
        table = pq.read_table(folder / "rollouts" / f"step_{step:06d}.parquet")
        rollouts = [r for batch in table.to_batches() for r in rollouts_from_arrow(batch)]
        assert len(rollouts) == 16
        assert line["rollout/num_tokens"] == sum(r.completion.num_tokens for r in rollouts)
        assert line["loss/kl_to_teacher"] == pytest.approx(recorded_kl(rollouts), rel=1e-3), "sampler and learner agree"
        for rollout in rollouts:
            seen.add(rollout.prompt.prompt_id)
            assert rollout.grade is not None
            assert rollout.blend is not None
            assert rollout.teacher is not None
            assert rollout.grade.status == addition.check(rollout.text, rollout.prompt.reference).status
            assert set(rollout.completion.policy_versions.tolist()) == {step}
            budget = max(0.0, 0.02 * (1 - step / 4))
            np.testing.assert_allclose(rollout.blend.epsilon, budget, rtol=1e-6)
            assert (rollout.blend.divergence <= budget * (1 + 1e-4) + 1e-7).all()
            if step >= 4:
                assert (rollout.completion.behaviour_logprobs == rollout.completion.student_logprobs).all()
    assert len(seen) == 8 * 16
    assert metrics[0]["blend/beta"] > 0
    assert metrics[4]["blend/beta"] == 0


def test_the_law_of_every_token_is_that_of_a_separate_forward(ray_cluster: str, tmp_path: Path) -> None:
    """log mu in float64, from the weights of each step, on the stored support at the stored budget."""
    folder, _ = run(
        QUICKSTART, tmp_path, *SMALL, "training.num_steps=5", "checkpoints.every_steps=1", "checkpoints.keep=9",
        "evaluation.num_prompts=0", address=ray_cluster,
    )  # fmt: skip
    teacher = AutoModelForCausalLM.from_pretrained(tiny_folder("addition-teacher"), dtype=torch.float64)
    for step in range(5):
        weights = folder / "checkpoints" / f"step_{step:06d}" / "model" if step else tiny_folder("addition-student")
        student = AutoModelForCausalLM.from_pretrained(weights, dtype=torch.float64)
        table = pq.read_table(folder / "rollouts" / f"step_{step:06d}.parquet")
        rollouts = [r for batch in table.to_batches() for r in rollouts_from_arrow(batch)]
        for rollout in rollouts:
            completion, scores, trace = rollout.completion, rollout.teacher, rollout.blend
            assert scores is not None
            assert trace is not None
            pi_s, pi_t = (laws_along(m, rollout.prompt.token_ids, completion.token_ids) for m in (student, teacher))
            support = torch.from_numpy(scores.support_ids.copy()).long()
            assert support.shape[1] == 16, "the truncated support is the daily path"
            tails = [torch.logsumexp(law.scatter(1, support, -torch.inf), 1, keepdim=True) for law in (pi_s, pi_t)]
            coarse = [torch.cat([law.gather(1, support), t], 1) for law, t in zip((pi_s, pi_t), tails, strict=True)]
            mu = blend(coarse[0], coarse[1], torch.from_numpy(trace.epsilon.astype(np.float64))).logprobs
            whole = (pi_s - tails[0] + mu[:, -1:]).scatter(1, support, mu[:, :-1])
            drawn = whole.gather(1, torch.from_numpy(completion.token_ids.copy()).long()[:, None])[:, 0]
            np.testing.assert_allclose(completion.behaviour_logprobs, drawn, atol=1e-4)
            spent = (whole.exp() * (whole - pi_s)).sum(1).numpy()
            assert (spent <= trace.epsilon * (1 + 1e-3) + 1e-6).all(), "the budget holds on the whole vocabulary"


def test_two_synchronous_runs_write_the_same_metrics(
    straight: tuple[Path, str], ray_cluster: str, tmp_path: Path
) -> None:
    again, _ = run(QUICKSTART, tmp_path, *SMALL, address=ray_cluster)
    for name in ("metrics.jsonl", "evaluations.jsonl"):
        assert timeless(again / name) == timeless(straight[0] / name)


def test_a_run_that_was_killed_resumes_as_if_it_had_not_been(
    straight: tuple[Path, str], ray_cluster: str, tmp_path: Path
) -> None:
    process = command("train", QUICKSTART, f"training.folder={tmp_path}", *SMALL, address=ray_cluster)
    wait_until(lambda: any(len(lines(f)) >= 6 for f in tmp_path.glob("*/metrics.jsonl")), process)
    process.send_signal(signal.SIGKILL)
    process.wait()
    process.communicate()
    (folder,) = tmp_path.iterdir()
    finished(command("resume", str(folder), address=ray_cluster))
    for name in ("metrics.jsonl", "evaluations.jsonl"):
        assert timeless(folder / name) == timeless(straight[0] / name)


def test_an_asynchronous_run_with_two_students_learns_within_its_staleness_and_survives_a_kill(
    ray_cluster: str, tmp_path: Path
) -> None:
    process = command(
        "train", QUICKSTART, f"training.folder={tmp_path}", *SMALL, "training.num_steps=40", "rollouts.max_staleness=2",
        "students.num_actors=2", "learner.learning_rate=1e-3", "checkpoints.every_steps=0", address=ray_cluster,
    )  # fmt: skip
    wait_until(lambda: any(len(lines(f)) >= 10 for f in tmp_path.glob("*/metrics.jsonl")), process)
    (folder,) = tmp_path.iterdir()
    victim = ray.get_actor("student-1", namespace=f"tutelage-{folder.name}")
    os.kill(ray.get(victim.__ray_call__.remote(lambda _: os.getpid())), signal.SIGKILL)
    finished(process)
    metrics = lines(folder / "metrics.jsonl")
    assert [line["step"] for line in metrics] == list(range(40))
    assert max(line["rollout/staleness"] for line in metrics) == 2
    assert sum(line["failures/shards_sampled_again"] for line in metrics) >= 1
    kl = [line["loss/kl_to_teacher"] for line in metrics]
    assert np.mean(kl[-8:]) < 0.75 * np.mean(kl[4:12]), "the student has come nearer to its teacher"


@pytest.mark.parametrize(
    ("overrides", "beta"),
    [
        (["blending.layout=one_engine", "blending.warmup_steps=2"], 0.1),
        (["blending={type: fixed_beta, beta: 0.3, warmup_steps: 2}"], 0.3),
        (["blending={type: temperature_warmup, start: 0.8, warmup_steps: 2}"], None),
    ],
    ids=["one-engine", "fixed-beta", "temperature"],
)
def test_other_layouts_and_baselines_run_to_the_end(
    ray_cluster: str, tmp_path: Path, overrides: list[str], beta: float | None
) -> None:
    folder, output = run(QUICKSTART, tmp_path, *SMALL, "training.num_steps=4", *overrides, address=ray_cluster)
    assert "before the first step, on 8 prompts: top-16 overlap 0." in output
    metrics = lines(folder / "metrics.jsonl")
    if beta is None:
        assert "blend/beta" not in metrics[0], "no blend, and no divergence that anyone knows"
        table = pq.read_table(folder / "rollouts" / "step_000000.parquet")
        assert table["behaviour_logprobs"] != table["student_logprobs"]
    else:
        assert metrics[0]["blend/beta"] > 0.9 * beta
        assert metrics[0]["speculation/passes_per_token"] < 0.4
        assert "the warmup is over: plain student rollouts from here on" in output
    assert metrics[2]["blend/beta"] == metrics[3]["blend/beta"] == 0


def test_focal_weights_reach_the_learner(ray_cluster: str, tmp_path: Path) -> None:
    folder, _ = run(
        COUNTDOWN, tmp_path, "training.num_steps=3", "evaluation.num_prompts=0", "learner.world_size=2",
        "learner.micro_batch_size=32", "learner.zero_stage=2", address=ray_cluster,
    )  # fmt: skip
    for step, line in enumerate(lines(folder / "metrics.jsonl")):
        table = pq.read_table(folder / "rollouts" / f"step_{step:06d}.parquet")
        rates = np.array(table["reward"].to_pylist()).reshape(16, 8).mean(1)
        assert line["reward/focal_weight"] == pytest.approx(np.sqrt(1 - rates).mean(), abs=1e-6)
        assert line["reward/zero_variance_groups"] == pytest.approx(((rates == 0) | (rates == 1)).mean())
        assert line["learner/grad_norm"] > 0
        assert "blend/beta" not in line
