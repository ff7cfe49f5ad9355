"""A model of one number, fake steps that train it on the traces that it drew, and what happened meanwhile."""

from __future__ import annotations

import random
import threading
import time
from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Any

import torch

from megatron_parallel_r1.data.problems import Problem
from megatron_parallel_r1.data.sampler import ProblemStream
from megatron_parallel_r1.rewards.base import Judged, Score
from megatron_parallel_r1.rewards.formats import Format
from megatron_parallel_r1.rl.rollout_batch import Collected, Rollouts
from megatron_parallel_r1.rl.rollout_queue import Batches, batches
from megatron_parallel_r1.thought.trace import Trace
from megatron_parallel_r1.thought.tree import Tree


class FakeEngine:
    """Holds one number."""

    modes = frozenset({"sequential"})

    def __init__(self, together: bool) -> None:
        self.together = together
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
        together: the engine decodes in the trainer's processes; else it is fed by the training thread.
        taken: the batches that were trained.
    """

    max_staleness: int
    steps: int = 6
    jitter: int | None = None
    done: int = 0
    together: bool = True
    saved: dict[str, Any] = field(default_factory=dict)
    weight: torch.Tensor = field(default_factory=lambda: torch.zeros((), dtype=torch.float64))

    def __post_init__(self) -> None:
        problems = [Problem(str(n), f"problem {n}", (str(n),), "fake") for n in range(7)]
        self.stream: ProblemStream[Problem] = ProblemStream(problems, seed=3)
        self.stream.restore(self.saved.get("stream", self.stream.state()))
        self.engine = FakeEngine(self.together)
        self.events: list[tuple[str, int]] = []
        self.taken: dict[int, Collected] = {}
        self.threads: dict[int, str] = {}
        self._random = random.Random(self.jitter)

    def roll_out(self, step: int) -> Collected:
        self.events.append(("rolls out", step))
        self.threads[step] = threading.current_thread().name
        self._pause()
        every = Rollouts([], [], [], [])
        # Later batches need more problems, as under dynamic sampling.
        for number, problem in enumerate(self.stream.next_batch(1 + step % 3)):
            logprob = self.engine.weight + 0.1 * number + 1 / step
            token = int(problem.id)
            traces = [
                Trace((1,), (token,), (True,), (False,), (value,), "eos", Tree(1), (self.engine.version,))
                for value in (logprob, logprob / 3)
            ]
            judged = Judged(token % 2 == 0, Format(), problem.id, "text", length=1)
            scores = [Score(value, {"fake": value}) for value in (logprob, logprob / 3)]
            every = every + Rollouts([problem] * 2, traces, [judged] * 2, scores)
        self._pause()
        return Collected(every, every.groups([len(every) // 2 - 1], 2), rounds=1)

    def open(self) -> Batches:
        return batches(
            self.roll_out,
            self.engine,
            max_staleness=self.max_staleness,
            partial=False,
            done=self.done,
            steps=self.steps,
            found=self.saved.get("in_flight"),
        )

    def run(self, save_after: int | None = None) -> dict[str, Any] | None:
        """Trains from `done` to the end, or to `save_after`, whose state it returns."""
        with self.open() as ahead:
            for step in range(self.done + 1, self.steps + 1):
                ahead.publish([("weight", self.weight)], version=step - 1)
                self.events.append(("published", step - 1))
                self.train(step, ahead.take(step))
                if step == save_after:
                    return self.state(ahead)
        return None

    def state(self, ahead: Batches) -> dict[str, Any]:
        """What a checkpoint keeps of it, as `StageLoop` asks for it."""
        in_flight = ahead.in_flight()
        return {"in_flight": in_flight, "stream": self.stream.state()}

    def train(self, step: int, batch: Collected) -> None:
        self.events.append(("trains", step))
        self.taken[step] = batch
        self._pause()
        # In place, as an optimizer does.
        self.weight += sum(batch.kept.rewards) / 10
        self._pause()

    def _pause(self) -> None:
        if self.jitter is not None:
            time.sleep(self._random.uniform(0, 0.004))
