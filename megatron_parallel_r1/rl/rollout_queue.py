"""Supplies the RL loop with batches, rolled out synchronously or ahead of training in a second thread.

With `max_off_policy_steps` k, batch b, which step b trains (from 1), is rolled out by the weights after step
b - 1 - k, or by the first ones. At k = 1:

    step                         1      2      3      4
    trains the weights           0      1      2      3
    meanwhile, batch             2      3      4      5
    is rolled out by             0      1      2      3

What is rolled out depends on the seed and k, not on which thread was faster.

`partial_rollout` gives that up: a batch under way continues with newer weights as soon as they are published,
so that long traces are less stale at their end. Which token is sampled by which version then depends on
timing, and no two runs are bit-identical. In both cases no token is more than k updates old.

Servers take weights from the training thread without a copy (not `Engine.runs_on_all_ranks`): it waits for
the batches of the previous weights, then brings the new ones. `partial_rollout` does not wait.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from types import TracebackType
from typing import Any, Protocol

import torch

from megatron_parallel_r1.config.stages import RlStage
from megatron_parallel_r1.errors import UserError
from megatron_parallel_r1.model.gpt import Model
from megatron_parallel_r1.model.weights import hf_tensors
from megatron_parallel_r1.rl.pending import from_json, to_json
from megatron_parallel_r1.rl.rollout_batch import RolloutBatch
from megatron_parallel_r1.rl.rollout_worker import RolloutWorker
from megatron_parallel_r1.rollout.engine import Engine
from megatron_parallel_r1.run.backends import Backend
from megatron_parallel_r1.utils.rank import is_rank_zero
from megatron_parallel_r1.utils.timers import Timers

WeightTensors = Iterable[tuple[str, torch.Tensor]]
# Seconds that the end of a `with` block waits for the second thread, which may be in a collective.
JOIN_TIMEOUT_S = 30.0


class RolloutQueue(Protocol):
    """The loop's view: at each step it updates the weights, then takes a batch."""

    def update_weights(self, tensors: WeightTensors, version: int) -> None:
        """Publishes the weights after step `version`; the tensors may change once this returns."""
        ...

    def next_batch(self, step: int) -> RolloutBatch:
        """Returns the batch of the next step, or raises the error that its rollout raised."""
        ...

    def wait(self) -> None:
        """Waits until no rollout is under way, and none will be until the next weights are published."""
        ...

    def state(self) -> list[dict[str, Any]]:
        """All pending batches of the published weights, JSON-ready, for a checkpoint that rank zero writes.

        No rollout is under way when this returns, until the next weights are published.
        """
        ...

    def state_after(self, step: int) -> list[dict[str, Any]]:
        """No batch: after the failure of a rollout, all batches after `step` are rolled out again.

        Batches that were rolled out ahead of `step` are then rolled out by its weights, not by older ones.
        """
        ...

    def gauges(self) -> dict[str, float]:
        """`queue_batches`: batches that are ready and wait for their step. Any thread may call it."""
        ...

    def __enter__(self) -> RolloutQueue: ...

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None: ...


def open_queue(
    worker: RolloutWorker, stage: RlStage, done: int, pending: Sequence[dict[str, Any]] | None
) -> RolloutQueue:
    """Opens the synchronous or asynchronous queue of a stage.

    Args:
        done: last finished step.
        pending: `RolloutQueue.state()` after step `done`.
    """
    engine = worker.thinker.engine
    if stage.max_off_policy_steps == 0:
        return SyncRollouts(worker.next_batch, engine, worker.timers)
    return AsyncRollouts(
        worker.next_batch,
        engine,
        worker.timers,
        max_off_policy_steps=stage.max_off_policy_steps,
        partial_rollout=stage.partial_rollout,
        done=done,
        steps=stage.steps,
        pending=pending or (),
    )


@contextmanager
def lent_engine(
    rollouts: RolloutQueue, backend: Backend, model: Model, version: int
) -> Iterator[Engine[Any]]:
    """Lends the engine of an RL stage between two steps, with the weights after step `version`."""
    rollouts.wait()
    backend.engine.load_weights(hf_tensors(model), version)
    yield backend.engine
    backend.sleep()


class SyncRollouts:
    """Rolls out each batch when the loop takes it, with the weights just published.

    Args:
        make_batch: rolls out the batch of a step with the weights that the engine holds.
        timers: `sync` times weight updates, `wait` rollouts.
    """

    def __init__(
        self, make_batch: Callable[[int], RolloutBatch], engine: Engine[Any], timers: Timers
    ) -> None:
        self._make_batch = make_batch
        self._engine = engine
        self._timers = timers

    def update_weights(self, tensors: WeightTensors, version: int) -> None:
        with self._timers.of("sync"):
            self._engine.load_weights(tensors, version)

    def next_batch(self, step: int) -> RolloutBatch:
        with self._timers.of("wait"):
            return self._make_batch(step)

    def wait(self) -> None:
        return None

    def state(self) -> list[dict[str, Any]]:
        return []

    def state_after(self, step: int) -> list[dict[str, Any]]:
        return []

    def gauges(self) -> dict[str, float]:
        return {"queue_batches": 0.0}

    def __enter__(self) -> SyncRollouts:
        return self

    def __exit__(self, *error: object) -> None:
        return None


class AsyncRollouts:
    """Rolls out batches in a second thread, which lives as long as the `with` block.

    Copies published weights and keeps them until their first batch begins: at most `max_off_policy_steps` + 1
    copies, each the size of the model, on its device.

    On a normal exit the block waits for the batches under way, since the other ranks take part in them; on an
    error it interrupts them.

    Args:
        make_batch: rolls out the batch of a step with the weights that the engine holds; its collectives are
            on groups that no other thread uses.
        engine: used by this object alone, and not after the block.
        timers: `sync` times weight updates, `wait` the wait for a batch.
        max_off_policy_steps: at least 1.
        partial_rollout: batches under way take newer weights.
        done: last finished step.
        steps: last step of the stage.
        pending: `state()` after step `done`; empty at step 0.
    """

    def __init__(
        self,
        make_batch: Callable[[int], RolloutBatch],
        engine: Engine[Any],
        timers: Timers,
        *,
        max_off_policy_steps: int,
        partial_rollout: bool,
        done: int,
        steps: int,
        pending: Sequence[dict[str, Any]],
    ) -> None:
        assert max_off_policy_steps >= 1, "at 0 nothing is rolled out ahead: use SyncRollouts"
        self._make_batch = make_batch
        self._engine = engine
        self._timers = timers
        self._max_off_policy_steps = max_off_policy_steps
        self._partial_rollout = partial_rollout
        self._done = self._taken = done
        self._steps = steps
        self._ready = {step: from_json(batch) for step, batch in enumerate(pending, done + 1)}
        self._first = done + 1 + len(self._ready)
        self._copies: dict[int, list[tuple[str, torch.Tensor]]] = {}
        self._published = -1
        self._closing = False
        self._error: BaseException | None = None
        self._changed = threading.Condition()
        # New threads start on GPU 0: select this one. Its default stream is shared, which orders the copies.
        self._gpu = torch.cuda.current_device() if torch.cuda.is_available() else None
        self._thread = threading.Thread(target=self._run, name="rollout", daemon=True)

    def update_weights(self, tensors: WeightTensors, version: int) -> None:
        with self._timers.of("sync"):
            if not self._engine.runs_on_all_ranks:
                self._send_weights(tensors, version)
                return
            # All ranks of a sharded model must iterate, even if no batch needs the copies.
            copies = [(name, tensor.detach().clone()) for name, tensor in tensors]
            with self._changed:
                if self._partial_rollout:
                    self._engine.offer_weights(copies, version)
                elif self._begins_a_batch(version):
                    self._copies[version] = copies
                self._published = version
                self._changed.notify_all()

    def next_batch(self, step: int) -> RolloutBatch:
        with self._timers.of("wait"), self._changed:
            self._wait_for(lambda: step in self._ready)
            self._taken = step
            return self._ready.pop(step)

    def wait(self) -> None:
        with self._changed:
            self._pending()

    def state(self) -> list[dict[str, Any]]:
        with self._changed:
            batches = self._pending()
        written = [to_json(batch) for batch in batches]
        return written if is_rank_zero() else []

    def state_after(self, step: int) -> list[dict[str, Any]]:
        return []

    def gauges(self) -> dict[str, float]:
        return {"queue_batches": float(len(self._ready))}

    def __enter__(self) -> AsyncRollouts:
        self._thread.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        with self._changed:
            self._closing = True
            self._changed.notify_all()
        try:
            if kind is None:
                self._thread.join()
        finally:
            self._engine.interrupt()
            # With a time-out: a collective whose peer is gone ends only with the process.
            self._thread.join(JOIN_TIMEOUT_S)

    def _begins_a_batch(self, version: int) -> bool:
        return version == self._done or version < self._steps - self._max_off_policy_steps

    def _send_weights(self, tensors: WeightTensors, version: int) -> None:
        """Sends weights to servers from the training thread."""
        if self._partial_rollout:
            self._engine.offer_weights(tensors, version)
        elif self._begins_a_batch(version):
            with self._changed:
                self._pending()
            self._engine.load_weights(tensors, version)
        with self._changed:
            self._published = version
            self._changed.notify_all()

    def _pending(self) -> list[RolloutBatch]:
        """Waits for all batches of the published weights and returns those not taken yet."""
        produced = self._published + 1 + self._max_off_policy_steps if self._published >= 0 else 0
        through = min(max(produced, self._first - 1), self._steps)
        steps = range(self._taken + 1, through + 1)
        self._wait_for(lambda: all(step in self._ready for step in steps))
        return [self._ready[step] for step in steps]

    def _wait_for(self, condition: Callable[[], bool]) -> None:
        self._changed.wait_for(lambda: self._error is not None or condition())
        if self._error is not None:
            if isinstance(self._error, UserError):
                # The main threads of other ranks may notice it a step later.
                self._error.on_all_ranks = False
            raise self._error

    def _run(self) -> None:
        if self._gpu is not None:
            torch.cuda.set_device(self._gpu)
        try:
            for step in range(self._first, self._steps + 1):
                if not self._load_weights(max(self._done, step - 1 - self._max_off_policy_steps)):
                    return
                batch = self._make_batch(step)
                with self._changed:
                    self._ready[step] = batch
                    self._changed.notify_all()
        except BaseException as error:  # of any kind: the main thread is waiting for the batch
            with self._changed:
                self._error = error
                self._changed.notify_all()

    def _load_weights(self, version: int) -> bool:
        """Waits until `version` is published, then loads it; returns False if the queue closes first."""
        with self._changed:
            self._changed.wait_for(lambda: self._closing or self._published >= version)
            if self._published < version:
                return False
            copies = self._copies.pop(version, None)
        # None: the first batches share their weights.
        if copies is not None:
            self._engine.load_weights(copies, version)
        return True
