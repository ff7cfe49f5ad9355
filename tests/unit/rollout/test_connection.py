"""Connections to a real HTTP server that closes unused ones, as SGLang's and vLLM's do."""

from __future__ import annotations

import asyncio
import threading
import time
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

import pytest

from megatron_parallel_r1.rollout.servers.client import KEEPALIVE_S, AsyncHttpClient, Timeouts
from megatron_parallel_r1.sync.control import HttpClient

PAUSE_S = KEEPALIVE_S + 1.0


class Server(ThreadingHTTPServer):
    """Counts connections. A request on one that was unused for longer than IDLE_S and a bit is lost, as if
    the server closed it while the request was on its way."""

    daemon_threads = True

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), Handler)
        self.connections = 0

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.server_address[1]}"


class Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    server: Server

    def setup(self) -> None:
        super().setup()
        self.server.connections += 1
        self.answered_at = time.monotonic()

    def do_GET(self) -> None:
        if time.monotonic() - self.answered_at > KEEPALIVE_S + 0.5:
            self.close_connection = True
            return
        self.send_response(200)
        self.send_header("content-length", "2")
        self.end_headers()
        self.wfile.write(b"{}")
        self.answered_at = time.monotonic()

    def log_message(self, *_: Any) -> None: ...


@pytest.fixture
def server() -> Iterator[Server]:
    with Server() as running:
        serving = threading.Thread(target=running.serve_forever)
        serving.start()
        yield running
        running.shutdown()
        serving.join()


def test_a_rollout_sends_nothing_on_a_connection_that_the_server_may_be_closing(server: Server) -> None:
    async def ask() -> None:
        connection = AsyncHttpClient(server.url, Timeouts())
        assert await connection.get("/") == {}
        await asyncio.sleep(PAUSE_S)
        assert await connection.get("/") == {}
        assert server.connections == 2

    asyncio.run(ask())


def test_nor_does_a_weight_sync(server: Server) -> None:
    wire = HttpClient(server.url, 10)
    assert wire.get("/") == {}
    time.sleep(PAUSE_S)
    assert wire.get("/") == {}
    assert server.connections == 2
    wire.close()
