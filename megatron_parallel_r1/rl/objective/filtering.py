"""Dynamic sampling: which groups can teach anything.

Shapes: P prompts, G traces of each.
"""

from __future__ import annotations

from typing import Annotated

import numpy as np
from numpy.typing import NDArray
from pydantic import Field

from megatron_parallel_r1.utils.settings import Count, Settings


class DynamicSampling(Settings):
    """Dynamic sampling, DAPO (arXiv 2503.14476, section 3.2): train only groups whose rewards differ."""

    max_rounds: Count = 3
    """Rounds of further problems that replace the other groups; 1 only drops them."""
    oversampling: Annotated[float, Field(ge=1, allow_inf_nan=False)] = 1.0
    """Problems of a round, as a multiple of those that are missing."""


def informative(rewards_PG: NDArray[np.float64]) -> NDArray[np.bool_]:
    """Of each prompt, whether its rewards differ; DAPO (arXiv 2503.14476, eq. 11) keeps only these.

    Where all rewards are equal every advantage is 0: the group costs compute and dilutes the gradient.

    Args:
        rewards_PG: before penalties that differ from trace to trace anyway, such as one of KL.
    """
    return rewards_PG.max(1) > rewards_PG.min(1)
