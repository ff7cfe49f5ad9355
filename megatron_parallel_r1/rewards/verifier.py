"""Many answers against their references, in worker processes with a hard time-out.

A pair that takes too long costs its worker's life: the parent kills it and starts another. What counts is the
time of the processor, so that a verdict does not depend on what else a machine does. After many such pairs in
one call the rest of it is given up. So no answers can hang or end the training process, and a verdict comes
for every pair, in order.
"""

from __future__ import annotations

import contextlib
import logging
import threading
import time
import weakref
from collections import deque
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from multiprocessing.connection import wait
from types import TracebackType

from megatron_parallel_r1.rewards.fast_equality import Verdict, settle
from megatron_parallel_r1.rewards.normalize import clean
from megatron_parallel_r1.rewards.verifier_worker import Worker

LOG = logging.getLogger(__name__)
Pair = tuple[str, str]
# How many times a pair's limit may pass by the clock, for a worker that gets no processor or only sleeps.
MOST_BY_THE_CLOCK = 10


@dataclass(slots=True)
class _Open:
    """A pair that a worker has.

    Attributes:
        used: seconds of the processor that the worker had used before.
        look: when to see whether its patience has ended, and `end`, when it has in any case.
    """

    pair: Pair
    used: float
    look: float
    end: float


class Verifier:
    """Checks answers; its workers start with the first pair that needs one, and end with it.

    Any thread may call it, one at a time gets served. `close`, the end of a `with` block, garbage
    collection and the interpreter's end all kill the workers.

    Args:
        limit_s: time of the processor for one pair; ten times as much by the clock. Typical ones take
            milliseconds.
        workers: processes.
        memory_bytes: the address space of each.
        most_timeouts: in one `check_many`, for each worker; the pairs that are then left are wrong by
            time-out, so that a call takes minutes at worst, and not hours that other processes wait.
    """

    def __init__(
        self,
        limit_s: float = 3.0,
        workers: int = 1,
        memory_bytes: int = 4 << 30,
        most_timeouts: int = 64,
    ) -> None:
        assert limit_s > 0 and workers >= 1 and most_timeouts >= 1, (limit_s, workers, most_timeouts)
        self._limit_s = limit_s
        self._most_timeouts = most_timeouts * workers
        self._workers = [Worker(limit_s, memory_bytes) for _ in range(workers)]
        self._has_started = False
        self._lock = threading.Lock()
        self._finalizer = weakref.finalize(self, _stop_all, self._workers)

    @property
    def pids(self) -> tuple[int, ...]:
        """The processes that run now."""
        return tuple(worker.pid for worker in self._workers if worker.pid is not None)

    def check(self, answer: str | None, reference: str) -> Verdict:
        """The verdict on one pair."""
        return self.check_many([(answer, reference)])[0]

    def check_many(self, pairs: Iterable[tuple[str | None, str]]) -> list[Verdict]:
        """The verdicts on (answer, reference) pairs, in their order; equal pairs are worked out once.

        Raises:
            RuntimeError, OSError: no worker has ever started, nor does now.
        """
        pairs = [(answer or "", reference) for answer, reference in pairs]
        settled = [settle(*pair) for pair in pairs]
        open_pairs = [pair for pair, verdict in zip(pairs, settled, strict=True) if verdict is None]
        solved = self._solve(list(dict.fromkeys(open_pairs)))
        return [verdict or solved[pair] for pair, verdict in zip(pairs, settled, strict=True)]

    def close(self) -> None:
        """Kills the workers. A later check starts new ones."""
        with self._lock:
            _stop_all(self._workers)

    def __enter__(self) -> Verifier:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def _solve(self, pairs: Sequence[Pair]) -> dict[Pair, Verdict]:
        solved: dict[Pair, Verdict] = {}
        todo = deque(pairs)
        idle = self._workers[: len(pairs)]
        busy: dict[Worker, _Open] = {}
        timeouts = 0
        with self._lock:
            try:
                with contextlib.suppress(OSError):  # which `send` meets again
                    for worker in idle:
                        worker.launch()
                while todo or busy:
                    while todo and idle:
                        worker, pair = idle.pop(), todo.popleft()
                        try:
                            worker.send(*map(clean, pair))
                        except (RuntimeError, OSError) as error:
                            if not self._has_started:
                                raise
                            # The machine is short of something for a while; training goes on, and the next
                            # call tries anew.
                            LOG.warning("warning: a verification worker cannot be started: %s", error)
                            worker.stop()
                            solved[pair] = Verdict(False, "crash")
                            continue
                        self._has_started = True
                        now = time.monotonic()
                        end = now + MOST_BY_THE_CLOCK * self._limit_s
                        busy[worker] = _Open(pair, worker.cpu_s(), now + self._limit_s, end)
                    if not busy:
                        solved |= dict.fromkeys(todo, Verdict(False, "crash"))
                        break
                    first = min(given.look for given in busy.values())
                    answered = wait(list(busy), max(0.0, first - time.monotonic()))
                    for worker, given in list(busy.items()):
                        if worker in answered:
                            solved[given.pair] = _read(worker)
                        elif self._is_over(worker, given):
                            solved[given.pair] = Verdict(False, "timeout")
                            worker.stop()
                            timeouts += 1
                        else:
                            continue
                        del busy[worker]
                        idle.append(worker)
                    if timeouts >= self._most_timeouts:
                        solved |= dict.fromkeys(todo, Verdict(False, "timeout"))
                        todo.clear()
            except BaseException:
                _stop_all(busy)  # an answer that nobody awaits any more would be taken for the next one
                raise
        return solved

    def _is_over(self, worker: Worker, given: _Open) -> bool:
        """Whether a pair has had its time; if not, it is looked at again when it may have."""
        now = time.monotonic()
        if now < given.look:
            return False
        left = self._limit_s - (worker.cpu_s() - given.used)
        if left <= 0 or now >= given.end:
            return True
        given.look = min(now + max(left, 0.01), given.end)
        return False


def _read(worker: Worker) -> Verdict:
    byte = worker.receive()
    if not byte:
        worker.stop()
        return Verdict(False, "crash")
    return Verdict(byte == b"1", "algebra")


def _stop_all(workers: Iterable[Worker]) -> None:
    for worker in workers:
        worker.stop()
