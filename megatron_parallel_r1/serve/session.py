"""One request from its turn in the queue to its last token."""

from __future__ import annotations

import asyncio
import logging
from collections import deque
from collections.abc import AsyncIterator
from dataclasses import dataclass

from megatron_parallel_r1.rollout.settings import Thinking
from megatron_parallel_r1.serve.admission import Admission
from megatron_parallel_r1.serve.api_error import Refused
from megatron_parallel_r1.serve.limits import Limits
from megatron_parallel_r1.serve.response_assembler import Delta, Script
from megatron_parallel_r1.serve.served import Served
from megatron_parallel_r1.serve.token_stream import Place
from megatron_parallel_r1.serve.worker import Asking, Worker

LOG = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class Question:
    """A request in the model's terms. Response i is to `prompts[i // each]`, drawn with `seeds[i]`."""

    prompts: list[list[int]]
    each: int
    seeds: list[int]
    thinking: Thinking
    stops: tuple[str, ...]

    @property
    def prompt_tokens(self) -> int:
        return sum(map(len, self.prompts))

    @property
    def cache_tokens(self) -> int:
        """That its answer may come to hold in the engine's cache.

        Prompts once, and each token of a response once; in mode replay twice: paths are written again behind
        the first one before they are let go of.
        """
        copies = 2 if self.thinking.mode == "replay" else 1
        return self.prompt_tokens + copies * len(self.seeds) * self.thinking.max_response_tokens


class Exchange:
    """Answers one question in a task of its own; nothing of it outlives that task.

    `scripts` grow while it runs. Made on the server's loop.
    """

    def __init__(
        self, served: Served, worker: Worker, admission: Admission, limits: Limits, question: Question
    ) -> None:
        self.question = question
        self.scripts = [Script(served.tokenizer, served.tags, question.stops) for _ in question.seeds]
        self._served = served
        self._worker = worker
        self._admission = admission
        self._limits = limits
        self._refused: Refused | None = None
        self._news = asyncio.Event()
        self._begun = asyncio.Event()
        self._task = asyncio.create_task(self._run())
        self._task.add_done_callback(lambda _: self._news.set())

    async def begin(self) -> None:
        """Waits for the request's turn.

        Raises:
            Refused: it does not come.
        """
        await self._begun.wait()
        if self._refused is not None:
            raise self._refused

    async def updates(self) -> AsyncIterator[list[Delta]]:
        """What is new of each script, whenever something is.

        Raises:
            Refused: it went wrong on the way.
        """
        ended = False
        while not ended:
            await self._news.wait()
            self._news.clear()
            ended = self._task.done()
            if self._refused is not None:
                raise self._refused
            deltas = [script.take() for script in self.scripts]
            if any(deltas):
                yield deltas

    def cancel(self) -> None:
        """Nobody waits any more: ends the work and frees what it holds, soon."""
        self._task.cancel()

    async def _run(self) -> None:
        try:
            await asyncio.wait_for(self._answer(), self._limits.seconds)
        except asyncio.TimeoutError:
            self._refused = Refused(
                504, f"no answer within {self._limits.seconds:g} s; ask for fewer tokens", code="timeout"
            )
        except Refused as refused:
            self._refused = refused
        except Exception:
            LOG.exception("a request failed")
            self._refused = Refused(500, "the server failed; its log says why", code="internal_error")
        finally:
            self._begun.set()

    async def _answer(self) -> None:
        async with self._admission.place(self.question.cache_tokens):
            self._begun.set()
            asking = Asking(self._served.engine, self._served.tags)
            responses: list[asyncio.Task[None]] = []
            try:
                for index in range(len(self.question.prompts)):
                    await self._write_prompt(asking, index)
                responses = [
                    asyncio.create_task(self._respond(asking, index)) for index in range(len(self.scripts))
                ]
                await asyncio.gather(*responses)
            finally:
                # Shielded: a second cancellation must not keep anything open.
                await asyncio.shield(self._clean(asking, responses))

    async def _clean(self, asking: Asking, responses: list[asyncio.Task[None]]) -> None:
        for response in responses:
            response.cancel()
        await asyncio.gather(*responses, return_exceptions=True)
        await self._worker.run(asking.close)

    async def _write_prompt(self, asking: Asking, index: int) -> None:
        await self._worker.run(lambda: asking.write_prompt(index, self.question.prompts[index]))

    async def _respond(self, asking: Asking, index: int) -> None:
        question, script = self.question, self.scripts[index]
        number = index // question.each
        outbox = _Outbox(script, self._news)
        outbox.running = asyncio.create_task(
            self._worker.run(
                lambda: asking.respond(
                    number,
                    question.prompts[number],
                    question.thinking,
                    question.seeds[index],
                    outbox.hear,
                )
            )
        )
        try:
            script.end(await outbox.running)
        except asyncio.CancelledError:
            if not script.stopped:
                raise
            script.end("eos")
        finally:
            outbox.running.cancel()
        self._news.set()


class _Outbox:
    """Carries tokens from the engine's thread to a script on the server's loop, many at a time."""

    def __init__(self, script: Script, news: asyncio.Event) -> None:
        self.running: asyncio.Task[object] | None = None
        self._script = script
        self._news = news
        self._loop = asyncio.get_running_loop()
        self._heard: deque[tuple[Place, int]] = deque()
        self._called = False

    def hear(self, place: Place, token: int) -> None:
        """Called in the engine's thread."""
        self._heard.append((place, token))
        if not self._called:
            self._called = True
            self._loop.call_soon_threadsafe(self._deliver)

    def _deliver(self) -> None:
        # Before the queue is emptied: whoever appends from now on calls again.
        self._called = False
        while self._heard:
            self._script.hear(*self._heard.popleft())
        if self._script.stopped and self.running is not None:
            self.running.cancel()
        self._news.set()
