"""SIGTERM: requests under way get their time, then an error; nothing is cut, and there is no traceback."""

from __future__ import annotations

import asyncio
import json
import signal
import subprocess
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import httpx
import pytest

from megatron_parallel_r1.serve.admission import Admission, Limits
from megatron_parallel_r1.serve.schema import ApiError
from megatron_parallel_r1.serve.session import Session
from tests.serve.server import chat, events, start

LONG = chat("w20", temperature=0, n=8)


@contextmanager
def ending(folder: Path, drain: float) -> Iterator[tuple[subprocess.Popen[str], httpx.Client]]:
    """A server that runs one request at a time; it must end of itself, without a traceback."""
    with start(folder, stderr=subprocess.PIPE, drain=drain, limits={"running": 1}) as server:
        assert server.stdout is not None and server.stderr is not None
        try:
            with httpx.Client(base_url=server.stdout.readline().split()[-1], timeout=120) as client:
                yield server, client
            assert server.wait(timeout=120) == -signal.SIGTERM
            assert "Traceback" not in (errors := server.stderr.read()), errors
        finally:
            server.kill()


def test_requests_that_do_not_end_in_time_get_an_error(release: Path) -> None:
    with ending(release, drain=1.0) as (server, client), ThreadPoolExecutor(3) as pool:
        with client.stream("POST", "/v1/chat/completions", json=LONG | {"stream": True}) as response:
            lines = response.iter_lines()
            next(lines)
            waiting = [pool.submit(client.post, "/v1/chat/completions", json=LONG) for _ in range(2)]
            while client.get("/health").json()["waiting"] < 2:
                pass
            server.terminate()
            refused = client.post("/v1/chat/completions", json=chat())
            while refused.status_code == 200:  # before the signal was seen
                refused = client.post("/v1/chat/completions", json=chat())
            *_, last = [line for line in lines if line]
        error = json.loads(last.removeprefix("data: "))["error"]
        assert (error["type"], error["code"]) == ("server_error", "shutting_down")
        for answer in (refused, *(future.result() for future in waiting)):
            assert answer.status_code == 503 and int(answer.headers["retry-after"]) > 0
            assert answer.json()["error"]["code"] == "shutting_down"


def test_requests_under_way_end_as_usual(release: Path) -> None:
    with ending(release, drain=100.0) as (server, client), ThreadPoolExecutor(1) as pool:
        body = chat("w20", temperature=0, max_tokens=400)
        with client.stream("POST", "/v1/chat/completions", json=body | {"stream": True}) as response:
            stream = events(response)
            next(stream)
            waiting = pool.submit(client.post, "/v1/chat/completions", json=body)
            while not client.get("/health").json()["waiting"]:
                pass
            server.terminate()
            assert list(stream)[-1]["choices"][0]["finish_reason"] == "length"
        assert waiting.result().json()["choices"][0]["finish_reason"] == "length"


def test_a_client_that_does_not_read_delays_nothing(release: Path) -> None:
    with ending(release, drain=0.0) as (server, client):
        body = chat("w20", temperature=0, n=16, stream=True)
        with client.stream("POST", "/v1/chat/completions", json=body) as response:
            next(response.iter_lines())
            server.terminate()
            assert server.wait(timeout=120) == -signal.SIGTERM


def test_request_that_fails_before_its_first_step_gets_the_error() -> None:
    async def fail_at_once() -> None:
        request: Any = SimpleNamespace(seeds=(), stops=(), alternatives=None)
        unused: Any = None
        session = Session(unused, unused, Admission(Limits()), Limits(), request)
        session.fail(ApiError(503, "ending", code="shutting_down"))
        with pytest.raises(ApiError, match="ending"):
            await asyncio.wait_for(session.wait_admitted(), 60)

    asyncio.run(fail_at_once())
