"""A batch of rollouts: whole groups, the same draws in any batch, more problems where some teach nothing."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest

from megatron_parallel_r1.config.objective import DynamicSampling
from megatron_parallel_r1.config.stages import RlStage
from megatron_parallel_r1.data.problems import Problem
from megatron_parallel_r1.data.sampler import ProblemStream
from megatron_parallel_r1.rewards.base import Judged
from megatron_parallel_r1.rewards.format_check import Format
from megatron_parallel_r1.rewards.registry import make_reward
from megatron_parallel_r1.rl import rollout_worker
from megatron_parallel_r1.rl.metrics import group_metrics
from megatron_parallel_r1.rl.packed_trace import PackedTrace
from megatron_parallel_r1.rl.rollout_batch import RolloutBatch
from megatron_parallel_r1.rl.rollout_worker import RolloutWorker
from megatron_parallel_r1.thought.trace import Trace
from megatron_parallel_r1.thought.tree import Tree
from megatron_parallel_r1.utils.timers import Timers
from tests.unit.rl.test_path_results import WORDS

SAMPLES = 2


def judged(correct: bool) -> Judged:
    return Judged(correct, Format.of(Tree(length=1, blocks=()), None), "1", "text")


class FakeProblems(ProblemStream[Problem]):
    """Numbered problems, and how many each call asked for."""

    def __init__(self) -> None:
        super().__init__(lambda n: Problem(str(n), f"problem {n}", ("1",), "test"), seed=0)
        self.counts: list[int] = []

    def next_batch(self, size: int) -> tuple[Problem, ...]:
        self.counts.append(size)
        return super().next_batch(size)


class FakeSampling:
    """Answers problems whose number is in `mixed` with one right and one wrong trace, others wrongly."""

    def __init__(self, mixed: set[int]) -> None:
        self.mixed = mixed
        self.problems = FakeProblems()
        self.seeds: list[int] = []
        self.reward = make_reward("accuracy")
        self.folder = Path("nowhere")

    @property
    def counts(self) -> list[int]:
        return self.problems.counts

    def sample(
        self, thinker: Any, problems: Sequence[Problem], seeds: Sequence[int], *rest: object
    ) -> tuple[list[PackedTrace], list[Judged]]:
        self.seeds += seeds
        tree = Tree(length=1, blocks=())
        traces = [Trace((0,), (int(p.id),), (True,), (False,), (0.0,), "eos", tree) for p in problems]
        right = [int(p.id) in self.mixed and index % SAMPLES == 0 for index, p in enumerate(problems)]
        return [PackedTrace.of(trace) for trace in traces], [judged(correct) for correct in right]

    def next_batch(self, dynamic: DynamicSampling | None, prompts: int = 3) -> RolloutBatch:
        stage = RlStage(
            name="rl",
            kind="rl",
            data={"source": "embedded", "kind": "easy"},
            steps=1,
            prompts_per_step=prompts,
            samples_per_prompt=SAMPLES,
            dynamic_sampling=dynamic,
            optimizer={"lr": 1.0},
        )
        nobody: Any = None
        worker = RolloutWorker(
            stage,
            self.problems,
            thinker=nobody,
            tokenizer=WORDS,
            verifier=nobody,
            seed=7,
            reward=self.reward,
            template="plain",
            read_result=nobody,
            timers=Timers(),
            folder=self.folder,
        )
        with pytest.MonkeyPatch.context() as patched:
            patched.setattr(rollout_worker, "sample_and_verify", self.sample)
            return worker.next_batch(step=1)


def trained(batch: RolloutBatch) -> list[int]:
    return [trace.unpack().tokens[0] for trace in batch.trained.traces[::SAMPLES]]


def test_without_dynamic_sampling_every_group_is_kept() -> None:
    fake = FakeSampling(mixed={1})
    batch = fake.next_batch(None)
    assert trained(batch) == [0, 1, 2] and fake.counts == [3] and batch.rounds == 1
    assert batch.trained.rewards == [-1, -1, 1, -1, -1, -1]


def test_further_rounds_fill_the_batch_and_no_more() -> None:
    fake = FakeSampling(mixed={1, 3, 4, 5})
    batch = fake.next_batch(DynamicSampling(max_rounds=3))
    assert fake.counts == [3, 2] and trained(batch) == [1, 3, 4] and batch.rounds == 2
    assert len(batch.all) == 5 * SAMPLES


def test_rounds_are_bounded_and_a_smaller_batch_is_trained() -> None:
    fake = FakeSampling(mixed={2})
    batch = fake.next_batch(DynamicSampling(max_rounds=2))
    assert fake.counts == [3, 2] and trained(batch) == [2]


def test_over_sampling_asks_for_more_and_drops_what_is_too_much() -> None:
    fake = FakeSampling(mixed={0, 1, 2, 3, 4})
    batch = fake.next_batch(DynamicSampling(max_rounds=2, oversampling=1.5))
    assert fake.counts == [5] and trained(batch) == [0, 1, 2]


def test_if_no_group_differs_all_are_kept() -> None:
    batch = FakeSampling(mixed=set()).next_batch(DynamicSampling(max_rounds=1))
    assert trained(batch) == [0, 1, 2]


def test_the_nth_trace_of_a_step_has_the_same_seed_in_any_batch() -> None:
    few, many = FakeSampling(mixed=set(range(9))), FakeSampling(mixed={8})
    few.next_batch(DynamicSampling(max_rounds=3), prompts=2)
    many.next_batch(DynamicSampling(max_rounds=3), prompts=2)
    assert len(many.seeds) == 12 and many.seeds[:4] == few.seeds and len(set(many.seeds)) == 12


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"max_rounds": 0}, "max_rounds\n.* greater than or equal to 1"),
        ({"oversampling": 0.5}, "oversampling\n.* greater than or equal to 1"),
        ({"oversampling": float("inf")}, "oversampling\n.* a finite number"),
    ],
)
def test_settings_that_mean_nothing_are_refused(settings: dict[str, float], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        DynamicSampling(**settings)


def test_group_metrics_by_hand() -> None:
    right = [True, False, False, False, True, True]
    metrics = group_metrics([judged(correct) for correct in right], 2)
    assert metrics == {"group_pass": pytest.approx(2 / 3), "group_solved": pytest.approx(1 / 3)}
