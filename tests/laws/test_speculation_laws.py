"""Whole sequences from two torch engines in this process, against every sequence enumerated in float64. About 20 s.

More sequences are asked for than are open at once, so places are filled as they fall free. False alarms: 1e-9 each.
"""

import itertools
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import Qwen3ForCausalLM

import actors.speculation
import actors.verification
from actors.behaviours import TrustRegion
from actors.config import CostsSection
from actors.draft_length import AdaptiveLength, DraftLength, FixedLength
from actors.engines.protocol import SequenceRequest
from actors.engines.torch_engine import TorchEngine
from actors.head import Head
from actors.one_engine import LocalSide
from actors.random_numbers import sample_from_logprobs
from actors.speculation import Sampled, SideLostError, Speculation
from actors.trust_region import Blend, Verdict, verify_target
from tests.exact_laws import (
    FALSE_ALARM,
    NUM_TOKENS,
    PROMPT,
    STOP,
    NextLaw,
    blend_of,
    law_of,
    make_model,
    surprise,
    truncated_blend_of,
)

NUM_SAMPLES = 10_000


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("models")


@pytest.fixture(scope="module")
def student(folder: Path) -> Qwen3ForCausalLM:
    return make_model(folder / "student", seed=1, hidden_size=32, tied=True, scale=0.2)


@pytest.fixture(scope="module")
def teacher(folder: Path) -> Qwen3ForCausalLM:
    return make_model(folder / "teacher", seed=2, hidden_size=64, tied=False, scale=0.15)


def engine(folder: Path, name: str, support_size: int | None, stops: tuple[int, ...] = (STOP,)) -> TorchEngine:
    return TorchEngine(model=str(folder / name), seed=3, head=Head(stop_token_ids=stops), support_size=support_size)


def speculation(
    folder: Path, support_size: int | None, epsilon: float, length: DraftLength, **options: Any
) -> Speculation:
    settings: dict[str, Any] = {"seed": 3, "stop_token_id": STOP, "max_num_sequences": 2500} | options
    stops = settings.pop("stops", (STOP,))
    return Speculation(
        LocalSide(engine(folder, "student", support_size, stops)),
        LocalSide(engine(folder, "teacher", support_size, stops)),
        behaviour=TrustRegion(epsilon=epsilon), draft_length=length, **settings,
    )  # fmt: skip


def requests(count: int, name: str = "law", length: int = NUM_TOKENS) -> list[SequenceRequest]:
    return [
        SequenceRequest(prompt_id=name, sample_index=i, prompt_ids=PROMPT, max_new_tokens=length) for i in range(count)
    ]


def sequences(sampled: Sampled) -> list[tuple[int, ...]]:
    ids, bounds = sampled.tokens.token_ids.tolist(), sampled.bounds.tolist()
    return [tuple(ids[first:last]) for first, last in itertools.pairwise(bounds)]


def mu_of(student: Qwen3ForCausalLM, teacher: Qwen3ForCausalLM, epsilon: float, size: int | None) -> NextLaw:
    pi_s, pi_t = law_of(student), law_of(teacher)
    return blend_of(pi_s, pi_t, epsilon) if size is None else truncated_blend_of(pi_s, pi_t, epsilon, size)


@pytest.mark.parametrize("epsilon", [0.05, 0.5])
@pytest.mark.parametrize(
    ("support_size", "length"), [(None, FixedLength(length=4)), (3, FixedLength(length=2)), (1, None)]
)
def test_sequences_follow_mu(
    folder: Path, student: Qwen3ForCausalLM, teacher: Qwen3ForCausalLM, support_size: int | None,
    length: DraftLength | None, epsilon: float,
) -> None:  # fmt: skip
    chooses = length or AdaptiveLength(CostsSection(), prior=0.8)
    sampled = sequences(speculation(folder, support_size, epsilon, chooses, overlap=True).run(requests(NUM_SAMPLES)))
    assert surprise(sampled, mu_of(student, teacher, epsilon, support_size)) < FALSE_ALARM
    assert surprise(sampled, law_of(student)) > FALSE_ALARM, "control: the student"


def without_residual(
    draft_ids: torch.Tensor, student_logprobs: torch.Tensor, target: Blend, *, uniforms: torch.Tensor, **options: Any
) -> Verdict:
    """A refused draft is redrawn from mu itself."""
    verdict = verify_target(draft_ids, student_logprobs, target, uniforms=uniforms, **options)
    rows = torch.arange(len(draft_ids))
    place = verdict.num_accepted.clamp(max=draft_ids.shape[1] - 1)
    redrawn = sample_from_logprobs(target.logprobs[rows, place], uniforms[rows, place, 1])
    return verdict._replace(replacement_ids=torch.where(verdict.replacement_ids < 0, -1, redrawn))


def with_bonus(
    draft_ids: torch.Tensor, student_logprobs: torch.Tensor, target: Blend, *, uniforms: torch.Tensor, **options: Any
) -> Verdict:
    """The last draft is kept without being verified."""
    uniforms = uniforms.clone()
    uniforms[:, -1, 0] = 0.0
    return verify_target(draft_ids, student_logprobs, target, uniforms=uniforms, **options)


@pytest.mark.parametrize("sabotage", [without_residual, with_bonus])
def test_the_test_would_notice(
    folder: Path, student: Qwen3ForCausalLM, teacher: Qwen3ForCausalLM, monkeypatch: pytest.MonkeyPatch,
    sabotage: Callable[..., Verdict],
) -> None:  # fmt: skip
    monkeypatch.setattr(actors.verification, "verify_target", sabotage)
    sampled = sequences(speculation(folder, 3, 0.5, FixedLength(length=2)).run(requests(NUM_SAMPLES)))
    assert surprise(sampled, mu_of(student, teacher, 0.5, 3)) > FALSE_ALARM


def test_what_is_sampled_depends_on_no_batch_draft_length_or_lane(
    folder: Path, student: Qwen3ForCausalLM, teacher: Qwen3ForCausalLM
) -> None:
    asked = requests(80, "same", 20)
    made = [
        sequences(speculation(folder, 3, 0.1, FixedLength(length=k), **options).run(asked))
        for k, options in (
            (1, {}), (4, {"overlap": True}), (7, {"max_num_sequences": 5}), (64, {"max_num_sequences": 1})
        )
    ]  # fmt: skip
    assert made[0] == made[1] == made[2] == made[3]


def test_a_sequence_that_has_begun_elsewhere_goes_on_as_it_would_have(
    folder: Path, student: Qwen3ForCausalLM, teacher: Qwen3ForCausalLM
) -> None:
    asked = requests(20, "begun", 20)
    whole = sequences(speculation(folder, 3, 0.1, FixedLength(length=3)).run(asked))
    begun = [
        SequenceRequest(
            prompt_id=r.prompt_id, sample_index=r.sample_index, prompt_ids=r.prompt_ids, max_new_tokens=20,
            completion_ids=ids[:5],
        )
        for r, ids in zip(asked, whole, strict=True) if len(ids) > 5
    ]  # fmt: skip
    rest = sequences(speculation(folder, 3, 0.1, FixedLength(length=3)).run(begun))
    assert rest == [ids[5:] for ids in whole if len(ids) > 5]


class Forgetful(LocalSide):
    """An engine's side that is lost in its third round, once."""

    calls = 0

    def score(self, *arguments: Any) -> Any:
        self.calls += 1
        if self.calls == 3:
            raise SideLostError("gone")
        return super().score(*arguments)

    def recover(self) -> None:
        self._engine.close(list(self._engine._sequences))  # type: ignore[attr-defined]


def test_a_lost_side_costs_no_token(folder: Path, student: Qwen3ForCausalLM, teacher: Qwen3ForCausalLM) -> None:
    asked = requests(40, "lost", 20)
    whole = sequences(speculation(folder, 3, 0.1, FixedLength(length=3)).run(asked))
    sides = [Forgetful(engine(folder, name, 3)) for name in ("student", "teacher")]
    again = Speculation(
        sides[0], sides[1], behaviour=TrustRegion(epsilon=0.1), draft_length=FixedLength(length=3), seed=3,
        stop_token_id=STOP, max_num_sequences=30,
    )  # fmt: skip
    assert sequences(again.run(asked)) == whole
    assert 0 < again.meter.num_reopened <= 30


def test_models_that_end_texts_otherwise_share_one_stop_event(
    folder: Path, student: Qwen3ForCausalLM, teacher: Qwen3ForCausalLM
) -> None:
    """The mass of token 5 counts as the stop token's in both laws, before anything is drawn or compared."""

    def merged(law: NextLaw) -> NextLaw:
        def next_law(ids: torch.Tensor) -> torch.Tensor:
            laws = law(ids)
            event = torch.logaddexp(laws[:, STOP], laws[:, 5])
            laws = laws.clone()
            laws[:, 5], laws[:, STOP] = -torch.inf, event
            return laws

        return next_law

    sampled = speculation(folder, None, 0.3, FixedLength(length=3), stops=(STOP, 5)).run(requests(NUM_SAMPLES))
    assert not (sampled.tokens.token_ids == 5).any()
    pi_s, pi_t = merged(law_of(student)), merged(law_of(teacher))
    assert surprise(sequences(sampled), blend_of(pi_s, pi_t, 0.3)) < FALSE_ALARM
    assert surprise(sequences(sampled), blend_of(law_of(student), law_of(teacher), 0.3)) > FALSE_ALARM
