"""The vLLM engines against exact laws: every sequence is enumerated in float64 with transformers.

Two engines run as Ray actors of their own, as in a training run: one with a student, one with student and teacher.
The models are random, the vocabulary has 8 tokens, so that all 4-token sequences can be counted. About 80 s on two idle
cores, most of it vLLM's import and start.
"""

import math
import os
import subprocess
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import ray
import torch
from torch import Tensor
from transformers import Qwen3ForCausalLM

from actors.engines.errors import EngineError
from actors.engines.protocol import Generation, SequenceRequest
from actors.engines.vllm_engine import BlendedGeneration, VllmBlendEngine, VllmEngine, environment
from actors.trust_region import blend
from tests.exact_laws import (
    FALSE_ALARM,
    NUM_TOKENS,
    PROMPT,
    STOP,
    VOCABULARY,
    blend_of,
    law_of,
    laws_along,
    make_model,
    surprise,
)

pytestmark = [pytest.mark.ray, pytest.mark.vllm, pytest.mark.timeout(600)]

SUPPORT, SEED = 3, 11
MAX_MODEL_LEN, DRAFT_LENGTH, MAX_NUM_SEQS = 96, 3, 128
NUM_SAMPLES = 10000


def as_tuples(generations: Sequence[Generation] | Sequence[BlendedGeneration]) -> list[tuple[int, ...]]:
    return [tuple(g.token_ids.tolist()) for g in generations]


def law_requests(prompt_id: str) -> list[SequenceRequest]:
    return [
        SequenceRequest(prompt_id=prompt_id, sample_index=i, prompt_ids=PROMPT, max_new_tokens=NUM_TOKENS)
        for i in range(NUM_SAMPLES)
    ]


def long_requests() -> list[SequenceRequest]:
    """More tokens of different prompts than one step takes, so that prompts are computed in pieces; groups of two."""
    rng = np.random.default_rng(5)
    prompts = [(1, *rng.integers(3, VOCABULARY, 60 + i % 7).tolist()) for i in range(80)]
    return [
        SequenceRequest(prompt_id=f"long-{i}", sample_index=j, prompt_ids=prompt, max_new_tokens=20)
        for i, prompt in enumerate(prompts)
        for j in range(2)
    ]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("models")


@pytest.fixture(scope="module")
def student(folder: Path) -> Qwen3ForCausalLM:
    return make_model(folder / "student", seed=1, hidden_size=32, tied=True, scale=0.2)


@pytest.fixture(scope="module")
def teacher(folder: Path) -> Qwen3ForCausalLM:
    return make_model(folder / "teacher", seed=2, hidden_size=64, tied=False, scale=0.2)


@pytest.fixture(scope="module")
def other(folder: Path) -> Qwen3ForCausalLM:
    """Weights that a learner might publish for the student."""
    return make_model(folder / "other", seed=3, hidden_size=32, tied=True, scale=0.2)


@pytest.fixture(scope="module")
def engines(
    ray_cluster: str, folder: Path, student: Qwen3ForCausalLM, teacher: Qwen3ForCausalLM
) -> Iterator[tuple[Any, Any]]:
    """Handles of a `VllmEngine` with the student and a `VllmBlendEngine`, started side by side."""
    common: dict[str, Any] = {
        "seed": SEED, "temperature": 1.0, "stop_token_id": STOP, "max_model_len": MAX_MODEL_LEN,
        "max_num_seqs": MAX_NUM_SEQS,
    }  # fmt: skip
    # vLLM then takes the cache's size from the engine: too small for MAX_NUM_SEQS sequences of full length.
    exact = {"env_vars": {k: v for k, v in environment(1, 1.0).items() if k != "VLLM_CPU_KVCACHE_SPACE"}}
    plain: Any = ray.remote(VllmEngine).options(
        num_cpus=0.5, runtime_env={"env_vars": environment(threads=1, memory_gib=1.0)}
    ).remote(model=str(folder / "student"), support_size=SUPPORT, **common)  # fmt: skip
    blending: Any = ray.remote(VllmBlendEngine).options(num_cpus=0.5, runtime_env=exact).remote(
        student=str(folder / "student"), teacher=str(folder / "teacher"), draft_length=DRAFT_LENGTH,
        support_size=SUPPORT, memory_gib=0.008, **common,
    )  # fmt: skip
    ray.get([plain.generate.remote([]), blending.generate_blended.remote([], 0.1)])
    yield plain, blending
    for engine in (plain, blending):
        ray.get(engine.shutdown.remote())
        ray.kill(engine)


def call(method: Any, *arguments: object) -> Any:
    return ray.get(method.remote(*arguments))


def test_generated_sequences_follow_the_students_law(
    engines: tuple[Any, Any], student: Qwen3ForCausalLM, teacher: Qwen3ForCausalLM
) -> None:
    generations = call(engines[0].generate, law_requests("law"))
    sequences = as_tuples(generations)
    assert surprise(sequences, law_of(student)) < FALSE_ALARM
    assert surprise(sequences, law_of(teacher)) > 50
    assert surprise(sequences, law_of(student, temperature=1.15)) > FALSE_ALARM
    for sequence, generation in zip(sequences, generations, strict=True):
        assert generation.finish_reason == ("stop" if sequence[-1] == STOP else "length")
        assert len(sequence) == NUM_TOKENS or sequence[-1] == STOP


@pytest.mark.parametrize("epsilon", [0.05, 0.5])
def test_blended_sequences_follow_mu_and_not_the_student(
    engines: tuple[Any, Any], student: Qwen3ForCausalLM, teacher: Qwen3ForCausalLM, epsilon: float
) -> None:
    generations = call(engines[1].generate_blended, law_requests(f"law-{epsilon}"), epsilon)
    sequences = as_tuples(generations)
    pi_s, pi_t = law_of(student), law_of(teacher)
    assert surprise(sequences, blend_of(pi_s, pi_t, epsilon)) < FALSE_ALARM
    assert surprise(sequences, pi_s) > 10
    assert surprise(sequences, pi_t) > 10
    assert surprise(sequences, blend_of(pi_s, pi_t, 2 * epsilon)) > FALSE_ALARM
    accepted = np.concatenate([g.accepted for g in generations])
    assert 1 - math.sqrt(epsilon / 2) < accepted.mean() < 1  # Pinsker


def test_recorded_laws_of_generated_tokens_are_the_models(engines: tuple[Any, Any], student: Qwen3ForCausalLM) -> None:
    requests = long_requests()
    for request, generation in zip(requests, call(engines[0].generate, requests), strict=True):
        laws = laws_along(student, request.prompt_ids, generation.token_ids)
        check_support(laws, generation.support_ids, generation.support_logprobs, generation.tail_logprobs)
        expected = laws.gather(1, torch.tensor(generation.token_ids).long()[:, None])[:, 0]
        np.testing.assert_allclose(generation.token_logprobs, expected, atol=1e-4)
        assert (np.diff(generation.support_logprobs, axis=1) <= 0).all()


def test_recorded_laws_of_blended_tokens_are_the_models_and_mu(
    engines: tuple[Any, Any], student: Qwen3ForCausalLM, teacher: Qwen3ForCausalLM
) -> None:
    requests, epsilon = long_requests(), 0.2
    for request, g in zip(requests, call(engines[1].generate_blended, requests, epsilon), strict=True):
        pi_s, pi_t = (laws_along(model, request.prompt_ids, g.token_ids) for model in (student, teacher))
        mu = blend(pi_s, pi_t, epsilon)
        tokens = torch.tensor(g.token_ids).long()[:, None]
        for stored, laws in (
            (g.behaviour_logprobs, mu.logprobs),
            (g.student_logprobs, pi_s),
            (g.teacher_logprobs, pi_t),
        ):
            np.testing.assert_allclose(stored, laws.gather(1, tokens)[:, 0], atol=1e-4)
        np.testing.assert_allclose(g.beta, mu.beta, atol=1e-4)
        np.testing.assert_allclose(g.divergence, mu.divergence, atol=1e-4)
        np.testing.assert_array_equal(g.epsilon, np.float32(epsilon))
        check_support(pi_s, g.support_ids, g.support_student_logprobs, g.student_tail_logprobs)
        check_support(pi_t, g.support_ids, g.support_teacher_logprobs, g.teacher_tail_logprobs)
        assert (np.diff(g.support_student_logprobs, axis=1) <= 0).all()
        assert len(g.token_ids) == request.max_new_tokens or g.token_ids[-1] == STOP
        assert STOP not in g.token_ids[:-1]


def check_support(laws: Tensor, ids: np.ndarray, logprobs: np.ndarray, tail: np.ndarray) -> None:
    where = torch.tensor(ids).long()
    np.testing.assert_allclose(logprobs, laws.gather(1, where), atol=1e-4)
    np.testing.assert_allclose(tail, torch.logsumexp(laws.scatter(1, where, -torch.inf), dim=1), atol=1e-4)


def test_finished_completions_are_scored_at_whatever_ids_are_asked_for(
    engines: tuple[Any, Any], student: Qwen3ForCausalLM
) -> None:
    rng = np.random.default_rng(7)
    prompts = [request.prompt_ids for request in long_requests()]
    completions = [rng.integers(0, VOCABULARY, 1 + i % 29).astype(np.int32) for i in range(len(prompts))]
    supports = [rng.permuted(np.tile(np.arange(VOCABULARY), (len(c), 1)), axis=1)[:, :5] for c in completions]
    scores = call(engines[0].score_completions, prompts, completions, supports)
    for prompt, completion, support, score in zip(prompts, completions, supports, scores, strict=True):
        laws = laws_along(student, prompt, completion)
        assert score.support_logprobs.shape == (1, len(completion), 5)
        check_support(laws, support, score.support_logprobs[0], score.tail_logprobs[0])
        expected = laws.gather(1, torch.tensor(completion).long()[:, None])[:, 0]
        np.testing.assert_allclose(score.token_logprobs[0], expected, atol=1e-4)


def test_a_draw_depends_on_its_request_alone_not_on_batch_drafts_or_engine(engines: tuple[Any, Any]) -> None:
    requests = long_requests()
    together = as_tuples(call(engines[0].generate, requests))
    assert as_tuples(call(engines[0].generate, requests[6:3:-1])) == together[6:3:-1]
    assert len(set(together)) > 100
    # With no budget every draft is kept, and drafts are the student's own draws, three at a time.
    blended = call(engines[1].generate_blended, requests, 0.0)
    assert as_tuples(blended) == together
    assert all(g.accepted.all() and (g.beta == 0).all() for g in blended)


def test_a_prompt_may_end_with_the_stop_token(engines: tuple[Any, Any], student: Qwen3ForCausalLM) -> None:
    requests = [
        SequenceRequest(prompt_id="turn", sample_index=i, prompt_ids=(1, 4, STOP), max_new_tokens=12) for i in range(20)
    ]
    generations = call(engines[1].generate_blended, requests, 0.1)
    assert as_tuples(generations) != [()] * 20
    for generation in generations:
        assert STOP not in generation.token_ids[:-1]
        assert generation.finish_reason == ("stop" if generation.token_ids[-1] == STOP else "length")
        laws = laws_along(student, (1, 4, STOP), generation.token_ids)
        expected = laws.gather(1, torch.tensor(generation.token_ids).long()[:, None])[:, 0]
        np.testing.assert_allclose(generation.student_logprobs, expected, atol=1e-4)


def test_new_weights_change_the_law_and_are_stamped(
    engines: tuple[Any, Any], student: Qwen3ForCausalLM, teacher: Qwen3ForCausalLM, other: Qwen3ForCausalLM
) -> None:
    requests = long_requests()
    plain, blending = engines
    try:
        for version, model in ((3, other), (4, student), (5, other)):
            weights = [(name, tensor.float()) for name, tensor in model.named_parameters()]
            ray.get([engine.load_weights.remote(weights, version) for engine in engines])
            for request, g in zip(requests, call(plain.generate, requests), strict=True):
                laws = laws_along(model, request.prompt_ids, g.token_ids)
                check_support(laws, g.support_ids, g.support_logprobs, g.tail_logprobs)
                assert (g.policy_versions == version).all()
            for request, b in zip(requests, call(blending.generate_blended, requests, 0.1), strict=True):
                pi_s, pi_t = (laws_along(m, request.prompt_ids, b.token_ids) for m in (model, teacher))
                check_support(pi_s, b.support_ids, b.support_student_logprobs, b.student_tail_logprobs)
                check_support(pi_t, b.support_ids, b.support_teacher_logprobs, b.teacher_tail_logprobs)
                assert (b.policy_versions == version).all()
    finally:
        weights = [(name, tensor.float()) for name, tensor in student.named_parameters()]
        ray.get([engine.load_weights.remote(weights, 0) for engine in engines])


def test_requests_that_cannot_be_drawn_exactly_are_refused(engines: tuple[Any, Any]) -> None:
    one = SequenceRequest(prompt_id="one", sample_index=0, prompt_ids=(1,), max_new_tokens=4)
    with pytest.raises(ValueError, match="at least 2 tokens"):
        call(engines[1].generate_blended, [one], 0.1)
    with pytest.raises(ValueError, match="epsilon must be finite"):
        call(engines[1].generate_blended, law_requests("refused")[:1], -0.1)


def started_with(variables: dict[str, str], preamble: str = "") -> str:
    """What a new Python says when it builds an engine."""
    script = f"import sys\n{preamble}\nfrom actors.engines.vllm_engine import VllmEngine\n" + (
        "try:\n"
        "    VllmEngine(model='none', seed=0, temperature=1.0, support_size=4, stop_token_id=2, max_model_len=8)\n"
        "except RuntimeError as error:\n    print(type(error).__name__, error)"
    )
    clean = {k: v for k, v in os.environ.items() if not k.startswith("VLLM")}
    done = subprocess.run(
        [sys.executable, "-c", script],
        cwd=Path(__file__).parents[2],
        env={**clean, **variables},
        capture_output=True,
        text=True,
        check=True,
    )
    return done.stdout


def test_a_wrong_environment_a_missing_and_a_wrong_vllm_are_told_apart(tmp_path: Path) -> None:
    said = started_with({})
    assert said.startswith(EngineError.__name__)
    assert "VLLM_ENABLE_V1_MULTIPROCESSING=0" in said
    said = started_with(environment(1, 1.0), "sys.modules['vllm'] = None")
    assert "tutelage[vllm]" in said
    assert "tutelage[vllm-cpu]" in said
    (tmp_path / "vllm.py").write_text("__version__ = '0.31.4'\n")
    said = started_with(environment(1, 1.0), f"sys.path.insert(0, {str(tmp_path)!r})")
    assert "needs vLLM 0.32" in said
    assert "got 0.31.4" in said
