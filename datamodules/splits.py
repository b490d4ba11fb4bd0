"""Division of one data set among the stages of a pipeline."""

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray


def stage_split(n: int, fractions: Sequence[float], seed: int = 1234) -> list[NDArray[np.uint32]]:
    """Shuffle the row numbers and cut them into one piece per stage.

    The pieces end at the running sums of `round(fraction * n)`; what the last end overshoots `n` (or falls short of
    it) is subtracted from all ends, so that the last one is `n`. Source: DeepSpeed-Chat, RLHF base.

    Args:
        n: number of rows.
        fractions: share of each stage; they are divided by their sum.
        seed: seed of the shuffle (`numpy.random.RandomState`).

    Returns:
        One array of row numbers per stage, in shuffled order; together they hold each row once.

    Raises:
        ValueError: if a fraction is negative or their sum is not positive.
    """
    if not fractions or min(fractions) < 0 or sum(fractions) <= 0:
        raise ValueError(f"data.stage_fractions: {list(fractions)} must be shares >= 0 of which one is positive")
    order = np.arange(n, dtype=np.uint32)
    np.random.RandomState(seed).shuffle(order)
    cuts = [0]
    for fraction in fractions:
        cuts.append(cuts[-1] + round(fraction / sum(fractions) * n))
    overshoot = cuts[-1] - n
    ends = [max(cut - overshoot, 0) for cut in cuts[1:]]
    return [order[start:end] for start, end in zip([0, *ends[:-1]], ends, strict=True)]


def stage_indices(n: int, stage: int, fractions: Sequence[float], seed: int = 1234) -> NDArray[np.uint32]:
    """Give the rows of one stage.

    Args:
        n: number of rows.
        stage: number of the stage, from 0.
        fractions: share of each stage.
        seed: seed of the shuffle.

    Returns:
        Row numbers of the stage, in shuffled order.

    Raises:
        ValueError: if there is no such stage.
    """
    if not 0 <= stage < len(fractions):
        raise ValueError(
            f"data.stage: {stage} is not one of the stages 0 to {len(fractions) - 1} given by data.stage_fractions"
        )
    return stage_split(n, fractions, seed)[stage]
