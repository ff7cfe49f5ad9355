"""Early stopping: ends a stage when a metric no longer improves."""

from __future__ import annotations

from collections.abc import Sequence
from statistics import fmean
from typing import Annotated, Literal

from pydantic import Field

from megatron_parallel_r1.utils.settings import Settings, Steps, StepsOrZero

# Metrics that early stopping and `keep_best` can watch, by kind of stage; in RL also `reward_<component>`.
WATCHABLE = {
    "sft": ("loss", "tag_loss", "held_out_loss", "held_out_tag_loss", "entropy", "grad_norm"),
    "rl": (
        *("reward", "accuracy", "group_pass", "group_solved", "parallel_ratio", "length", "critical_length"),
        *("truncated", "entropy", "loss", "grad_norm"),
    ),
}
# Metrics of which less is better.
FALLING = {
    "loss",
    "tag_loss",
    "held_out_loss",
    "held_out_tag_loss",
    "grad_norm",
    "length",
    "critical_length",
    "truncated",
}


class EarlyStopping(Settings):
    """Ends a stage when the mean of `metric` over the last `window` steps is no better than before."""

    metric: str = "reward"
    """Metric of the step's record to watch, or `evaluation/SET/MODE/accuracy` of `evaluate_during`."""
    mode: Literal["max", "min"] = "max"
    """Whether the metric should rise (`max`) or fall (`min`)."""
    window: Steps = 20
    """Steps of a mean, of an evaluation's metric evaluations; it is compared with that of the `window` ones
    before."""
    min_delta: Annotated[float, Field(ge=0)] = 0.0
    """Smallest improvement that counts."""
    min_steps: StepsOrZero = 0
    """Steps that a stage runs in any case."""

    def reached(self, values: Sequence[float], steps: int) -> bool:
        """Returns whether the stage should end.

        Args:
            values: the metric at each step, or of each evaluation, so far.
            steps: steps that count towards `min_steps`.
        """
        if len(values) < 2 * self.window or steps < self.min_steps:
            return False
        before, now = fmean(values[-2 * self.window : -self.window]), fmean(values[-self.window :])
        gain = now - before if self.mode == "max" else before - now
        return gain <= self.min_delta
