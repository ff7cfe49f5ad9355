"""The traces of one step: groups of one problem each, rolled out, judged and scored."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np

from megatron_parallel_r1.data.problems import Problem
from megatron_parallel_r1.rewards.base import Judged, Reward, Score
from megatron_parallel_r1.rl.objective.filtering import DynamicSampling, informative
from megatron_parallel_r1.thought.trace import Trace
from megatron_parallel_r1.utils.seeding import seed_series

# From problems, one a trace, and seeds of the traces.
RollOut = Callable[[Sequence[Problem], Sequence[int]], tuple[list[Trace], list[Judged]]]


@dataclass(frozen=True, slots=True)
class Rollouts:
    """Equally long lists, all traces of a problem in turn."""

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

    def groups(self, chosen: Sequence[int], size: int) -> Rollouts:
        """Some of the groups of `size` traces, by number."""
        at = [index for group in chosen for index in range(group * size, (group + 1) * size)]

        def pick(items: list) -> list:
            return [items[index] for index in at]

        return Rollouts(pick(self.problems), pick(self.traces), pick(self.judged), pick(self.scores))


@dataclass(frozen=True, slots=True)
class Collected:
    """What a step rolled out.

    Attributes:
        all: everything.
        kept: what is trained; without dynamic sampling the same.
    """

    all: Rollouts
    kept: Rollouts
    rounds: int


def collect(
    next_problems: Callable[[int], Sequence[Problem]],
    roll_out: RollOut,
    reward: Reward,
    *,
    prompts: int,
    samples: int,
    step: int,
    seed: int,
    dynamic: DynamicSampling | None,
) -> Collected:
    """Rolls out `samples` traces of each of `prompts` problems, and of more if dynamic sampling wants them.

    If even the last round leaves too few groups, those that there are make a smaller batch; none at all: all
    groups are kept, and their advantages are 0.

    Args:
        next_problems: hands out so many further problems.
        step: of the stage, from 1; the reward counts from 0.
        seed: of the stage; the n-th trace of a step has the same draws in any batch.
    """
    everything, kept = Rollouts([], [], [], []), Rollouts([], [], [], [])
    rounds = 0
    for _ in range(dynamic.max_rounds if dynamic else 1):
        rounds += 1
        missing = prompts - len(kept) // samples
        asked = missing if dynamic is None else math.ceil(missing * dynamic.oversampling)
        problems = [problem for problem in next_problems(asked) for _ in range(samples)]
        before = len(everything)
        seeds = seed_series(before + len(problems), seed, step)[before:]
        traces, judged = roll_out(problems, seeds)
        scores = [reward.score(judgement, step - 1) for judgement in judged]
        fresh = Rollouts(problems, traces, judged, scores)
        everything = everything + fresh
        differ = np.ones(asked, bool)
        if dynamic is not None:
            differ = informative(np.reshape(fresh.rewards, (asked, samples)))
        kept = kept + fresh.groups(np.flatnonzero(differ)[:missing].tolist(), samples)
        if len(kept) == prompts * samples:
            break
    return Collected(everything, kept if len(kept) else everything, rounds)
