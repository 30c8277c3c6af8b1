"""Counter-based random numbers: the published known answers, independence of the batch, uniformity."""

import math

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from actors.random_numbers import Purpose, philox4x32, sample_from_logprobs, uniforms

# Known answers of Random123's kat_vectors for philox4x32, 10 rounds.
KNOWN_ANSWERS = [
    ((0, 0, 0, 0), (0, 0), (0x6627E8D5, 0xE169C58D, 0xBC57AC4C, 0x9B00DBD8)),
    ((0xFFFFFFFF,) * 4, (0xFFFFFFFF,) * 2, (0x408F276D, 0x41C83B0E, 0xA20BC7C6, 0x6D5451FD)),
    (
        (0x243F6A88, 0x85A308D3, 0x13198A2E, 0x03707344),
        (0xA4093822, 0x299F31D0),
        (0xD16CFE09, 0x94FDCCEB, 0x5001E420, 0x24126EA1),
    ),
]


@pytest.mark.parametrize(("counter", "key", "expected"), KNOWN_ANSWERS)
def test_philox_gives_the_published_answers(
    counter: tuple[int, ...], key: tuple[int, ...], expected: tuple[int, ...]
) -> None:
    words = philox4x32(np.array([counter], np.uint64), np.array([key], np.uint64))
    assert tuple(words[0].tolist()) == expected


@given(
    st.lists(
        st.tuples(st.text(max_size=5), st.integers(0, 2**31 - 1), st.integers(0, 2**31 - 1)), min_size=1, max_size=8
    ),
    st.sampled_from(list(Purpose)),
    st.integers(0, 2**63),
)
def test_a_draw_does_not_depend_on_its_batch(triples: list[tuple[str, int, int]], purpose: Purpose, seed: int) -> None:
    ids, samples, positions = zip(*triples, strict=True)
    together = uniforms(seed, ids, samples, positions, purpose)
    alone = [uniforms(seed, [p], [s], [t], purpose)[0] for p, s, t in triples]
    assert together.tolist() == alone
    assert ((together >= 0) & (together < 1)).all()


def test_each_part_of_the_key_changes_the_draw() -> None:
    draws = {
        float(uniforms(seed, [prompt], [sample], [position], purpose)[0])
        for seed in (0, 1)
        for prompt in ("a", "b")
        for sample in (0, 1)
        for position in (0, 1)
        for purpose in Purpose
    }
    assert len(draws) == 2**4 * len(Purpose)


def test_draws_are_uniform() -> None:
    """Chi-square over 100 cells, 10^5 draws: false-alarm rate below 1e-9 at z = 6; squares of them must fail."""
    draws = uniforms(3, ["p"] * 100_000, [0] * 100_000, np.arange(100_000), Purpose.TOKEN)

    def z_score(values: np.ndarray) -> float:  # type: ignore[type-arg]
        counts = np.histogram(values, bins=100, range=(0, 1))[0]
        chi_square = float(((counts - 1000) ** 2 / 1000).sum())
        return (chi_square - 99) / math.sqrt(2 * 99)

    assert abs(z_score(draws)) < 6
    assert z_score(draws**2) > 6


def test_sampling_inverts_the_cumulative_distribution() -> None:
    law = torch.tensor([[0.2, 0.0, 0.5, 0.3]]).log()
    for u, expected in ((0.0, 0), (0.1999, 0), (0.2001, 2), (0.6999, 2), (0.7001, 3), (1 - 2**-53, 3)):
        assert sample_from_logprobs(law, torch.tensor([u], dtype=torch.float64)).tolist() == [expected]


@given(st.integers(0, 2**32 - 1), st.integers(2, 50))
def test_a_token_without_mass_is_never_drawn(seed: int, vocab: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    logprobs = torch.randn(64, vocab, generator=generator) * 20
    logprobs[:, 0] = logprobs[:, -1] = -torch.inf
    if vocab == 2:
        logprobs[:, 0] = 0.0
    extremes = torch.tensor([0.0, 1 - 2**-53], dtype=torch.float64)
    draws = torch.cat([extremes, torch.rand(62, dtype=torch.float64, generator=generator)])
    ids = sample_from_logprobs(logprobs, draws)
    assert logprobs.gather(-1, ids[:, None]).isfinite().all()
