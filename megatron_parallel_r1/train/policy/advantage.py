"""Advantages of traces from their rewards.

Shapes: P prompts, G traces of each.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray


def group_advantages(rewards_PG: NDArray[np.float64], eps: float = 1e-6) -> NDArray[np.float64]:
    """Each reward against its group: (r - mean) / (std + eps), GRPO (arXiv 2402.03300, section 4.1.2).

    The standard deviation is the sample's (divided by G - 1), as in the reference implementations. A group of
    equal rewards teaches nothing: its advantages are 0.
    """
    centred_PG = rewards_PG - rewards_PG.mean(1, keepdims=True)
    if rewards_PG.shape[1] < 2:
        return np.zeros_like(centred_PG)
    return centred_PG / (rewards_PG.std(1, ddof=1, keepdims=True) + eps)
