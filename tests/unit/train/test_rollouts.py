"""What a step collects: whole groups, the same draws in any batch, more problems where some teach nothing."""

from __future__ import annotations

from collections.abc import Sequence

import pytest

from megatron_parallel_r1.data.problems import Problem
from megatron_parallel_r1.rewards.base import Judged
from megatron_parallel_r1.rewards.formats import Format
from megatron_parallel_r1.rewards.registry import make_reward
from megatron_parallel_r1.rl.metrics import group_metrics
from megatron_parallel_r1.rl.objective.filtering import DynamicSampling
from megatron_parallel_r1.rl.rollout_batch import Collected, collect
from megatron_parallel_r1.thought.trace import Trace
from megatron_parallel_r1.thought.tree import Tree

SAMPLES = 2


def judged(correct: bool) -> Judged:
    return Judged(correct, Format.of(Tree(length=1, blocks=()), None), "1", "text")


class Pretender:
    """Hands out numbered problems; those whose number is in `mixed` get one right and one wrong trace."""

    def __init__(self, mixed: set[int]) -> None:
        self.mixed = mixed
        self.handed_out = 0
        self.asked: list[int] = []
        self.seeds: list[int] = []

    def next_problems(self, count: int) -> Sequence[Problem]:
        self.asked.append(count)
        start, self.handed_out = self.handed_out, self.handed_out + count
        return [Problem(str(n), f"problem {n}", ("1",), "test") for n in range(start, start + count)]

    def roll_out(self, problems: Sequence[Problem], seeds: Sequence[int]) -> tuple[list[Trace], list[Judged]]:
        self.seeds += seeds
        tree = Tree(length=1, blocks=())
        traces = [Trace((0,), (int(p.id),), (True,), (False,), (0.0,), "eos", tree) for p in problems]
        right = [int(p.id) in self.mixed and index % SAMPLES == 0 for index, p in enumerate(problems)]
        return traces, [judged(correct) for correct in right]

    def collect(self, dynamic: DynamicSampling | None, prompts: int = 3) -> Collected:
        return collect(
            self.next_problems,
            self.roll_out,
            make_reward("accuracy"),
            prompts=prompts,
            samples=SAMPLES,
            step=1,
            seed=7,
            dynamic=dynamic,
        )


def kept(collected: Collected) -> list[int]:
    return [trace.tokens[0] for trace in collected.kept.traces[::SAMPLES]]


def test_without_dynamic_sampling_every_group_is_kept() -> None:
    pretender = Pretender(mixed={1})
    collected = pretender.collect(None)
    assert kept(collected) == [0, 1, 2] and pretender.asked == [3] and collected.rounds == 1
    assert collected.kept.rewards == [-1, -1, 1, -1, -1, -1]


def test_further_rounds_fill_the_batch_and_no_more() -> None:
    pretender = Pretender(mixed={1, 3, 4, 5})
    collected = pretender.collect(DynamicSampling(max_rounds=3))
    assert pretender.asked == [3, 2] and kept(collected) == [1, 3, 4] and collected.rounds == 2
    assert len(collected.all) == 5 * SAMPLES


def test_rounds_are_bounded_and_a_smaller_batch_is_trained() -> None:
    pretender = Pretender(mixed={2})
    collected = pretender.collect(DynamicSampling(max_rounds=2))
    assert pretender.asked == [3, 2] and kept(collected) == [2]


def test_over_sampling_asks_for_more_and_drops_what_is_too_much() -> None:
    pretender = Pretender(mixed={0, 1, 2, 3, 4})
    collected = pretender.collect(DynamicSampling(max_rounds=2, oversampling=1.5))
    assert pretender.asked == [5] and kept(collected) == [0, 1, 2]


def test_if_no_group_differs_all_are_kept() -> None:
    collected = Pretender(mixed=set()).collect(DynamicSampling(max_rounds=1))
    assert kept(collected) == [0, 1, 2]


def test_the_nth_trace_of_a_step_has_the_same_seed_in_any_batch() -> None:
    few, many = Pretender(mixed=set(range(9))), Pretender(mixed={8})
    few.collect(DynamicSampling(max_rounds=3), prompts=2)
    many.collect(DynamicSampling(max_rounds=3), prompts=2)
    assert len(many.seeds) == 12 and many.seeds[:4] == few.seeds and len(set(many.seeds)) == 12


@pytest.mark.parametrize(
    "settings", [{"max_rounds": 0}, {"oversampling": 0.5}, {"oversampling": float("inf")}]
)
def test_settings_that_mean_nothing_are_refused(settings: dict[str, float]) -> None:
    with pytest.raises(ValueError, match="must be at least 1"):
        DynamicSampling(**settings)


def test_group_metrics_by_hand() -> None:
    right = [True, False, False, False, True, True]
    metrics = group_metrics([judged(correct) for correct in right], 2)
    assert metrics == {"group_pass": pytest.approx(2 / 3), "group_solved": pytest.approx(1 / 3)}
