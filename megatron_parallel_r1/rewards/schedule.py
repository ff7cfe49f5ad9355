"""Schedules of a reward component's weight over the training steps (0, 1, …)."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field, model_validator

from megatron_parallel_r1.utils.settings import Settings, Share, Steps, StepsOrZero

Finite = Annotated[float, Field(allow_inf_nan=False)]


class Constant(Settings):
    """The same weight at every step."""

    value: Finite = 1.0
    """Weight of the component."""
    kind: Literal["constant"] = "constant"
    """Schedule: constant."""

    def at(self, step: int) -> float:
        return self.value


class Linear(Settings):
    """A weight that changes linearly from `start` to `end`."""

    start: Finite
    """Weight up to step `begin`."""
    end: Finite
    """Weight from step `begin` + `steps` on."""
    steps: Steps
    """Steps over which the weight changes."""
    begin: StepsOrZero = 0
    """Step at which the change begins."""
    kind: Literal["linear"] = "linear"
    """Schedule: linear."""

    def at(self, step: int) -> float:
        done = min(max((step - self.begin) / self.steps, 0.0), 1.0)
        return (1.0 - done) * self.start + done * self.end


class Window(Settings):
    """`bonus` in the last steps of every window, else 0: the alternation of arXiv 2509.07980."""

    window: Steps = 10
    """Steps of a window."""
    share: Share = 0.2
    """Part of the window with the bonus, in whole steps: 0.2 of 10 is its last 2."""
    bonus: Finite = 0.2
    """Weight in these steps."""
    kind: Literal["window"] = "window"
    """Schedule: window."""

    @model_validator(mode="after")
    def _check_whole_steps(self) -> Window:
        steps = self.window * self.share
        if abs(steps - round(steps)) > 1e-6:  # shares such as 0.3 have no exact float
            raise ValueError(
                f"{self.share} of a window of {self.window} steps is no whole number of steps; "
                f"set share to {round(steps)}/{self.window} = {round(steps) / self.window:.4g}"
            )
        return self

    def at(self, step: int) -> float:
        usual_steps = self.window - round(self.window * self.share)
        return self.bonus if step % self.window >= usual_steps else 0.0


WeightSchedule = Constant | Linear | Window

CONSTANT_ONE = Constant()
