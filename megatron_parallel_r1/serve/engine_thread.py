"""Runs the engine in a thread of its own, so that a forward pass does not block the server's event loop."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Callable, Coroutine
from typing import Any, TypeVar

T = TypeVar("T")


class EngineThread:
    """Runs coroutines on the event loop of its thread."""

    def __init__(self) -> None:
        self._loop = asyncio.new_event_loop()
        self._thread = threading.Thread(target=self._loop.run_forever, name="engine", daemon=True)
        self._thread.start()

    async def run(self, work: Callable[[], Coroutine[Any, Any, T]]) -> T:
        """The result of `work`. When cancelled, it ends only after the work has ended in its thread too."""
        caller = asyncio.get_running_loop()
        done: asyncio.Future[asyncio.Task[T]] = caller.create_future()
        started: list[asyncio.Task[T]] = []

        def start() -> None:
            task = self._loop.create_task(work())
            started.append(task)
            task.add_done_callback(lambda task: caller.call_soon_threadsafe(done.set_result, task))

        self._loop.call_soon_threadsafe(start)
        try:
            await asyncio.shield(done)
        except asyncio.CancelledError:
            self._loop.call_soon_threadsafe(lambda: started[0].cancel())
            await asyncio.wait([done])
            raise
        return done.result().result()

    def stop(self) -> None:
        self._loop.call_soon_threadsafe(self._loop.stop)
        self._thread.join(timeout=10)
