"""Rewards that change with the step."""

from __future__ import annotations

from dataclasses import dataclass

from megatron_parallel_r1.errors import UserError
from megatron_parallel_r1.rewards.base import Judged, Reward
from megatron_parallel_r1.rewards.terms import Accuracy, ParallelBonus


@dataclass(frozen=True, slots=True)
class Alternating:
    """In every window of steps, `usual` first and `special` in the last ones.

    Attributes:
        window: steps of a window.
        special_steps: how many of them, at its end, are `special`.
    """

    usual: Reward
    special: Reward
    window: int
    special_steps: int

    def __post_init__(self) -> None:
        assert 0 <= self.special_steps <= self.window and self.window >= 1, self

    def at(self, step: int) -> Reward:
        """The reward in force at a step (0, 1, …)."""
        return self.special if step % self.window >= self.window - self.special_steps else self.usual

    def __call__(self, judged: Judged, step: int) -> float:
        return self.at(step)(judged, step)

    def term(self, step: int) -> str:
        return self.at(step).term(step)


@dataclass(frozen=True, slots=True)
class S2:
    """The paper's S2: accuracy, and a bonus for parallel thinking in the last steps of every window.

    Attributes:
        window: steps of a window.
        share: the part of a window with the bonus, in whole steps: 0.2 of 10 is its last 2.
        bonus: what a right answer of a well-formed parallel trace earns above +1 then.
    """

    window: int = 10
    share: float = 0.2
    bonus: float = 0.2

    def __post_init__(self) -> None:
        if self.window < 1 or not 0.0 <= self.share <= 1.0:
            raise UserError(
                f"reward s2: window {self.window} and share {self.share} make no schedule; "
                "set window >= 1 and share between 0 and 1"
            )
        steps = self.window * self.share
        if abs(steps - round(steps)) > 1e-6:
            raise UserError(
                f"reward s2: {self.share} of a window of {self.window} steps is no whole number of steps; "
                f"set share to {round(steps)}/{self.window} = {round(steps) / self.window:.4g}"
            )

    def schedule(self) -> Alternating:
        """The windows, spelled out."""
        bonus_steps = round(self.window * self.share)
        return Alternating(Accuracy(), ParallelBonus(self.bonus), self.window, bonus_steps)

    def __call__(self, judged: Judged, step: int) -> float:
        return self.schedule()(judged, step)

    def term(self, step: int) -> str:
        return self.schedule().term(step)
