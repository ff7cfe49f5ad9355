"""The responses of one step: groups that answer one prompt each, sampled, verified and scored."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any, TypeVar

from megatron_parallel_r1.data.problems import Problem
from megatron_parallel_r1.rewards.base import Judged, Score
from megatron_parallel_r1.thought.trace import Trace

T = TypeVar("T")
# What a bad step's record keeps of each trace, to make its updates again.
KEPT = ("prompt", "tokens", "sampled", "suppressed", "logprobs", "versions", "finish")


@dataclass(frozen=True, slots=True)
class Rollouts:
    """Equally long lists; the traces of a group are neighbours."""

    problems: list[Problem]
    traces: list[Trace]
    judged: list[Judged]
    scores: list[Score]

    def __len__(self) -> int:
        return len(self.traces)

    @property
    def rewards(self) -> list[float]:
        return [score.total for score in self.scores]

    def __add__(self, other: Rollouts) -> Rollouts:
        return Rollouts(
            self.problems + other.problems,
            self.traces + other.traces,
            self.judged + other.judged,
            self.scores + other.scores,
        )

    def groups(self, numbers: Sequence[int], size: int) -> Rollouts:
        """Some of the groups of `size` traces."""
        at = [index for group in numbers for index in range(group * size, (group + 1) * size)]

        def pick(items: list[T]) -> list[T]:
            return [items[index] for index in at]

        return Rollouts(pick(self.problems), pick(self.traces), pick(self.judged), pick(self.scores))


@dataclass(frozen=True, slots=True)
class RolloutBatch:
    """The rollouts of a step.

    Attributes:
        all: every response.
        trained: those that are trained; without dynamic sampling the same.
        rounds: of dynamic sampling.
    """

    all: Rollouts
    trained: Rollouts
    rounds: int

    def records(self) -> list[dict[str, Any]]:
        """All that the step's updates are made of, JSON-ready."""
        pairs = zip(self.trained.traces, self.trained.rewards, strict=True)
        return [{name: getattr(trace, name) for name in KEPT} | {"reward": reward} for trace, reward in pairs]


def staleness(trace: Trace, step: int) -> int:
    """Updates between the weights that drew the trace and those that `step` trains."""
    return step - 1 - trace.version


def stale_groups(traces: Sequence[Trace], step: int, most: int, size: int) -> list[bool]:
    """For each group of `size` traces, whether one of them is more than `most` updates old."""
    old = [staleness(trace, step) > most for trace in traces]
    return [any(old[start : start + size]) for start in range(0, len(old), size)]


def drop_stale(batch: RolloutBatch, step: int, most: int, size: int) -> RolloutBatch:
    """Drops the groups of `size` traces in which one is more than `most` updates old.

    Raises:
        RuntimeError: no group is left.
    """
    stale = stale_groups(batch.trained.traces, step, most, size)
    if not any(stale):
        return batch
    fresh = [group for group, is_stale in enumerate(stale) if not is_stale]
    if not fresh:
        raise RuntimeError(f"step {step}: all its {len(stale)} groups are more than {most} updates old")
    return replace(batch, trained=batch.trained.groups(fresh, size))
