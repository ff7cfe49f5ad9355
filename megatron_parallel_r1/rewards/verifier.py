"""Verifies many answers against their references, in worker processes with a hard time-out.

The parent kills and restarts a worker whose pair takes too long. The limit counts processor time, so that a
verdict does not depend on the load of the machine. After many such pairs in one call it gives up on the rest.
So answers can neither hang nor end the training process, and every pair gets a verdict, in order.
"""

from __future__ import annotations

import contextlib
import logging
import os
import threading
import time
import weakref
from collections import deque
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from functools import lru_cache
from multiprocessing.connection import wait

from megatron_parallel_r1.rewards.fast_equality import Verdict, decide_without_algebra
from megatron_parallel_r1.rewards.verifier_worker import VerifierWorker

LOG = logging.getLogger(__name__)
AnswerAndReference = tuple[str, str]
# The wall-clock limit in multiples of the processor-time limit, for a worker that is starved or sleeps.
WALL_CLOCK_FACTOR = 10


def equivalent(answer: str | None, reference: str) -> bool:
    """Returns whether `answer` equals `reference`, by a verifier of this process; safe on any text.

    To check thousands, keep a `Verifier` and call `check_many`.
    """
    verdict = decide_without_algebra(answer, reference)
    if verdict is None:
        verdict = _process_verifier(os.getpid()).check(answer or "", reference)
    return verdict.correct


@lru_cache(maxsize=1)
def _process_verifier(pid: int) -> Verifier:
    """Keyed by process, so that a forked child starts its own worker."""
    return Verifier()


@dataclass(slots=True)
class _PendingPair:
    """A pair in the hands of a worker.

    Attributes:
        used: processor time of the worker before this pair, in seconds.
        check_at: when to check its processor time next, on the monotonic clock.
        deadline: when it times out in any case.
    """

    pair: AnswerAndReference
    used: float
    check_at: float
    deadline: float


class Verifier:
    """Checks answers; its workers start with the first pair that needs one, and end with it.

    Thread-safe, one call at a time. `close`, the end of a `with` block, garbage collection and the end of the
    interpreter kill the workers.

    Args:
        limit_s: processor time per pair, in seconds; ten times as much by the wall clock. Typical pairs take
            milliseconds.
        workers: the number of processes.
        memory_bytes: the address space of each.
        most_timeouts: time-outs per worker in one `check_many`, after which its remaining pairs count as
            timed out: a call takes minutes at worst, instead of hours for which other ranks would wait.
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
        self._workers = [VerifierWorker(limit_s, memory_bytes) for _ in range(workers)]
        self._has_started = False
        self._lock = threading.Lock()
        self._finalizer = weakref.finalize(self, _stop_all, self._workers)

    @property
    def pids(self) -> tuple[int, ...]:
        """The ids of the running processes."""
        return tuple(worker.pid for worker in self._workers if worker.pid is not None)

    def check(self, answer: str | None, reference: str) -> Verdict:
        """Returns the verdict on one pair."""
        return self.check_many([(answer, reference)])[0]

    def check_many(self, pairs: Iterable[tuple[str | None, str]]) -> list[Verdict]:
        """Returns the verdicts on (answer, reference) pairs, in order; computes equal pairs once.

        Raises:
            RuntimeError, OSError: no worker has ever started, and none starts now.
        """
        texts = [(answer or "", reference) for answer, reference in pairs]
        decided = [decide_without_algebra(*pair) for pair in texts]
        undecided = [pair for pair, verdict in zip(texts, decided, strict=True) if verdict is None]
        solved = self._solve(list(dict.fromkeys(undecided)))
        return [verdict or solved[pair] for pair, verdict in zip(texts, decided, strict=True)]

    def close(self) -> None:
        """Kills the workers. A later check starts new ones."""
        with self._lock:
            _stop_all(self._workers)

    def __enter__(self) -> Verifier:
        return self

    def __exit__(self, *error: object) -> None:
        self.close()

    def _solve(self, pairs: Sequence[AnswerAndReference]) -> dict[AnswerAndReference, Verdict]:
        solved: dict[AnswerAndReference, Verdict] = {}
        todo = deque(pairs)
        idle = self._workers[: len(pairs)]
        busy: dict[VerifierWorker, _PendingPair] = {}
        timeouts = 0
        with self._lock:
            try:
                with contextlib.suppress(OSError):  # `send` meets it again
                    for worker in idle:
                        worker.launch()
                while todo or busy:
                    while todo and idle:
                        worker, pair = idle.pop(), todo.popleft()
                        try:
                            worker.send(*pair)
                        except (RuntimeError, OSError) as error:
                            if not self._has_started:
                                raise
                            # The machine is short of a resource for a while; training continues, and the
                            # next call tries again.
                            LOG.warning("warning: a verification worker cannot be started: %s", error)
                            worker.stop()
                            solved[pair] = Verdict(False, "crash")
                            continue
                        self._has_started = True
                        now = time.monotonic()
                        deadline = now + WALL_CLOCK_FACTOR * self._limit_s
                        busy[worker] = _PendingPair(pair, worker.cpu_s(), now + self._limit_s, deadline)
                    if not busy:
                        solved |= dict.fromkeys(todo, Verdict(False, "crash"))
                        break
                    first = min(pending.check_at for pending in busy.values())
                    ready = wait([worker.fileno() for worker in busy], max(0.0, first - time.monotonic()))
                    for worker, pending in list(busy.items()):
                        if worker.fileno() in ready:
                            solved[pending.pair] = _read(worker)
                        elif self._is_over(worker, pending):
                            solved[pending.pair] = Verdict(False, "timeout")
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
                _stop_all(busy)  # a stale reply would be taken for the next one
                raise
        return solved

    def _is_over(self, worker: VerifierWorker, pending: _PendingPair) -> bool:
        """Returns whether a pair has used its time; otherwise sets when to check again."""
        now = time.monotonic()
        if now < pending.check_at:
            return False
        left = self._limit_s - (worker.cpu_s() - pending.used)
        if left <= 0 or now >= pending.deadline:
            return True
        pending.check_at = min(now + max(left, 0.01), pending.deadline)
        return False


def _read(worker: VerifierWorker) -> Verdict:
    byte = worker.receive()
    if not byte:
        worker.stop()
        return Verdict(False, "crash")
    return Verdict(byte == b"1", "algebra")


def _stop_all(workers: Iterable[VerifierWorker]) -> None:
    for worker in workers:
        worker.stop()
