"""Before the first step: do student and teacher speak of the same tokens?

A student whose likeliest tokens are not those of its teacher learns slowly or not at all from a loss on its own top-K,
and a blend on a truncated support can move little. This says so while nothing has been spent.
"""

from collections.abc import Sequence
from dataclasses import replace

import numpy as np
import ray

from actors.behaviours import StudentAlone
from actors.experience import Prompt, rollouts_from_arrow
from actors.sampling import SampleJob, Sampler
from actors.weights import PolicyWeights

_MAX_NEW_TOKENS = 16
_POSITIONS = 4
"""Of each completion, where the likeliest tokens of both models are compared."""
_LITTLE = 0.3


def cold_start(sampler: Sampler, prompts: Sequence[Prompt], weights: PolicyWeights, max_new_tokens: int) -> str:
    """Return one line: overlap of both models' likeliest tokens, the teacher's mass on the student's, and their KL."""
    length = min(_MAX_NEW_TOKENS, max_new_tokens)
    job = SampleJob(prompts=prompts, group_size=1, weights=weights, behaviour=StudentAlone(), max_new_tokens=length)
    rollouts = [rollout for shard in ray.get(sampler.sample_student(job)) for rollout in rollouts_from_arrow(shard)]
    masses, divergences, visited = [], [], []
    for rollout in rollouts:
        scores = rollout.teacher
        assert scores is not None
        assert scores.teacher_logprobs is not None
        masses.append(np.exp(scores.teacher_logprobs.astype(np.float64)).sum(1))
        divergences.append(scores.kl_to_teacher())
        for position in range(min(_POSITIONS, rollout.completion.num_tokens)):
            ids = (*rollout.prompt.token_ids, *rollout.completion.token_ids[:position].tolist())
            prompt_id = f"{rollout.prompt.prompt_id}+{position}"
            visited.append(replace(rollout.prompt, prompt_id=prompt_id, token_ids=ids))
    size = rollouts[0].teacher.support_ids.shape[1] if rollouts[0].teacher is not None else 0
    mass = float(np.concatenate(masses).mean())
    parts = [f"teacher's mass on the student's top {size} {mass:.2f}",
             f"KL to teacher {np.concatenate(divergences).mean():.2f} nats"]  # fmt: skip
    overlap = sampler.overlap(replace(job, prompts=visited))
    if overlap is not None:
        parts.insert(0, f"top-{size} overlap {overlap:.2f}")
    warning = "; they hardly agree on what may come next, so expect to learn slowly" if mass < _LITTLE else ""
    return f"before the first step, on {len(prompts)} prompts: {', '.join(parts)}{warning}"
