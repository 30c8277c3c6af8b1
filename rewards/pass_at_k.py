"""pass@k, and the mean with its standard error over prompts."""

import math
from collections.abc import Sequence
from functools import lru_cache
from typing import Any, overload

import numpy as np
import numpy.typing as npt

Counts = npt.NDArray[np.integer[Any]] | Sequence[int]


@overload
def pass_at_k(num_samples: int, num_correct: int, k: int) -> float: ...
@overload
def pass_at_k(num_samples: int | Counts, num_correct: Counts, k: int | Counts) -> npt.NDArray[np.float64]: ...
def pass_at_k(num_samples: int | Counts, num_correct: int | Counts, k: int | Counts) -> float | npt.NDArray[np.float64]:
    """Return the unbiased estimate of the probability that k samples hold a correct one.

    `1 - C(n - c, k) / C(n, k)` for c correct among n samples (Chen et al. 2021, section 2.1): the share of the
    k-subsets of the n samples with a correct member. The binomials are exact integers and divided once, so the value
    is the correctly rounded one for every n.

    Args:
        num_samples: n per prompt; a number, or an array that broadcasts with the others.
        num_correct: c per prompt, likewise.
        k: at least 1, at most n, likewise.

    Returns:
        A float if all three are numbers, else a float64 array of the broadcast shape.

    Raises:
        ValueError: if a value is no whole number, c is not in 0..n, or k is not in 1..n.

    Example:
        >>> pass_at_k(8, 2, 1)
        0.25
        >>> pass_at_k(4, [0, 1, 4], 2).tolist()
        [0.0, 0.5, 1.0]
    """
    n, c, size = np.broadcast_arrays(*(np.asarray(value) for value in (num_samples, num_correct, k)))
    for name, values in (("num_samples", n), ("num_correct", c), ("k", size)):
        if not np.all(np.isfinite(values) & (values == np.floor(values))):
            raise ValueError(f"pass_at_k needs whole numbers, but {name} holds others")
    for name, values, least, wrong in (
        ("num_correct", c, "0", (c < 0) | (c > n)),
        ("k", size, "1", (size < 1) | (size > n)),
    ):
        if np.any(wrong):
            first = int(np.flatnonzero(wrong)[0])
            raise ValueError(
                f"pass_at_k needs {name} between {least} and num_samples, "
                f"got {name} = {values.flat[first]} with num_samples = {n.flat[first]}"
            )
    rows = zip(n.flat, c.flat, size.flat, strict=True)
    shares = np.array([_share(int(a), int(b), int(d)) for a, b, d in rows], dtype=np.float64).reshape(n.shape)
    return shares if shares.ndim else float(shares)


@lru_cache(maxsize=65536)
def _share(n: int, c: int, k: int) -> float:
    all_subsets = math.comb(n, k)
    return (all_subsets - math.comb(n - c, k)) / all_subsets


def mean_and_standard_error(values: npt.ArrayLike) -> tuple[float, float]:
    """Return the mean of one value per prompt, and its standard error over the draw of prompts.

    The standard error is the sample standard deviation (n - 1 in the denominator) over sqrt(n); a single value says
    nothing of its spread, so there it is nan.

    Args:
        values: [n], for instance each prompt's pass@8.

    Raises:
        ValueError: if there are no values, or one is not finite.

    Example:
        >>> mean_and_standard_error([0.0, 1.0, 1.0, 0.0])
        (0.5, 0.28867513459481287)
    """
    array = np.asarray(values, dtype=np.float64)
    if array.ndim != 1 or not array.size or not np.all(np.isfinite(array)):
        raise ValueError(f"a mean over prompts needs one finite value per prompt, got an array of shape {array.shape}")
    error = float(np.std(array, ddof=1) / math.sqrt(array.size)) if array.size > 1 else math.nan
    return float(np.mean(array)), error
