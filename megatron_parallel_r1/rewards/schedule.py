"""A component's weight over the training steps (0, 1, …), as a recipe spells it.

Each raises ValueError where its numbers make no schedule.
"""

from __future__ import annotations

from dataclasses import dataclass
from math import isfinite
from typing import Any, ClassVar, Literal


@dataclass(frozen=True, slots=True)
class Constant:
    """`value` at every step."""

    __pydantic_config__: ClassVar[dict[str, Any]] = {"extra": "forbid"}

    value: float = 1.0
    kind: Literal["constant"] = "constant"

    def __post_init__(self) -> None:
        _check_finite(self.value)

    def at(self, step: int) -> float:
        return self.value


@dataclass(frozen=True, slots=True)
class Linear:
    """From `start` to `end`: `start` up to step `begin`, `end` from `steps` steps later."""

    __pydantic_config__: ClassVar[dict[str, Any]] = {"extra": "forbid"}

    start: float
    end: float
    steps: int
    begin: int = 0
    kind: Literal["linear"] = "linear"

    def __post_init__(self) -> None:
        _check_finite(self.start, self.end)
        if self.steps < 1 or self.begin < 0:
            raise ValueError(f"steps {self.steps} from {self.begin}; set steps >= 1 and begin >= 0")

    def at(self, step: int) -> float:
        done = min(max((step - self.begin) / self.steps, 0.0), 1.0)
        return (1.0 - done) * self.start + done * self.end


@dataclass(frozen=True, slots=True)
class Window:
    """`bonus` in the last steps of every window, else 0: the alternation of arXiv 2509.07980.

    Attributes:
        window: steps of a window.
        share: the part of it with the bonus, in whole steps: 0.2 of 10 is its last 2.
    """

    __pydantic_config__: ClassVar[dict[str, Any]] = {"extra": "forbid"}

    window: int = 10
    share: float = 0.2
    bonus: float = 0.2
    kind: Literal["window"] = "window"

    def __post_init__(self) -> None:
        _check_finite(self.bonus)
        if self.window < 1 or not 0.0 <= self.share <= 1.0:
            raise ValueError(
                f"window {self.window} and share {self.share} make no schedule; "
                "set window >= 1 and share between 0 and 1"
            )
        steps = self.window * self.share
        if abs(steps - round(steps)) > 1e-6:  # shares such as 0.3 have no exact float
            raise ValueError(
                f"{self.share} of a window of {self.window} steps is no whole number of steps; "
                f"set share to {round(steps)}/{self.window} = {round(steps) / self.window:.4g}"
            )

    def at(self, step: int) -> float:
        usual_steps = self.window - round(self.window * self.share)
        return self.bonus if step % self.window >= usual_steps else 0.0


Weight = Constant | Linear | Window


def _check_finite(*weights: float) -> None:
    for weight in weights:
        if not isfinite(weight):
            raise ValueError(f"a weight is {weight}, it must be finite")


ONE = Constant(1.0)
