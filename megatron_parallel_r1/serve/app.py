"""The routes of the server: OpenAI's, its health, and the page."""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncIterator, Iterable
from contextlib import asynccontextmanager
from typing import Any

from fastapi import FastAPI
from fastapi import Request as HttpRequest
from starlette.exceptions import HTTPException
from starlette.responses import HTMLResponse, JSONResponse, Response, StreamingResponse
from starlette.types import Receive, Scope, Send

from megatron_parallel_r1.serve.access import check_host, check_key, read_body
from megatron_parallel_r1.serve.admission import Admission
from megatron_parallel_r1.serve.answer import Answer, Kind
from megatron_parallel_r1.serve.api_error import Refused
from megatron_parallel_r1.serve.engine_request import ask
from megatron_parallel_r1.serve.limits import Limits
from megatron_parallel_r1.serve.page import build_page
from megatron_parallel_r1.serve.schema import ChatRequest, CompletionRequest, read_request
from megatron_parallel_r1.serve.served import Served
from megatron_parallel_r1.serve.session import Exchange
from megatron_parallel_r1.serve.worker import Worker

HEADERS = {"Cache-Control": "no-store", "X-Content-Type-Options": "nosniff"}


def make_app(served: Served, limits: Limits, api_key: str | None = None, local: bool = True) -> FastAPI:
    """The server as an ASGI application.

    Args:
        api_key: what clients must send; None: nothing.
        local: refuse requests that a browser believes to send to another machine.
    """
    worker = Worker()
    admission = Admission(limits)
    page, policy = build_page(served.name, served.thinking, needs_key=api_key is not None)

    @asynccontextmanager
    async def lifespan(_: FastAPI) -> AsyncIterator[None]:
        yield
        worker.stop()

    # FastAPI's own pages of documentation load scripts from elsewhere.
    app = FastAPI(docs_url=None, redoc_url=None, openapi_url=None, lifespan=lifespan)

    def check_client(request: HttpRequest) -> None:
        if local:
            check_host(request)
        if api_key is not None:
            check_key(request, api_key)

    async def complete(request: HttpRequest, kind: Kind) -> Response:
        check_client(request)
        body = await read_body(request, limits)
        told = read_request(body, ChatRequest if kind == "chat" else CompletionRequest)
        question = ask(served, limits, told)
        answer = Answer(kind, served.name, question)
        exchange = Exchange(served, worker, admission, limits, question)
        gone = asyncio.create_task(_cancel_when_gone(request, exchange))
        try:
            await exchange.begin()
            if told.stream:
                return _Stream(exchange, _events(exchange, answer, told.wants_usage))
            texts = [""] * len(exchange.scripts)
            async for deltas in exchange.updates():
                texts = [text + delta.content for text, delta in zip(texts, deltas, strict=True)]
            return JSONResponse(answer.whole(exchange.scripts, texts), headers=HEADERS)
        finally:
            gone.cancel()

    @app.get("/")
    async def show_page(request: HttpRequest) -> HTMLResponse:
        if local:
            check_host(request)
        return HTMLResponse(page, headers=HEADERS | {"Content-Security-Policy": policy})

    @app.get("/health")
    async def tell_health() -> dict[str, Any]:
        """What is under way. `cache_tokens` is 0 when nothing is."""
        return {
            "status": "ok",
            "running": admission.running,
            "waiting": admission.waiting,
            "cache_tokens": served.cached_tokens,
        }

    @app.get("/v1/models")
    async def list_models(request: HttpRequest) -> dict[str, Any]:
        check_client(request)
        model = {"id": served.name, "object": "model", "created": 0, "owned_by": "megatron_parallel_r1"}
        return {"object": "list", "data": [model]}

    @app.post("/v1/chat/completions")
    async def complete_chat(request: HttpRequest) -> Response:
        return await complete(request, "chat")

    @app.post("/v1/completions")
    async def complete_text(request: HttpRequest) -> Response:
        return await complete(request, "text")

    @app.exception_handler(Refused)
    async def tell_refusal(_: HttpRequest, refused: Refused) -> Response:
        return JSONResponse(refused.body, refused.status, HEADERS | refused.headers)

    @app.exception_handler(HTTPException)
    async def tell_http(_: HttpRequest, error: HTTPException) -> Response:
        refused = Refused(error.status_code, str(error.detail))
        return JSONResponse(refused.body, refused.status, HEADERS | dict(error.headers or {}))

    @app.exception_handler(Exception)
    async def tell_failure(_: HttpRequest, error: Exception) -> Response:
        refused = Refused(500, "the server failed; its log says why", code="internal_error")
        return JSONResponse(refused.body, refused.status, HEADERS)

    return app


class _Stream(StreamingResponse):
    """Server-sent events; however it ends, the work behind it ends too."""

    def __init__(self, exchange: Exchange, events: AsyncIterator[str]) -> None:
        super().__init__(
            events, headers=HEADERS | {"X-Accel-Buffering": "no"}, media_type="text/event-stream"
        )
        self._exchange = exchange

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        try:
            await super().__call__(scope, receive, send)
        finally:
            self._exchange.cancel()


async def _events(exchange: Exchange, answer: Answer, usage: bool) -> AsyncIterator[str]:
    yield _spell(answer.opening())
    try:
        async for deltas in exchange.updates():
            yield _spell(answer.news(deltas))
    except Refused as refused:
        yield _spell([refused.body])
        return
    yield _spell(answer.closing(exchange.scripts, usage)) + "data: [DONE]\n\n"


def _spell(bodies: Iterable[dict[str, Any]]) -> str:
    return "".join(f"data: {json.dumps(body, ensure_ascii=False)}\n\n" for body in bodies)


async def _cancel_when_gone(request: HttpRequest, exchange: Exchange) -> None:
    while (await request.receive())["type"] != "http.disconnect":
        continue
    exchange.cancel()
