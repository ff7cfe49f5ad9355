"""The server's routes: OpenAI's API, health, and the web page."""

from __future__ import annotations

import asyncio
import json
import time
from collections.abc import AsyncIterator, Iterable
from contextlib import asynccontextmanager
from typing import Any

from fastapi import FastAPI
from fastapi import Request as HttpRequest
from starlette.exceptions import HTTPException
from starlette.responses import HTMLResponse, JSONResponse, Response, StreamingResponse
from starlette.types import Receive, Scope, Send

from megatron_parallel_r1.serve.access import check_host, check_key, read_body
from megatron_parallel_r1.serve.admission import Admission, Limits
from megatron_parallel_r1.serve.drain import Drain
from megatron_parallel_r1.serve.engine_request import engine_request
from megatron_parallel_r1.serve.logprobs import LogprobWriter
from megatron_parallel_r1.serve.metrics import ServerMetrics
from megatron_parallel_r1.serve.openapi import describe, documentation_page
from megatron_parallel_r1.serve.page import build_page
from megatron_parallel_r1.serve.response_body import Endpoint, ResponseBody
from megatron_parallel_r1.serve.schema import ApiError, ChatRequest, CompletionRequest, read_request
from megatron_parallel_r1.serve.served_model import ServedModel
from megatron_parallel_r1.serve.session import EngineThread, Session
from megatron_parallel_r1.utils.prometheus import CONTENT_TYPE

HEADERS = {"Cache-Control": "no-store", "X-Content-Type-Options": "nosniff"}


def make_app(
    served: ServedModel,
    limits: Limits,
    api_key: str | None = None,
    local: bool = True,
    drain: Drain | None = None,
) -> FastAPI:
    """Builds the server as an ASGI application.

    Args:
        api_key: key that clients must send; None: no key.
        local: reject requests whose Host header names another machine.
        drain: learns of each request.
    """
    thread = EngineThread()
    drain = drain or Drain()
    admission = Admission(limits)
    metrics = ServerMetrics()
    model = {"id": served.name, "object": "model", "created": 0, "owned_by": "megatron_parallel_r1"}
    page, policy = build_page(served, needs_key=api_key is not None)

    @asynccontextmanager
    async def lifespan(_: FastAPI) -> AsyncIterator[None]:
        yield
        thread.stop()

    # FastAPI's own documentation pages load scripts from a CDN, and requests are read by `read_request`.
    described = describe(needs_key=api_key is not None)
    reference = documentation_page(described)
    app = FastAPI(docs_url=None, redoc_url=None, openapi_url=None, lifespan=lifespan)

    def check_client(request: HttpRequest) -> None:
        if local:
            check_host(request)
        if api_key is not None:
            check_key(request, api_key)

    async def complete(http: HttpRequest, endpoint: Endpoint) -> Response:
        try:
            response = await respond(http, endpoint)
        except Exception as error:
            metrics.count_request(error.status if isinstance(error, ApiError) else 500)
            raise
        metrics.count_request(response.status_code)
        return response

    async def respond(http: HttpRequest, endpoint: Endpoint) -> Response:
        check_client(http)
        drain.check()
        content = await read_body(http, limits)
        drain.check()
        request: ChatRequest | CompletionRequest
        if endpoint == "chat":
            request = read_request(content, ChatRequest)
        else:
            request = read_request(content, CompletionRequest)
        wanted = engine_request(served, limits, request)
        body = ResponseBody(
            endpoint, served.name, wanted, [LogprobWriter(served.tokenizer) for _ in wanted.seeds]
        )
        session = Session(served, thread, admission, limits, wanted)
        drain.add(session)
        begin = time.monotonic()
        session.on_end(
            lambda: metrics.count_responses(wanted.prompt_tokens, session.responses, time.monotonic() - begin)
        )
        watcher = asyncio.create_task(_cancel_on_disconnect(http, session))
        try:
            await session.wait_admitted()
            if request.stream:
                return _EventStream(session, _events(session, body, request.wants_usage))
            deltas = [deltas async for deltas in session.deltas()]
            by_response = list(zip(*deltas, strict=True)) or [()] * len(session.responses)
            return JSONResponse(body.whole(session.responses, by_response), headers=HEADERS)
        finally:
            watcher.cancel()

    @app.get("/")
    async def get_page(request: HttpRequest) -> HTMLResponse:
        if local:
            check_host(request)
        return HTMLResponse(page, headers=HEADERS | {"Content-Security-Policy": policy})

    @app.get("/openapi.json")
    async def get_description(request: HttpRequest) -> Response:
        if local:
            check_host(request)
        return JSONResponse(described, headers=HEADERS)

    @app.get("/docs")
    async def get_reference(request: HttpRequest) -> HTMLResponse:
        if local:
            check_host(request)
        return HTMLResponse(reference, headers=HEADERS | {"Content-Security-Policy": "default-src 'none'"})

    @app.get("/health")
    async def get_health() -> dict[str, Any]:
        """Load of the server; `cache_tokens` is 0 when it is idle."""
        return {
            "status": "ok",
            "running": admission.running,
            "waiting": admission.waiting,
            **served.gauges,
        }

    @app.get("/metrics")
    async def get_metrics() -> Response:
        gauges = {
            "running": admission.running,
            "waiting": admission.waiting,
            **served.gauges,
        }
        return Response(metrics.text(gauges), media_type=CONTENT_TYPE, headers=HEADERS)

    @app.get("/ready")
    async def get_ready() -> dict[str, str]:
        """Whether a request would be taken now, for load balancers; otherwise 503."""
        drain.check()
        admission.check_room()
        if served.gauges.get("servers_up") == 0:
            raise ApiError(503, "no rollout server is up", code="no_server", headers={"Retry-After": "5"})
        return {"status": "ready"}

    @app.get("/v1/models")
    async def list_models(request: HttpRequest) -> dict[str, Any]:
        check_client(request)
        return {"object": "list", "data": [model]}

    @app.get("/v1/models/{name:path}")
    async def get_model(request: HttpRequest, name: str) -> dict[str, Any]:
        check_client(request)
        if name != served.name:
            raise ApiError(
                404, f"model {name!r} is not served here; use {served.name}", code="model_not_found"
            )
        return model

    @app.post("/v1/chat/completions")
    async def complete_chat(request: HttpRequest) -> Response:
        return await complete(request, "chat")

    @app.post("/v1/completions")
    async def complete_text(request: HttpRequest) -> Response:
        return await complete(request, "text")

    @app.exception_handler(ApiError)
    async def on_api_error(_: HttpRequest, error: ApiError) -> Response:
        return JSONResponse(error.body, error.status, HEADERS | error.headers)

    @app.exception_handler(HTTPException)
    async def on_http_error(_: HttpRequest, error: HTTPException) -> Response:
        body = ApiError(error.status_code, str(error.detail)).body
        return JSONResponse(body, error.status_code, HEADERS | dict(error.headers or {}))

    @app.exception_handler(Exception)
    async def on_failure(_: HttpRequest, error: Exception) -> Response:
        failure = ApiError.internal()
        return JSONResponse(failure.body, failure.status, HEADERS)

    return app


class _EventStream(StreamingResponse):
    """Server-sent events; cancels the session however the stream ends."""

    def __init__(self, session: Session, events: AsyncIterator[str]) -> None:
        super().__init__(
            events, headers=HEADERS | {"X-Accel-Buffering": "no"}, media_type="text/event-stream"
        )
        self._session = session

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        try:
            await super().__call__(scope, receive, send)
        finally:
            self._session.cancel()


async def _events(session: Session, body: ResponseBody, usage: bool) -> AsyncIterator[str]:
    yield _encode(body.first_chunks())
    try:
        async for deltas in session.deltas():
            yield _encode(body.chunks(deltas))
    except ApiError as error:
        yield _encode([error.body])
        return
    yield _encode(body.last_chunks(session.responses, usage)) + "data: [DONE]\n\n"


def _encode(chunks: Iterable[dict[str, Any]]) -> str:
    return "".join(f"data: {json.dumps(chunk, ensure_ascii=False)}\n\n" for chunk in chunks)


async def _cancel_on_disconnect(request: HttpRequest, session: Session) -> None:
    while (await request.receive())["type"] != "http.disconnect":
        continue
    session.cancel()
