"""The batches of a stage's steps: rolled out in turn with the training, or ahead of it in a second thread.

With `max_staleness` k, batch b, which step b trains (from 1), is rolled out by the weights after step
b - 1 - k, or by the first ones. So at k = 1:

    step                   1      2      3      4
    weights that it trains 0      1      2      3
    meanwhile, batch       2      3      4      5
    is rolled out by       0      1      2      3

What is rolled out depends on the seed and k, and not on which thread was faster.

`partial` gives that up: a batch under way goes on with newer weights as soon as there are some, so that long
traces are less stale at their end. Which token meets which version is then a matter of time, and no two runs
are the same to the bit. In both cases no token is ever more than k updates old.

Engines that the training thread feeds (servers: not `Engine.together`) get weights with no copy of them: it
waits until the batches that the weights before make are there, then brings the new ones. `partial` does not.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterable, Sequence
from types import TracebackType
from typing import Any, Protocol

import torch

from megatron_parallel_r1.rl.pending import from_json, to_json
from megatron_parallel_r1.rl.rollout_batch import Collected
from megatron_parallel_r1.rollout.engine import Engine

Tensors = Iterable[tuple[str, torch.Tensor]]
# How long the end of a `with` block waits for the second thread, which a verdict or a collective may hold up.
PATIENCE_S = 30.0


class Batches(Protocol):
    """What the training loop sees: of each step it publishes the weights, then takes the batch."""

    def publish(self, tensors: Tensors, version: int) -> None:
        """Makes the weights after step `version` known; they may change when this has returned."""
        ...

    def take(self, step: int) -> Collected:
        """The batch of the next step. Raises whatever went wrong while it was made."""
        ...

    def in_flight(self) -> list[dict[str, Any]]:
        """All batches that the published weights make and that were not taken, JSON-ready.

        When this returns nothing is being rolled out, until the next weights are published.
        """
        ...

    def __enter__(self) -> Batches: ...

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None: ...


class InTurn:
    """Each batch is rolled out when it is taken, by the weights just published.

    Args:
        roll_out: makes the batch of a step with the weights that the engine holds.
    """

    def __init__(self, roll_out: Callable[[int], Collected], engine: Engine[Any]) -> None:
        self._roll_out = roll_out
        self._engine = engine

    def publish(self, tensors: Tensors, version: int) -> None:
        self._engine.load_weights(tensors, version)

    def take(self, step: int) -> Collected:
        return self._roll_out(step)

    def in_flight(self) -> list[dict[str, Any]]:
        return []

    def __enter__(self) -> InTurn:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        return None


class Ahead:
    """Batches are rolled out in a second thread, which lives as long as the `with` block.

    Weights are copied when they are published, and kept until their first batch begins. At most
    `max_staleness` + 1 copies exist, each as large as the whole model, on its device.

    A block that ends in peace first waits for the batches in flight, since other processes make them too; one
    that ends by an error breaks them off.

    Args:
        roll_out: makes the batch of a step with the weights that the engine holds; its collectives are on
            groups that no other thread uses.
        engine: of this object alone; it cannot be used after the block.
        max_staleness: at least 1.
        partial: a batch under way takes newer weights.
        done, steps: the last step that was trained, and the last one of the stage.
        found: what was in flight after step `done`, as `in_flight` gave it; [] at step 0.
    """

    def __init__(
        self,
        roll_out: Callable[[int], Collected],
        engine: Engine[Any],
        *,
        max_staleness: int,
        partial: bool,
        done: int,
        steps: int,
        found: Sequence[dict[str, Any]],
    ) -> None:
        assert max_staleness >= 1, "at 0 nothing is rolled out ahead: use InTurn"
        self._roll_out = roll_out
        self._engine = engine
        self._max_staleness = max_staleness
        self._partial = partial
        self._done = self._taken = done
        self._steps = steps
        self._ready = {step: from_json(written) for step, written in enumerate(found, done + 1)}
        self._first = done + 1 + len(self._ready)
        self._copies: dict[int, list[tuple[str, torch.Tensor]]] = {}
        self._published = -1
        self._closing = False
        self._error: BaseException | None = None
        self._changed = threading.Condition()
        # A thread begins on the first GPU. All share its default stream, which keeps copies in order.
        self._gpu = torch.cuda.current_device() if torch.cuda.is_available() else None
        self._thread = threading.Thread(target=self._run, name="rollout", daemon=True)

    def publish(self, tensors: Tensors, version: int) -> None:
        if not self._engine.together:
            self._bring(tensors, version)
            return
        # All processes that share a split model must iterate, even where nobody needs the copies.
        copies = [(name, tensor.detach().clone()) for name, tensor in tensors]
        with self._changed:
            if self._partial:
                self._engine.offer_weights(copies, version)
            elif version == self._done or version < self._steps - self._max_staleness:
                self._copies[version] = copies
            self._published = version
            self._changed.notify_all()

    def take(self, step: int) -> Collected:
        with self._changed:
            self._wait_for(lambda: step in self._ready)
            self._taken = step
            return self._ready.pop(step)

    def in_flight(self) -> list[dict[str, Any]]:
        with self._changed:
            batches = self._made_so_far()
        return [to_json(batch) for batch in batches]

    def __enter__(self) -> Ahead:
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
            # Not for ever: a collective whose other side is gone ends with the process.
            self._thread.join(PATIENCE_S)

    def _bring(self, tensors: Tensors, version: int) -> None:
        """Has the engine take weights from here, the training thread."""
        if self._partial:
            self._engine.offer_weights(tensors, version)
        elif version == self._done or version < self._steps - self._max_staleness:
            with self._changed:
                self._made_so_far()
            self._engine.load_weights(tensors, version)
        with self._changed:
            self._published = version
            self._changed.notify_all()

    def _made_so_far(self) -> list[Collected]:
        """Waits for all batches that the published weights make; those that were not taken."""
        made = self._published + 1 + self._max_staleness if self._published >= 0 else 0
        through = min(max(made, self._first - 1), self._steps)
        steps = range(self._taken + 1, through + 1)
        self._wait_for(lambda: all(step in self._ready for step in steps))
        return [self._ready[step] for step in steps]

    def _wait_for(self, moment: Callable[[], bool]) -> None:
        self._changed.wait_for(lambda: self._error is not None or moment())
        if self._error is not None:
            raise self._error

    def _run(self) -> None:
        if self._gpu is not None:
            torch.cuda.set_device(self._gpu)
        try:
            for step in range(self._first, self._steps + 1):
                if not self._bring_weights(max(self._done, step - 1 - self._max_staleness)):
                    return
                batch = self._roll_out(step)
                with self._changed:
                    self._ready[step] = batch
                    self._changed.notify_all()
        except BaseException as error:  # whatever it is, the main thread waits for the batch
            with self._changed:
                self._error = error
                self._changed.notify_all()

    def _bring_weights(self, version: int) -> bool:
        """Waits until the engine holds that version or, if `partial`, was offered it; False at the end."""
        with self._changed:
            self._changed.wait_for(lambda: self._closing or self._published >= version)
            if self._published < version:
                return False
            copies = self._copies.pop(version, None)
        # None: the first batches share their weights.
        if copies is not None:
            self._engine.load_weights(copies, version)
        return True


def batches(
    roll_out: Callable[[int], Collected],
    engine: Engine[Any],
    *,
    max_staleness: int,
    partial: bool,
    done: int,
    steps: int,
    found: Sequence[dict[str, Any]] | None,
) -> Batches:
    """`Ahead`, or at a `max_staleness` of 0 `InTurn`; the arguments are theirs."""
    if max_staleness == 0:
        return InTurn(roll_out, engine)
    return Ahead(
        roll_out,
        engine,
        max_staleness=max_staleness,
        partial=partial,
        done=done,
        steps=steps,
        found=found or [],
    )
