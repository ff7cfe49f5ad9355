"""The responses of one step: sampled, verified and scored, in groups that answer one prompt each."""

from __future__ import annotations

from base64 import b64encode
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, TypeVar

from megatron_parallel_r1.data.problems import Problem
from megatron_parallel_r1.rewards.base import Judged, Score
from megatron_parallel_r1.rl.expert_exchange import fetch_experts
from megatron_parallel_r1.rl.packed_trace import PackedTrace
from megatron_parallel_r1.thought.trace import Outline
from megatron_parallel_r1.utils.rank import is_rank_zero

T = TypeVar("T")
# Fields of a trace that the record of a skipped step keeps, enough to repeat its updates.
KEPT = ("prompt", "tokens", "sampled", "suppressed", "logprobs", "versions", "finish")


@dataclass(frozen=True, slots=True)
class Rollouts:
    """Parallel lists over responses, the same on every rank; the responses of a group are adjacent."""

    problems: list[Problem]
    traces: list[PackedTrace]
    judged: list[Judged]
    scores: list[Score]

    def __len__(self) -> int:
        return len(self.traces)

    @property
    def outlines(self) -> list[Outline]:
        return [trace.outline for trace in self.traces]

    @property
    def rewards(self) -> list[float | None]:
        """The reward of each trace; None leaves it out of the loss and of its group."""
        return [score.total for score in self.scores]

    def __add__(self, other: Rollouts) -> Rollouts:
        return Rollouts(
            self.problems + other.problems,
            self.traces + other.traces,
            self.judged + other.judged,
            self.scores + other.scores,
        )

    def groups(self, numbers: Sequence[int], size: int) -> Rollouts:
        """Selects groups of `size` traces by number."""
        at = [index for group in numbers for index in range(group * size, (group + 1) * size)]

        def pick(items: list[T]) -> list[T]:
            return [items[index] for index in at]

        return Rollouts(pick(self.problems), pick(self.traces), pick(self.judged), pick(self.scores))


@dataclass(frozen=True, slots=True)
class RolloutBatch:
    """The rollouts of a step.

    Attributes:
        all: every response.
        trained: the responses to train on; all of them without dynamic sampling.
        rounds: rounds of dynamic sampling.
        times: seconds of its phases, as metrics.
    """

    all: Rollouts
    trained: Rollouts
    rounds: int
    times: Mapping[str, float] = field(default_factory=dict, compare=False)

    @property
    def histograms(self) -> dict[str, list[float]]:
        """What logs show as distributions over all responses."""
        return {
            "reward": [reward for reward in self.all.rewards if reward is not None],
            "length": [float(outline.length) for outline in self.all.outlines],
        }

    def records(self) -> list[dict[str, Any]]:
        """Everything needed to repeat the step's updates, JSON-ready; every rank calls it."""
        packed = self.trained.traces
        experts = fetch_experts(packed, range(len(packed)) if is_rank_zero() else ())
        pairs = zip((trace.unpack() for trace in packed), self.trained.rewards, strict=True)
        return [
            {name: getattr(trace, name) for name in KEPT}
            | {"reward": reward}
            | ({"experts": b64encode(experts[index]).decode()} if index in experts else {})
            for index, (trace, reward) in enumerate(pairs)
        ]


def staleness(outline: Outline, step: int) -> int:
    """Number of updates between the weights that sampled the trace and those that `step` trains."""
    return step - 1 - outline.version


def stale_groups(outlines: Sequence[Outline], step: int, most: int, size: int) -> list[bool]:
    """Returns for each group of `size` traces whether one of them is more than `most` updates old."""
    old = [staleness(outline, step) > most for outline in outlines]
    return [any(old[start : start + size]) for start in range(0, len(old), size)]


def drop_stale(batch: RolloutBatch, step: int, most: int, size: int) -> RolloutBatch:
    """Drops the groups of `size` traces in which one is more than `most` updates old.

    Raises:
        RuntimeError: no group is left.
    """
    stale = stale_groups(batch.trained.outlines, step, most, size)
    if not any(stale):
        return batch
    fresh = [group for group, is_stale in enumerate(stale) if not is_stale]
    if not fresh:
        raise RuntimeError(f"step {step}: all its {len(stale)} groups are more than {most} updates old")
    return replace(batch, trained=batch.trained.groups(fresh, size))
