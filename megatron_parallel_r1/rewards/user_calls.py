"""Calls of a user's function, several at once and with a time limit.

Without either, a plain function is called in the caller's thread, one call after another. Otherwise a plain
function has a thread for each call, and an `async` one an event loop that lives as long as the function, so
that its HTTP client keeps its connections.
"""

from __future__ import annotations

import asyncio
import concurrent.futures
import contextlib
import inspect
import math
import threading
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

# Seconds that a batch of async calls may take beyond its time limits: then a call blocks the event loop.
BLOCKED_S = 30.0
# Async calls at once without a setting; a plain function is called one at a time.
ASYNC_CALLS = 64


@dataclass(frozen=True, slots=True)
class CallLimits:
    """Limits of the calls of a user's function.

    Attributes:
        timeout_s: of one call; None: none.
        concurrent: calls at once; None: one, or ASYNC_CALLS of an async function.
    """

    timeout_s: float | None = None
    concurrent: int | None = None


NO_LIMITS = CallLimits()


@dataclass(frozen=True, slots=True)
class Failed:
    """The outcome of a call that raised."""

    error: BaseException


@dataclass(frozen=True, slots=True)
class TimedOut:
    """The outcome of a call that took too long. Its thread is left alone: nothing can end it."""


@dataclass(frozen=True, slots=True)
class NotMade:
    """The outcome of a call that was not made because another had failed."""


class Blocked(Exception):
    """An async function blocks the event loop, so that no time limit can end it."""


@dataclass(slots=True)
class UserCalls:
    """Calls one function within its limits."""

    function: Callable[..., Any]
    limits: CallLimits
    _loop: asyncio.AbstractEventLoop | None = field(default=None, init=False)

    @property
    def is_async(self) -> bool:
        kind = inspect.iscoroutinefunction
        return kind(self.function) or kind(getattr(self.function, "__call__", None))  # noqa: B004

    def outcomes(self, calls: Sequence[Callable[[], Any]]) -> list[Any]:
        """Makes all calls and returns the result of each, or `Failed`, `TimedOut` or `NotMade`.

        Raises:
            Blocked: see there.
        """
        concurrent_calls = self.limits.concurrent or (ASYNC_CALLS if self.is_async else 1)
        if not self.is_async and self.limits.timeout_s is None and concurrent_calls == 1:
            results: list[Any] = []
            for call in calls:
                failed = bool(results) and isinstance(results[-1], Failed | NotMade)
                results.append(NotMade() if failed else _outcome(call))
            return results
        longest = None
        if self.limits.timeout_s is not None:
            longest = math.ceil(len(calls) / concurrent_calls) * self.limits.timeout_s + BLOCKED_S
        running = asyncio.run_coroutine_threadsafe(self._all(calls, concurrent_calls), self._running_loop())
        try:
            return running.result(longest)
        except concurrent.futures.TimeoutError:
            self._loop = None  # it hangs
            raise Blocked from None

    def _running_loop(self) -> asyncio.AbstractEventLoop:
        if self._loop is None:
            self._loop = asyncio.new_event_loop()
            threading.Thread(target=self._loop.run_forever, name="reward loop", daemon=True).start()
        return self._loop

    async def _all(self, calls: Sequence[Callable[[], Any]], concurrent_calls: int) -> list[Any]:
        slots, has_failed = asyncio.Semaphore(concurrent_calls), False

        async def outcome_of(call: Callable[[], Any]) -> Any:
            nonlocal has_failed
            async with slots:
                if has_failed:
                    return NotMade()
                work = _awaited(call) if self.is_async else _in_thread(call)
                try:
                    outcome = await asyncio.wait_for(work, self.limits.timeout_s)
                except asyncio.TimeoutError:  # of `wait_for`: those of the function are in `Failed`
                    return TimedOut()
                except asyncio.CancelledError as error:  # the function's own
                    outcome = Failed(error)
                has_failed |= isinstance(outcome, Failed)
                return outcome

        return list(await asyncio.gather(*map(outcome_of, calls)))


def _outcome(call: Callable[[], Any]) -> Any:
    try:
        return call()
    except BaseException as error:  # SystemExit too: it would end the thread, or the run without a word
        if isinstance(error, KeyboardInterrupt) and threading.current_thread() is threading.main_thread():
            raise
        return Failed(error)


async def _awaited(call: Callable[[], Any]) -> Any:
    try:
        return await call()
    except asyncio.CancelledError:
        raise
    except BaseException as error:  # see `_outcome`
        return Failed(error)


async def _in_thread(call: Callable[[], Any]) -> Any:
    """The outcome of a call in a thread of its own, which does not keep the process from ending."""
    loop = asyncio.get_running_loop()
    settled = loop.create_future()

    def settle(outcome: Any) -> None:
        if not settled.done():
            settled.set_result(outcome)

    def work() -> None:
        outcome = _outcome(call)
        with contextlib.suppress(RuntimeError):  # the loop is closed: the process ends
            loop.call_soon_threadsafe(settle, outcome)

    threading.Thread(target=work, name="reward", daemon=True).start()
    return await settled
