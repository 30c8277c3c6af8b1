"""How many tokens are drafted: the cheapest length, found from estimates that forget. Milliseconds."""

import numpy as np
import pytest

from actors.config import CostsSection
from actors.draft_length import (
    MAX_DRAFT_LENGTH,
    AdaptiveLength,
    MeasuredLength,
    Observation,
    cheapest_length,
)


def observation(k: int, accepted: int, refused: int, *, rows: int = 16, **seconds: float) -> Observation:
    times = {"student_s": 0.0, "teacher_s": 0.0, "round_s": 0.0} | seconds
    return Observation(num_rows=rows, draft_length=k, num_accepted=accepted, num_refused=refused, **times)


@pytest.mark.parametrize("acceptance", [0.3, 0.8, 0.9, 0.97, 0.995])
@pytest.mark.parametrize(("draft", "once", "position"), [(1, 3, 0.5), (1, 0, 0.2), (0.2, 10, 0), (1, 1, 1)])
def test_the_cheapest_length_is_that_of_a_simulation(
    acceptance: float, draft: float, once: float, position: float
) -> None:
    rng = np.random.default_rng(0)
    first_refused = rng.geometric(1 - acceptance, size=20_000)
    lengths = np.arange(1, MAX_DRAFT_LENGTH + 1)
    emitted = np.minimum(first_refused[:, None], lengths).mean(0)
    speed = emitted / (once + lengths * (draft + position))
    chosen = cheapest_length(acceptance, draft=draft, once=once, position=position)
    assert speed[chosen - 1] > 0.99 * speed.max()
    assert speed[chosen - 1] >= speed[0] * 0.99, "never slower than lockstep"


def test_a_round_that_costs_nothing_by_itself_is_lockstep_and_a_dear_one_is_long() -> None:
    assert cheapest_length(0.9, draft=1, once=0, position=1) == 1
    assert cheapest_length(0.999, draft=0.001, once=100, position=0) == MAX_DRAFT_LENGTH


def test_acceptance_is_learned_from_the_drafts_that_were_decided() -> None:
    adaptive = AdaptiveLength(CostsSection(), prior=0.9)
    expected = adaptive.choose(16)
    for _ in range(30):
        adaptive.observe(observation(8, accepted=128, refused=0))
    assert adaptive.choose(16) > 2 * expected
    for _ in range(60):
        adaptive.observe(observation(8, accepted=16, refused=16))
    assert adaptive.choose(16) < expected


def test_the_fixed_costs_make_the_choice_a_function_of_the_rounds_alone() -> None:
    chosen = []
    for seconds in (0.001, 5.0):
        adaptive = AdaptiveLength(CostsSection(), prior=0.95)
        for accepted in (100, 90, 120):
            adaptive.observe(observation(8, accepted, 5, student_s=seconds, teacher_s=seconds, round_s=seconds))
        chosen.append(adaptive.choose(16))
    assert chosen[0] == chosen[1]


@pytest.mark.parametrize(("draft_s", "pass_s", "position_s"), [(0.002, 0.02, 1e-5), (0.01, 0.001, 0.0005)])
def test_measured_costs_lead_to_the_length_that_true_costs_would(
    draft_s: float, pass_s: float, position_s: float
) -> None:
    measured, rows, rng = MeasuredLength(prior=0.95), 16, np.random.default_rng(0)
    for _ in range(40):
        k = measured.choose(rows)
        noise = rng.uniform(0.9, 1.1, 3)
        first_refused = np.minimum(rng.geometric(0.05, rows), k + 1)
        measured.observe(
            observation(
                k, accepted=int((first_refused - 1).sum()), refused=int((first_refused <= k).sum()), rows=rows,
                student_s=draft_s * k * noise[0], teacher_s=(pass_s + position_s * rows * k) * noise[1],
                round_s=0.001 * noise[2],
            )
        )  # fmt: skip
    costs = {"draft": draft_s, "once": pass_s + 0.001, "position": position_s * rows}

    def speed(k: int) -> float:
        return float((1 - 0.95**k) / 0.05 / (costs["once"] + k * (costs["draft"] + costs["position"])))

    assert speed(measured.choose(rows)) > 0.93 * speed(cheapest_length(0.95, **costs))
