"""When a stage may end before its last step: its metric rises, or falls, no more."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from statistics import fmean
from typing import Any, ClassVar, Literal

# What can be watched, by the kind of stage.
WATCHABLE = {
    "sft": ("loss", "entropy", "grad_norm"),
    "rl": (
        *("reward", "accuracy", "group_pass", "group_solved", "parallel_ratio", "length", "critical_length"),
        *("truncated", "entropy", "loss", "grad_norm"),
    ),
}


@dataclass(frozen=True, slots=True)
class EarlyStopping:
    """Ends a stage when the mean of `metric` over the last `window` steps is not better than before.

    Attributes:
        metric: of the step's record, one of `WATCHABLE`.
        mode: whether it should rise or fall.
        window: steps of a mean; it is held against that of the `window` steps before.
        min_delta: how much better it has to be.
        min_steps: steps before which a stage does not end.
    """

    # For pydantic, which reads these settings from a recipe: an unknown key is an error.
    __pydantic_config__: ClassVar[dict[str, Any]] = {"extra": "forbid"}

    metric: str = "reward"
    mode: Literal["max", "min"] = "max"
    window: int = 20
    min_delta: float = 0.0
    min_steps: int = 0

    def __post_init__(self) -> None:
        if self.window < 1 or self.min_steps < 0 or not self.min_delta >= 0:
            raise ValueError("window must be >= 1, min_steps and min_delta >= 0")

    def reached(self, values: Sequence[float]) -> bool:
        """Whether the stage may end.

        Args:
            values: the metric of each step so far.
        """
        if len(values) < max(2 * self.window, self.min_steps):
            return False
        before, now = fmean(values[-2 * self.window : -self.window]), fmean(values[-self.window :])
        gain = now - before if self.mode == "max" else before - now
        return gain <= self.min_delta
