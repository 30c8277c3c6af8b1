"""pass@k and the standard error of a mean. Well under a second."""

import math

import numpy as np
import pytest

from rewards import pass_at_k
from rewards.pass_at_k import mean_and_standard_error


def test_numbers_give_a_float_and_arrays_a_float64_array() -> None:
    assert type(pass_at_k(8, 2, 1)) is float
    table = pass_at_k(8, np.array([[0], [2], [8]]), [1, 8])
    assert table.dtype == np.float64
    np.testing.assert_array_equal(table, [[0, 0], [0.25, 1], [1, 1]])
    assert pass_at_k(8, np.zeros(0, dtype=np.int64), 1).shape == (0,)


def test_a_thousand_samples_stay_exact() -> None:
    assert pass_at_k(1024, 1, 1) == 1 / 1024
    assert pass_at_k(1024, 1, 256) == 0.25
    assert pass_at_k(1024, 512, 512) == 1.0
    assert pass_at_k(1024, 0, 1024) == 0.0
    product = 1 - math.prod(1 - 100 / i for i in range(1024 - 7 + 1, 1025))
    assert pass_at_k(1024, 7, 100) == pytest.approx(product, rel=1e-12)


@pytest.mark.parametrize(
    ("counts", "sentence"),
    [
        ((8, 2, 0), "k between 1 and num_samples, got k = 0 with num_samples = 8"),
        ((8, 2, -1), "k between 1 and num_samples, got k = -1"),
        ((8, 2, 9), "k between 1 and num_samples, got k = 9"),
        ((8, 9, 1), "num_correct between 0 and num_samples, got num_correct = 9 with num_samples = 8"),
        ((8, -1, 1), "num_correct between 0 and num_samples, got num_correct = -1"),
        ((0, 0, 1), "k between 1 and num_samples, got k = 1 with num_samples = 0"),
        ((-8, 0, 1), "num_correct between 0 and num_samples"),
        ((8, [0, 3, 9], 1), "num_correct between 0 and num_samples, got num_correct = 9"),
        ((8, 0.5, 1), "whole numbers, but num_correct holds others"),
        ((8, 2, math.nan), "whole numbers, but k holds others"),
        ((math.inf, 2, 1), "whole numbers, but num_samples holds others"),
    ],
)
def test_impossible_counts_are_refused_in_one_sentence(counts: tuple[int, int, int], sentence: str) -> None:
    with pytest.raises(ValueError, match=sentence) as caught:
        pass_at_k(*counts)
    assert "\n" not in str(caught.value)


def test_the_standard_error_is_that_of_independent_prompts() -> None:
    mean, error = mean_and_standard_error([1.0, 0.0, 0.5, 0.5])
    assert mean == 0.5
    assert error == pytest.approx(math.sqrt((0.25 + 0.25) / 3 / 4))
    assert mean_and_standard_error(np.ones(9)) == (1.0, 0.0)
    mean, error = mean_and_standard_error([0.25])
    assert mean == 0.25
    assert math.isnan(error)


@pytest.mark.parametrize("values", [[], [[0.5]], [0.5, math.nan], [math.inf]])
def test_a_mean_of_nothing_or_of_what_is_not_finite_is_refused(values: list[float]) -> None:
    with pytest.raises(ValueError, match="one finite value per prompt"):
        mean_and_standard_error(values)
