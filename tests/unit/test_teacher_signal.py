"""What the learner is told of the teacher, against laws enumerated in float64, and what it costs."""

from dataclasses import replace
from pathlib import Path
from typing import Any, Literal

import numpy as np
import pyarrow as pa
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import GraniteConfig, GraniteForCausalLM, Qwen3ForCausalLM

from actors.engines.errors import EngineError
from actors.engines.protocol import Ints
from actors.engines.torch_engine import TorchEngine
from actors.experience import (
    LEARNED_COLUMNS,
    BlendTrace,
    Completion,
    Prompt,
    Rollout,
    TeacherScores,
    rollouts_from_arrow,
    rollouts_to_arrow,
)
from actors.head import Head
from actors.teacher import with_hidden, with_signal
from actors.teacher_signal import STUDENTS_SUPPORT, SignalSpec, with_own_scores
from learner.config import DistillationSection
from orchestrator.errors import UserError
from orchestrator.teacher_signal import Kept, plan, signal_spec
from rewards.grader_actor import with_only
from tests.exact_laws import STOP, VOCABULARY, laws_along, make_model

HIDDEN_SIZE = 32
ONE_STOP = Head(stop_token_ids=(STOP,))
PROMPTS = [(1, 5, 3), (1,), (1, 7, 7, 4, 6)]
COMPLETIONS: list[Ints] = [np.array(ids, np.int32) for ids in ([4, 5, 6, 2], [7], [3, 3, 5, 4, 6, 7, 2])]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("teacher")


@pytest.fixture(scope="module")
def teacher(folder: Path) -> Qwen3ForCausalLM:
    return make_model(folder, seed=2, hidden_size=HIDDEN_SIZE, tied=False, scale=0.3)


@pytest.fixture(scope="module")
def engine(folder: Path, teacher: Qwen3ForCausalLM) -> TorchEngine:
    return TorchEngine(model=str(folder), seed=0, head=ONE_STOP, support_size=3)


def random_support(rng: np.random.Generator, num_tokens: int, size: int) -> Ints:
    return np.stack([rng.permutation(VOCABULARY)[:size] for _ in range(num_tokens)]).astype(np.int32)


def scored_rollouts(support_size: int = 3, seed: int = 0) -> list[Rollout]:
    """Rollouts as a blend leaves them, with random numbers for log-probs."""
    rng = np.random.default_rng(seed)
    rollouts = []
    for index, (prompt, ids) in enumerate(zip(PROMPTS, COMPLETIONS, strict=True)):
        law = np.log(rng.dirichlet(np.ones(VOCABULARY), len(ids)))
        support = random_support(rng, len(ids), support_size)
        outside = law.copy()
        np.put_along_axis(outside, support.astype(int), -np.inf, 1)
        told = np.take_along_axis(law, support.astype(int), 1).astype(np.float32)
        tails = np.logaddexp.reduce(outside, 1).astype(np.float32)
        drawn = np.take_along_axis(law, ids[:, None].astype(int), 1)[:, 0].astype(np.float32)
        rollouts.append(
            Rollout(
                prompt=Prompt(prompt_id=f"p{index}", text="", token_ids=prompt, task="addition", reference="3"),
                sample_index=0,
                completion=Completion(
                    token_ids=ids, behaviour_logprobs=drawn, student_logprobs=drawn, finish_reason="stop",
                    policy_versions=np.zeros(len(ids), np.int32),
                ),
                blend=BlendTrace(epsilon=drawn, beta=drawn, divergence=drawn, teacher_divergence=drawn,
                                 teacher_logprobs=drawn, accepted=drawn < 0),
                teacher=TeacherScores(support_ids=support, student_logprobs=told, student_tail_logprobs=tails,
                                      teacher_logprobs=told, teacher_tail_logprobs=tails),
            )
        )  # fmt: skip
    return rollouts


def test_the_output_head_makes_the_teachers_log_probs_of_its_hidden_states(
    engine: TorchEngine, teacher: Qwen3ForCausalLM
) -> None:
    everything = [np.tile(np.arange(VOCABULARY, dtype=np.int32), (len(ids), 1)) for ids in COMPLETIONS]
    scores = engine.score_completions(PROMPTS, COMPLETIONS, everything)
    hidden = engine.last_hidden(PROMPTS, COMPLETIONS)
    weight = teacher.lm_head.weight.float()
    for prompt, ids, states, told in zip(PROMPTS, COMPLETIONS, hidden, scores, strict=True):
        assert states.dtype == np.float32
        assert states.shape == (len(ids), HIDDEN_SIZE)
        made = ONE_STOP.logprobs(torch.from_numpy(states) @ weight.T)
        np.testing.assert_allclose(made.detach(), told.support_logprobs[0], atol=1e-5)
        np.testing.assert_allclose(made.detach(), laws_along(teacher, prompt, ids), atol=1e-5)


def test_bfloat16_states_travel_bit_by_bit(folder: Path, teacher: Qwen3ForCausalLM) -> None:
    engine = TorchEngine(model=str(folder), seed=0, head=ONE_STOP, support_size=3, dtype="bfloat16")
    told = engine.last_hidden(PROMPTS, COMPLETIONS)
    sent = with_hidden(scored_rollouts(), engine)
    back = rollouts_from_arrow(with_only(rollouts_to_arrow(sent), SignalSpec(kind="hidden").learned_columns))
    weight = teacher.lm_head.weight.bfloat16().float()
    for prompt, ids, rollout, states in zip(PROMPTS, COMPLETIONS, back, told, strict=True):
        assert rollout.teacher_hidden is not None
        assert rollout.teacher_hidden.dtype == np.uint16
        assert (rollout.teacher_hidden == states).all()
        values = torch.from_numpy(rollout.teacher_hidden.copy()).view(torch.bfloat16).float()
        made = torch.log_softmax(values @ weight.T, -1).detach()
        np.testing.assert_allclose(made, laws_along(teacher, prompt, ids), atol=0.1)


def test_a_teacher_that_does_more_to_its_logits_tells_no_hidden_states(tmp_path: Path) -> None:
    torch.manual_seed(0)
    GraniteForCausalLM(
        GraniteConfig(
            vocab_size=VOCABULARY, hidden_size=16, intermediate_size=16, num_hidden_layers=1, num_attention_heads=1,
            num_key_value_heads=1, logits_scaling=2.0, initializer_range=0.3,
        )
    ).save_pretrained(tmp_path)  # fmt: skip
    engine = TorchEngine(model=str(tmp_path), seed=0, head=ONE_STOP, support_size=3)
    with pytest.raises(EngineError, match="output head times its last hidden state"):
        engine.last_hidden(PROMPTS, COMPLETIONS)


@pytest.fixture(scope="module", params=[(STOP,), (STOP, 4), (STOP, 4, 6)], ids=["one-stop", "two-stops", "three-stops"])
def merging(request: pytest.FixtureRequest, folder: Path, teacher: Qwen3ForCausalLM) -> tuple[Head, TorchEngine]:
    """A head, and an engine that has it: several stop tokens leave ids without any mass."""
    head = Head(stop_token_ids=request.param)
    return head, TorchEngine(model=str(folder), seed=0, head=head, support_size=3)


@settings(max_examples=50)
@given(
    whose=st.sampled_from(["teacher", "union"]), size=st.integers(1, VOCABULARY), more=st.integers(0, 2),
    seed=st.integers(0, 99),
)  # fmt: skip
def test_the_teachers_likeliest_ids_come_with_their_log_probs_and_what_is_outside(
    merging: tuple[Head, TorchEngine], teacher: Qwen3ForCausalLM, whose: Any, size: int, more: int, seed: int
) -> None:
    head, engine = merging
    rng = np.random.default_rng(seed)
    supports = [random_support(rng, len(ids), min(size + more, VOCABULARY)) for ids in COMPLETIONS]
    signal = SignalSpec(support=whose, support_size=size)
    told = engine.score_beside(PROMPTS, COMPLETIONS, supports, signal)
    plain = engine.score_completions(PROMPTS, COMPLETIONS, supports)
    for prompt, ids, support, (scores, beside), alone in zip(PROMPTS, COMPLETIONS, supports, told, plain, strict=True):
        np.testing.assert_array_equal(scores.support_logprobs, alone.support_logprobs)
        law = head.merge(laws_along(teacher, prompt, ids)).numpy()
        assert beside.ids is not None
        assert beside.tail_logprobs is not None
        num_own = min(size, VOCABULARY) if whose == "union" else 0
        assert beside.ids.shape == (len(ids), min(num_own + size, VOCABULARY))
        for position, row in enumerate(beside.ids):
            assert len(set(row.tolist())) == len(row)
            assert row[:num_own].tolist() == support[position, :num_own].tolist()
            left = sorted(set(range(VOCABULARY)) - set(row.tolist()))
            taken, free = law[position][row[num_own:]], law[position][left]
            assert (taken[:-1] >= taken[1:]).all()
            if len(taken) and len(free):
                assert taken.min() >= free.max()
            np.testing.assert_allclose(beside.logprobs[position], law[position][row], atol=1e-5)
            np.testing.assert_allclose(beside.tail_logprobs[position], np.logaddexp.reduce([-np.inf, *free]), atol=1e-5)


def test_the_whole_law_comes_in_the_vocabularys_order(engine: TorchEngine, teacher: Qwen3ForCausalLM) -> None:
    supports = [random_support(np.random.default_rng(0), len(ids), 3) for ids in COMPLETIONS]
    told = engine.score_beside(PROMPTS, COMPLETIONS, supports, SignalSpec(kind="full"))
    for prompt, ids, (_, beside) in zip(PROMPTS, COMPLETIONS, told, strict=True):
        assert beside.ids is None
        assert beside.tail_logprobs is None
        np.testing.assert_allclose(beside.logprobs, laws_along(teacher, prompt, ids), atol=1e-5)


@pytest.mark.parametrize("size", [1, 2, 5])
def test_a_students_support_is_cut_to_its_first_ids_without_losing_mass(size: int) -> None:
    for rollout in scored_rollouts(support_size=5):
        told = with_own_scores(rollout, SignalSpec(support_size=size))
        assert told.teacher is rollout.teacher
        assert rollout.teacher is not None
        ids, logprobs, tails = told.learner_scores()
        assert ids is not None
        assert (ids == rollout.teacher.support_ids[:, :size]).all()
        assert rollout.teacher.teacher_logprobs is not None
        assert (logprobs == rollout.teacher.teacher_logprobs[:, :size]).all()
        np.testing.assert_allclose(np.exp(logprobs).sum(1) + np.exp(tails), 1, atol=1e-6)


def test_a_whole_law_is_made_of_scores_at_all_ids() -> None:
    for rollout in scored_rollouts(support_size=VOCABULARY):
        told = with_own_scores(rollout, SignalSpec(kind="full"))
        assert rollout.teacher is not None
        assert rollout.teacher.teacher_logprobs is not None
        ids, logprobs, tails = told.learner_scores()
        assert ids is None
        assert logprobs.shape == (rollout.completion.num_tokens, VOCABULARY)
        assert np.isneginf(tails).all()
        for position, (row, expected) in enumerate(
            zip(rollout.teacher.support_ids, rollout.teacher.teacher_logprobs, strict=True)
        ):
            assert (logprobs[position, row] == expected).all()


def test_of_a_drawn_token_the_learner_needs_one_column_besides_the_rollout() -> None:
    rollouts = scored_rollouts()
    signal = SignalSpec(kind="sampled")
    learned = rollouts_from_arrow(with_only(rollouts_to_arrow(rollouts), signal.learned_columns))
    for rollout, back in zip(rollouts, learned, strict=True):
        assert back.blend is None
        assert back.teacher is None
        assert rollout.blend is not None
        ids, logprobs, tails = back.learner_scores()
        assert ids is not None
        assert ids.tolist() == rollout.completion.token_ids[:, None].tolist()
        assert logprobs.tolist() == rollout.blend.teacher_logprobs[:, None].tolist()
        np.testing.assert_allclose(np.exp(logprobs[:, 0]) + np.exp(tails), 1, atol=1e-6)


def test_a_certain_token_leaves_nothing_outside() -> None:
    rollout = scored_rollouts()[0]
    assert rollout.blend is not None
    certain = replace(rollout, blend=replace(rollout.blend, teacher_logprobs=np.float32([0, 1e-7, -1e-3, -np.inf])))
    (back,) = rollouts_from_arrow(with_only(rollouts_to_arrow([certain]), SignalSpec(kind="sampled").learned_columns))
    tails = back.learner_scores()[2]
    np.testing.assert_allclose(tails, [-np.inf, -np.inf, np.log(-np.expm1(-1e-3)), 0], rtol=1e-4)


def test_the_default_signal_is_the_students_support_and_changes_nothing() -> None:
    assert STUDENTS_SUPPORT.learned_columns == LEARNED_COLUMNS
    for rollout in scored_rollouts():
        assert with_own_scores(rollout, STUDENTS_SUPPORT) is rollout


def test_an_engine_that_tells_no_more_is_named() -> None:
    batch = rollouts_to_arrow(scored_rollouts())
    for signal in (SignalSpec(kind="hidden"), SignalSpec(kind="full"), SignalSpec(support="teacher", support_size=2)):
        with pytest.raises(EngineError, match="engine must be torch"):
            with_signal(batch, object(), signal, 3)  # type: ignore[arg-type]


TEACHERS_COLUMNS = {
    "support_ids", "support_teacher_logprobs", "teacher_tail_logprobs", "teacher_logprobs", "teacher_hidden",
    "learned_ids", "learned_logprobs", "learned_tail_logprobs",
}  # fmt: skip
SECTIONS: list[dict[str, Any]] = [
    {"signal": "support", "support_size": 2},
    {"signal": "support", "support_size": 3},
    {"signal": "support", "support_size": 2, "support": "teacher"},
    {"signal": "support", "support_size": 2, "support": "union"},
    {"signal": "support", "support_size": 7, "support": "union"},
    {"signal": "sampled"},
    {"signal": "full"},
    {"signal": "hidden"},
]


@pytest.mark.parametrize("section", SECTIONS, ids=lambda section: "-".join(map(str, section.values())))
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_a_plan_counts_the_bytes_that_really_travel(
    folder: Path, teacher: Qwen3ForCausalLM, section: dict[str, Any], dtype: str
) -> None:
    engine = TorchEngine(model=str(folder), seed=0, head=ONE_STOP, support_size=3, dtype=dtype)
    settings = DistillationSection(**section)
    kept = 7 if settings.support_size == 7 else 3
    planned = plan(
        settings, vocab_size=VOCABULARY, hidden_size=HIDDEN_SIZE, hidden_bytes=2 if dtype == "bfloat16" else 4,
        blend_support_size=kept, engine_type="torch",
    )  # fmt: skip
    signal = signal_spec(settings, kept)
    batch = rollouts_to_arrow(scored_rollouts(kept))
    if not signal.is_in_every_rollout:
        batch = with_signal(batch, engine, signal, kept)
    own = signal.learned_columns & TEACHERS_COLUMNS
    told = with_only(batch, signal.learned_columns)
    assert sum(values_bytes(told.column(name)) for name in own) == planned.bytes_per_token * sum(map(len, COMPLETIONS))
    assert {name for name in TEACHERS_COLUMNS if told.column(name).null_count < len(COMPLETIONS)} == own


def values_bytes(column: pa.Array) -> int:
    """Bytes of the numbers in a column of lists, or of lists of lists."""
    while pa.types.is_nested(column.type):
        column = column.flatten()
    return len(column) * column.type.byte_width


def planned(
    engine_type: Literal["torch", "vllm"] = "torch", vocab_size: int = 100, hidden_size: int = 64, kept: Kept = 16,
    **section: Any,
) -> Any:  # fmt: skip
    return plan(
        DistillationSection(**section), vocab_size=vocab_size, hidden_size=hidden_size, hidden_bytes=4,
        blend_support_size=kept, engine_type=engine_type,
    )  # fmt: skip


@pytest.mark.parametrize(
    ("sizes", "limit", "kind", "size"),
    [
        ({"vocab_size": 100, "hidden_size": 64}, None, "hidden", 256),
        ({"vocab_size": 50, "hidden_size": 64}, None, "full", 200),
        ({"vocab_size": 100, "hidden_size": 64}, 256, "hidden", 256),
        ({"vocab_size": 100, "hidden_size": 64}, 255, "support", 132),
        ({"vocab_size": 100, "hidden_size": 64, "engine_type": "vllm"}, None, "support", 132),
        ({"vocab_size": 100, "hidden_size": 64, "engine_type": "vllm", "kept": "full"}, None, "full", 400),
    ],
)
def test_auto_is_the_cheapest_exact_signal_that_may_travel(
    sizes: dict[str, Any], limit: int | None, kind: str, size: int
) -> None:
    decided = planned(**sizes, signal="auto", max_bytes_per_token=limit)
    assert (decided.kind, decided.bytes_per_token) == (kind, size)
    assert f"{size} B/token" in decided.line


@pytest.mark.parametrize(
    ("section", "message"),
    [
        ({"signal": "hidden", "max_bytes_per_token": 255}, "max_bytes_per_token must be at least 256 .* got 255"),
        ({"signal": "auto", "max_bytes_per_token": 131}, "max_bytes_per_token must be at least 132 .* got 131"),
        ({"signal": "hidden", "engine_type": "vllm"}, "engine must be torch .* got vllm"),
        ({"support": "union", "engine_type": "vllm"}, "engine must be torch .* union, got vllm"),
        ({"signal": "full", "engine_type": "vllm"}, "rollouts.support_size must be full .* got 16"),
    ],
)
def test_what_cannot_travel_is_refused_in_a_sentence(section: dict[str, Any], message: str) -> None:
    with pytest.raises(UserError, match=message):
        planned(**section)


def test_samplers_are_told_no_size_where_the_learner_wants_all_that_is_kept() -> None:
    section = DistillationSection(support_size=16)
    assert signal_spec(section, 16) == signal_spec(None, 16) == STUDENTS_SUPPORT
    assert signal_spec(section, "full") == SignalSpec(support_size=16)
    assert signal_spec(section.model_copy(update={"support": "union"}), 16).support_size == 16
    with pytest.raises(ValueError, match="must be a number for the support union"):
        SignalSpec(support="union")
