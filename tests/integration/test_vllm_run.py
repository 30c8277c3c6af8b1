"""The main job with real vLLM engines: both layouts while blending, plain student and teacher engines after it."""

import os
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import pytest

from actors.experience import rollouts_from_arrow
from tests.integration.test_run import QUICKSTART, SMALL, lines, recorded_kl, run

pytestmark = [pytest.mark.ray, pytest.mark.vllm, pytest.mark.timeout(900)]


@pytest.mark.parametrize("layout", ["one_engine", "actors"])
def test_the_quickstart_runs_on_vllm_and_changes_over_when_the_budget_is_spent(
    ray_cluster: str, tmp_path: Path, layout: str
) -> None:
    assert os.environ["OMP_NUM_THREADS"] == "1"
    folder, output = run(
        QUICKSTART, tmp_path, *SMALL, "engine=vllm", f"blending.layout={layout}", "training.num_steps=6",
        "evaluation.num_prompts=8", "blending.warmup_steps=3", address=ray_cluster,
    )  # fmt: skip
    assert "plain student rollouts from here on, changed over in" in output
    metrics = lines(folder / "metrics.jsonl")
    assert [line["step"] for line in metrics] == list(range(6))
    assert all("time/changeover_s" in line for line in metrics[3:4])
    for step, line in enumerate(metrics):
        table = pq.read_table(folder / "rollouts" / f"step_{step:06d}.parquet")
        rollouts = [r for batch in table.to_batches() for r in rollouts_from_arrow(batch)]
        assert len(rollouts) == 16
        budget = 0.02 * max(0.0, 1 - step / 3)
        assert line["blend/epsilon"] == pytest.approx(budget)
        for rollout in rollouts:
            assert rollout.blend is not None
            assert rollout.teacher is not None
            assert set(rollout.completion.policy_versions.tolist()) == {step}
            assert (rollout.blend.divergence <= budget * (1 + 1e-4) + 1e-7).all()
            assert np.isfinite(rollout.blend.teacher_logprobs).all()
            assert rollout.teacher.support_ids.shape[1] == 16
        assert line["loss/kl_to_teacher"] == pytest.approx(recorded_kl(rollouts), rel=1e-3), "sampler and learner agree"
