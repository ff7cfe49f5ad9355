"""Over-long traces: a soft penalty before the limit, or no loss for truncated traces.

Shapes: T traces.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from megatron_parallel_r1.thought.trace import Outline


def overlong_penalties(
    lengths_T: NDArray[np.int64], limit: int, cache: int, penalty: float = 1.0
) -> NDArray[np.float64]:
    """Penalty on each trace's reward [T]: soft over-long punishment, DAPO (arXiv 2503.14476, eq. 13).

        0                                 up to limit - cache tokens
        (limit - cache - length) / cache  beyond, down to -1 at the limit
        -1                                above the limit

    Args:
        limit: longest response in tokens, the paper's L_max.
        cache: tokens before the limit over which the penalty grows, 1..limit.
        penalty: factor; the paper's is 1.

    Raises:
        ValueError: the cache is not within 1..limit.
    """
    if not 1 <= cache <= limit:
        raise ValueError(
            f"an over-long cache of {cache} tokens does not fit a limit of {limit}; use 1..{limit}"
        )
    return penalty * np.clip((limit - cache - lengths_T) / cache, -1.0, 0.0)


def complete(outlines: Sequence[Outline]) -> NDArray[np.bool_]:
    """Returns for each trace whether the policy ended it, not a limit.

    Over-long filtering trains on these only (DAPO, arXiv 2503.14476, section 3.4). The others still count
    in their group's mean and standard deviation: they are masked in the loss, not dropped.
    """
    return np.array([outline.finish != "length" for outline in outlines], bool)
