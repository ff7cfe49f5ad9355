"""The engine's own thread: a pass of the model keeps its event loop busy, not the server's."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Callable, Coroutine
from typing import Any, TypeVar

from megatron_parallel_r1.rollout.native.engine import NativeEngine
from megatron_parallel_r1.rollout.native.forward_batch import NativeContext
from megatron_parallel_r1.rollout.settings import Thinking
from megatron_parallel_r1.rollout.thinking import Thinker
from megatron_parallel_r1.serve.token_stream import Hear, ListeningEngine
from megatron_parallel_r1.thought.tags import Tags
from megatron_parallel_r1.thought.trace import Finish

T = TypeVar("T")


class Worker:
    """Runs coroutines on the loop of a thread of its own."""

    def __init__(self) -> None:
        self._loop = asyncio.new_event_loop()
        self._thread = threading.Thread(target=self._loop.run_forever, name="engine", daemon=True)
        self._thread.start()

    async def run(self, work: Callable[[], Coroutine[Any, Any, T]]) -> T:
        """What `work` returns. Cancelled, this ends only when the work has ended over there too."""
        here = asyncio.get_running_loop()
        done: asyncio.Future[asyncio.Task[T]] = here.create_future()
        begun: list[asyncio.Task[T]] = []

        def begin() -> None:
            task = self._loop.create_task(work())
            begun.append(task)
            task.add_done_callback(lambda task: here.call_soon_threadsafe(done.set_result, task))

        self._loop.call_soon_threadsafe(begin)
        try:
            await asyncio.shield(done)
        except asyncio.CancelledError:
            self._loop.call_soon_threadsafe(lambda: begun[0].cancel())
            await asyncio.wait([done])
            raise
        return done.result().result()

    def stop(self) -> None:
        self._loop.call_soon_threadsafe(self._loop.stop)
        self._thread.join(timeout=10)


class Asking:
    """One request at the engine; its methods run on the worker's loop.

    A prompt is written once, whatever the number of responses to it. No context is shared between requests.
    """

    def __init__(self, engine: NativeEngine, tags: Tags) -> None:
        self._engine = engine
        self._tags = tags
        self._prompts: dict[int, NativeContext] = {}

    async def write_prompt(self, index: int, tokens: list[int]) -> None:
        self._prompts[index] = self._engine.open()
        await self._engine.write(self._prompts[index], tokens)

    async def respond(
        self, index: int, tokens: list[int], thinking: Thinking, seed: int, hear: Hear
    ) -> Finish:
        """One response to a written prompt."""
        listening = ListeningEngine(self._engine, self._tags, hear)
        try:
            prompt = listening.prompt(self._prompts[index])
            trace = await Thinker(listening, self._tags, thinking).trace(tokens, prompt, seed)
            return trace.finish
        finally:
            listening.close_all()

    async def close(self) -> None:
        for context in self._prompts.values():
            self._engine.close(context)
        self._prompts.clear()
