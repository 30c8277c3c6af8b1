"""How the losses of a step's tokens make one number: the weight of each token."""

from collections.abc import Mapping

import numpy as np
import numpy.typing as npt


def token_weights(
    num_tokens: npt.NDArray[np.int64],
    trains: npt.NDArray[np.bool_],
    *,
    method: str,
    aggregation_tokens: int,
) -> npt.NDArray[np.float64]:
    """Return the weight [R] of each token of rollout r in the loss of the whole step; 0 where it does not train.

    With S the rollouts that train and have a token, and |r| the length of one of them:

    - `token_mean`: 1 / sum of |r| over S (arXiv 2503.14476)
    - `sequence_mean`: 1 / (|S| |r|) (arXiv 2402.03300)
    - `fixed`: 1 / (|S| aggregation_tokens), the same for long and short rollouts and for every step (arXiv 2503.20783)

    With the first two the weights of all tokens sum to 1.

    Args:
        num_tokens: [R] tokens of each completion of the step, over all ranks.
        trains: [R] whether it trains.
        method: one of the above.
        aggregation_tokens: of `fixed`, at least 1.
    """
    learned = trains & (num_tokens > 0)
    num_rollouts = int(learned.sum())
    if num_rollouts == 0:
        return np.zeros(len(num_tokens), np.float64)
    divisors: Mapping[str, npt.NDArray[np.int64] | np.int64] = {
        "token_mean": num_tokens[learned].sum(),
        "sequence_mean": num_rollouts * num_tokens.clip(min=1),
        "fixed": np.int64(num_rollouts * aggregation_tokens),
    }
    return np.where(learned, 1 / divisors[method], 0.0)
