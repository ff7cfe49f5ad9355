"""Dynamic sampling: which groups can teach anything.

Shapes: P prompts, G traces of each.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any, ClassVar

import numpy as np
from numpy.typing import NDArray


@dataclass(frozen=True, slots=True)
class DynamicSampling:
    """Dynamic sampling, DAPO (arXiv 2503.14476, section 3.2): only groups whose rewards differ are trained.

    Attributes:
        max_rounds: how often further problems are asked for in place of the others; 1 merely drops them.
        oversampling: how many problems a round asks for, as a multiple of those that are missing.
    """

    # For pydantic, which reads these settings from a recipe: an unknown key is an error.
    __pydantic_config__: ClassVar[dict[str, Any]] = {"extra": "forbid"}

    max_rounds: int = 3
    oversampling: float = 1.0

    def __post_init__(self) -> None:
        if self.max_rounds < 1 or not 1 <= self.oversampling < math.inf:
            raise ValueError(
                f"max_rounds {self.max_rounds} and oversampling {self.oversampling}; both must be at least 1"
            )


def informative(rewards_PG: NDArray[np.float64]) -> NDArray[np.bool_]:
    """Of each prompt, whether its rewards differ; DAPO (arXiv 2503.14476, eq. 11) keeps only these.

    Where all rewards are equal every advantage is 0: the group costs compute and dilutes the gradient.

    Args:
        rewards_PG: before penalties that differ from trace to trace anyway, such as one of KL.
    """
    return rewards_PG.max(1) > rewards_PG.min(1)
