"""A model of one number, fake steps that train it on the traces that it drew, and what happened meanwhile."""

from __future__ import annotations

import random
import threading
import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch

from megatron_parallel_r1.data.problems import Problem
from megatron_parallel_r1.data.sampler import ProblemStream
from megatron_parallel_r1.rewards.base import Judged, Score
from megatron_parallel_r1.rewards.format_check import Format
from megatron_parallel_r1.rl.packed_trace import PackedTrace
from megatron_parallel_r1.rl.rollout_batch import RolloutBatch, Rollouts
from megatron_parallel_r1.rl.rollout_queue import AsyncRollouts, RolloutQueue, SyncRollouts
from megatron_parallel_r1.thought.trace import Trace
from megatron_parallel_r1.thought.tree import Tree
from megatron_parallel_r1.utils.timers import Timers


class FakeEngine:
    """Holds one number."""

    modes = frozenset({"sequential"})

    def __init__(self, runs_on_all_ranks: bool) -> None:
        self.runs_on_all_ranks = runs_on_all_ranks
        self.version = -1
        self.weight = 0.0

    def load_weights(self, tensors: Iterable[tuple[str, torch.Tensor]], version: int) -> None:
        ((_, weight),) = tensors
        self.weight, self.version = weight.item(), version

    offer_weights = load_weights

    def interrupt(self) -> None:
        """Nothing here takes long."""


@dataclass
class Flight:
    """One run of such a stage.

    Attributes:
        jitter: seeds pauses of some milliseconds in both threads; None: none.
        events: what happened, in order.
        runs_on_all_ranks: the engine runs in the trainer's processes; else the training thread feeds it.
        taken: the batches that were trained.
        evaluates: borrow the engine before the first and after each step, as an evaluation does.
    """

    max_off_policy_steps: int
    steps: int = 6
    jitter: int | None = None
    done: int = 0
    evaluates: bool = False
    runs_on_all_ranks: bool = True
    saved: dict[str, Any] = field(default_factory=dict)
    weight: torch.Tensor = field(default_factory=lambda: torch.zeros((), dtype=torch.float64))

    def __post_init__(self) -> None:
        problems = [Problem(str(n), f"problem {n}", (str(n),), "fake") for n in range(7)]
        self.stream: ProblemStream[Problem] = ProblemStream(problems, seed=3)
        self.stream.restore(self.saved.get("stream", self.stream.state()))
        self.engine = FakeEngine(self.runs_on_all_ranks)
        self.events: list[tuple[str, int]] = []
        self.taken: dict[int, RolloutBatch] = {}
        self.threads: dict[int, str] = {}
        self._random = random.Random(self.jitter)

    def roll_out(self, step: int) -> RolloutBatch:
        self.events.append(("rolls out", step))
        self.threads[step] = threading.current_thread().name
        self._pause()
        every = Rollouts([], [], [], [])
        # Later batches need more problems, as under dynamic sampling.
        for number, problem in enumerate(self.stream.next_batch(1 + step % 3)):
            logprob = self.engine.weight + 0.1 * number + 1 / step
            token = int(problem.id)
            version = (self.engine.version,)
            traces = [
                PackedTrace.of(Trace((1,), (token,), (True,), (False,), (value,), "eos", Tree(1), version))
                for value in (logprob, logprob / 3)
            ]
            judged = Judged(token % 2 == 0, Format(), problem.id, "text", length=1)
            scores = [Score(value, {"fake": value}) for value in (logprob, logprob / 3)]
            every = every + Rollouts([problem] * 2, traces, [judged] * 2, scores)
        self._pause()
        return RolloutBatch(every, every.groups([len(every) // 2 - 1], 2), rounds=1)

    def open(self) -> RolloutQueue:
        return open_queue(
            self.roll_out,
            self.engine,
            max_off_policy_steps=self.max_off_policy_steps,
            done=self.done,
            steps=self.steps,
            pending=self.saved.get("in_flight", ()),
        )

    def run(self, save_after: int | None = None) -> dict[str, Any] | None:
        """Trains from `done` to the end, or to `save_after`, whose state it returns."""
        with self.open() as ahead:
            self.evaluate(ahead, self.done)
            for step in range(self.done + 1, self.steps + 1):
                ahead.update_weights([("weight", self.weight)], version=step - 1)
                self.events.append(("published", step - 1))
                self.train(step, ahead.next_batch(step))
                if step == save_after:
                    return self.state(ahead)
                self.evaluate(ahead, step)
        return None

    def evaluate(self, ahead: RolloutQueue, step: int) -> None:
        """Uses the engine with the weights after `step`, if this flight `evaluates`; nothing else uses it."""
        if self.evaluates:
            ahead.wait()
            before = len(self.events)
            self.engine.load_weights([("weight", self.weight)], step)
            self._pause()
            assert (self.engine.version, len(self.events)) == (step, before)

    def state(self, ahead: RolloutQueue) -> dict[str, Any]:
        """What a checkpoint keeps of it, as `StageLoop` asks for it."""
        in_flight = ahead.state()
        return {"in_flight": in_flight, "stream": self.stream.state()}

    def train(self, step: int, batch: RolloutBatch) -> None:
        self.events.append(("trains", step))
        self.taken[step] = batch
        self._pause()
        # In place, as an optimizer does.
        self.weight += sum(batch.trained.rewards) / 10
        self._pause()

    def _pause(self) -> None:
        if self.jitter is not None:
            time.sleep(self._random.uniform(0, 0.004))


def open_queue(
    make_batch: Callable[[int], RolloutBatch],
    engine: Any,
    *,
    max_off_policy_steps: int,
    steps: int,
    partial_rollout: bool = False,
    done: int = 0,
    pending: Sequence[dict[str, Any]] = (),
) -> RolloutQueue:
    """As rl/rollout_queue.py opens it for a stage, around any function that makes batches."""
    if not max_off_policy_steps:
        return SyncRollouts(make_batch, engine, Timers())
    return AsyncRollouts(
        make_batch,
        engine,
        Timers(),
        max_off_policy_steps=max_off_policy_steps,
        partial_rollout=partial_rollout,
        done=done,
        steps=steps,
        pending=pending,
    )
