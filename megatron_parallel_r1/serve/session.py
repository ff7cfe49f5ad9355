"""One request from its place in the queue to its last token."""

from __future__ import annotations

import asyncio
import logging
import threading
from collections import deque
from collections.abc import AsyncIterator, Callable, Coroutine
from typing import Any, TypeVar

from megatron_parallel_r1.errors import ServersLost, UserError
from megatron_parallel_r1.rollout.engine import ScoresTokens, TokenScore
from megatron_parallel_r1.rollout.thinking import Branch, Thinker
from megatron_parallel_r1.serve.admission import Admission, Limits
from megatron_parallel_r1.serve.engine_request import EngineRequest
from megatron_parallel_r1.serve.response_assembler import Delta, ResponseAssembler
from megatron_parallel_r1.serve.schema import ApiError
from megatron_parallel_r1.serve.served_model import ServedModel
from megatron_parallel_r1.thought.trace import Trace

LOG = logging.getLogger(__name__)
T = TypeVar("T")


class EngineThread:
    """Runs the engine on an event loop of its own, so that a forward pass does not block the server's."""

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

    def wait_for(self, work: Callable[[], Coroutine[Any, Any, T]]) -> T:
        """Like `run`, for a thread without an event loop, or one that may block. Ctrl-C cancels the work."""
        future = asyncio.run_coroutine_threadsafe(work(), self._loop)
        try:
            return future.result()
        except BaseException:
            future.cancel()
            raise

    def stop(self) -> None:
        self._loop.call_soon_threadsafe(self._loop.stop)
        self._thread.join(timeout=10)


class Session:
    """Decodes one request in a task of its own and frees everything that it opened when the task ends.

    `responses` grow while it runs. Created on the server's event loop. Each prompt is written once, however
    many responses it has; no context is shared between requests.
    """

    def __init__(
        self,
        served: ServedModel,
        thread: EngineThread,
        admission: Admission,
        limits: Limits,
        request: EngineRequest,
    ) -> None:
        self.responses = [
            ResponseAssembler(
                served.tokenizer, served.tags, request.stops, scored=request.alternatives is not None
            )
            for _ in request.seeds
        ]
        self._request = request
        self._served = served
        self._thread = thread
        self._admission = admission
        self._limits = limits
        self._prompts: list[Any] = []
        self._scores: list[list[TokenScore]] = []
        self._error: ApiError | None = None
        self._changed = asyncio.Event()
        self._admitted = asyncio.Event()
        self._task = asyncio.create_task(self._run())
        # Not in the task: if cancelled before its first step, it runs no line of its own.
        self._task.add_done_callback(lambda _: self._wake())

    async def wait_admitted(self) -> None:
        """Waits until the request leaves the queue.

        Raises:
            ApiError: the queue is full, or the time limit passed.
        """
        await self._admitted.wait()
        if self._error is not None:
            raise self._error

    async def deltas(self) -> AsyncIterator[list[Delta]]:
        """The new text of each response, whenever one has grown.

        Raises:
            ApiError: decoding failed or took too long.
        """
        ended = False
        while not ended:
            await self._changed.wait()
            self._changed.clear()
            ended = self._task.done()
            if self._error is not None:
                raise self._error
            deltas = [response.take_delta() for response in self.responses]
            if any(deltas):
                yield deltas

    def on_end(self, call: Callable[[], None]) -> None:
        """Calls `call` once nothing of the request runs any more."""
        self._task.add_done_callback(lambda _: call())

    def cancel(self) -> None:
        """Ends the work soon and frees what it holds."""
        self._task.cancel()

    def fail(self, error: ApiError) -> None:
        """Cancels the work; its client gets `error`."""
        self._error = self._error or error
        self.cancel()

    def _wake(self) -> None:
        self._admitted.set()
        self._changed.set()

    async def _run(self) -> None:
        try:
            await asyncio.wait_for(self._respond_all(), self._limits.seconds)
        except asyncio.TimeoutError:
            self._error = ApiError(
                504, f"no response within {self._limits.seconds:g} s; lower max_tokens", code="timeout"
            )
        except ApiError as error:
            self._error = error
        except ServersLost as error:
            LOG.error("%s", error)
            self._error = ApiError(
                503, "no rollout server is up", code="no_server", headers={"Retry-After": "30"}
            )
        except UserError as error:
            LOG.error("%s", error)
            self._error = ApiError(
                502, "a rollout server refuses the request; the log says why", code="bad_gateway"
            )
        except Exception:
            LOG.exception("a request failed")
            self._error = ApiError.internal()

    async def _respond_all(self) -> None:
        request = self._request
        async with self._admission.slot(request.cache_tokens):
            self._admitted.set()
            tasks: list[asyncio.Task[None]] = []
            try:
                await self._thread.run(self._write_prompts)
                if request.echo:
                    for index, response in enumerate(self.responses):
                        prompt = index // request.n
                        response.echo(request.prompts[prompt], self._scores[prompt])
                if not request.draws:
                    for response in self.responses:
                        response.end("length")
                    return
                tasks = [asyncio.create_task(self._respond(index)) for index in range(len(self.responses))]
                await asyncio.gather(*tasks)
            finally:
                # Shielded: a second cancellation must not leave anything open.
                await asyncio.shield(self._clean_up(tasks))

    async def _respond(self, index: int) -> None:
        response = self.responses[index]
        queue = _TokenQueue(response, self._changed)
        queue.decoding = asyncio.create_task(self._thread.run(lambda: self._decode(index, queue)))
        try:
            response.end((await queue.decoding).finish)
        except asyncio.CancelledError:
            if not response.stopped:
                raise
            response.end("eos")
        finally:
            queue.decoding.cancel()
        self._changed.set()

    async def _clean_up(self, tasks: list[asyncio.Task[None]]) -> None:
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
        await self._thread.run(self._close_prompts)

    # The methods below run in the engine's thread.

    async def _write_prompts(self) -> None:
        engine, request = self._served.engine, self._request
        for tokens in request.prompts:
            context = engine.open()
            self._prompts.append(context)
            scores: list[TokenScore] = []
            if request.echo and request.alternatives is not None:
                assert isinstance(engine, ScoresTokens), "checked by `engine_request`"
                scores = await engine.score(context, tokens, request.alternatives)
            else:
                await engine.write(context, tokens)
            self._scores.append(scores)

    async def _decode(self, index: int, queue: _TokenQueue) -> Trace:
        request, prompt = self._request, index // self._request.n
        thinker = Thinker(self._served.engine, self._served.tags, request.thinking)
        return await thinker.trace(
            request.prompts[prompt],
            self._prompts[prompt],
            request.seeds[index],
            observe=queue.put,
            alternatives=request.alternatives or 0,
            at_once=self._served.draws_at_once,
        )

    async def _close_prompts(self) -> None:
        for context in self._prompts:
            self._served.engine.close(context)
        self._prompts.clear()


class _TokenQueue:
    """Carries tokens in batches from the engine's thread to a response on the server's event loop.

    Cancels `decoding` when the response meets a stop sequence.
    """

    def __init__(self, response: ResponseAssembler, changed: asyncio.Event) -> None:
        self.decoding: asyncio.Task[Trace] | None = None
        self._response = response
        self._changed = changed
        self._loop = asyncio.get_running_loop()
        self._tokens: deque[tuple[Branch, int, TokenScore]] = deque()
        self._scheduled = False

    def put(self, branch: Branch, token: int, score: TokenScore) -> None:
        """Adds a token; called in the engine's thread."""
        self._tokens.append((branch, token, score))
        if not self._scheduled:
            self._scheduled = True
            self._loop.call_soon_threadsafe(self._deliver)

    def _deliver(self) -> None:
        # Reset before the queue is emptied: a token that arrives from now on schedules the next delivery.
        self._scheduled = False
        while self._tokens:
            self._response.add(*self._tokens.popleft())
        if self._response.stopped and self.decoding is not None:
            self.decoding.cancel()
        self._changed.set()
