"""What a server's answers and silences are called."""

from __future__ import annotations

import json
import socket
import threading
import time
from collections.abc import Iterator
from http.client import HTTPConnection
from http.server import BaseHTTPRequestHandler, HTTPServer

import pytest

from megatron_parallel_r1.errors import UserError
from megatron_parallel_r1.rollout.servers.client import Unreachable
from megatron_parallel_r1.sync import control
from megatron_parallel_r1.sync.control import HttpClient
from megatron_parallel_r1.sync.sglang import SglangControl
from megatron_parallel_r1.sync.vllm import VllmControl
from tests.unit.rollout.scripted_server import as_json, scripted_server

SGLANG = {
    "weight_version": "of the command line",
    "tp_size": 2,
    "pp_size": 1,
    "dp_size": 1,
    "dtype": "bfloat16",
}
ANSWERS: dict[str, tuple[int, object]] = {
    "/fine": (200, {"a": 1}),
    "/text": (200, "done"),
    "/bad": (400, {"success": False, "message": "no\nsession is open"}),
    "/nested": (400, {"error": {"message": "no model"}}),
    "/broken": (500, "Internal"),
    "/server_info": (200, SGLANG),
    "/model_info": (200, {"weight_version": "default"}),
    "/weight_info": (404, {"detail": "Not Found"}),
}


class Handler(BaseHTTPRequestHandler):
    def do_GET(self) -> None:
        status, answer = ANSWERS[self.path]
        content = (answer if isinstance(answer, str) else json.dumps(answer)).encode()
        self.send_response(status)
        self.send_header("Content-Length", str(len(content)))
        self.end_headers()
        self.wfile.write(content)

    def log_message(self, *args: object) -> None: ...


@pytest.fixture(scope="module")
def url() -> Iterator[str]:
    server = HTTPServer(("127.0.0.1", 0), Handler)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield f"http://127.0.0.1:{server.server_port}"
    server.shutdown()
    server.server_close()


def test_answers(url: str) -> None:
    wire = HttpClient(url + "/", 10)
    assert wire.get("/fine") == {"a": 1} and wire.get("/text") == "done"
    with pytest.raises(UserError, match=r"/bad refused: no session is open$"):
        wire.get("/bad")
    with pytest.raises(UserError, match=r"/nested refused: no model$"):
        wire.get("/nested")
    with pytest.raises(Unreachable, match=r"/broken: 500 Internal"):
        wire.get("/broken")
    wire.close()


def test_a_connection_is_kept_while_the_server_keeps_it(monkeypatch: pytest.MonkeyPatch) -> None:
    def fail() -> None:
        raise AssertionError("certificates are loaded, which takes longer than a request")

    monkeypatch.setattr(control.ssl, "create_default_context", fail)
    with scripted_server(lambda *_: as_json({})) as url:
        wire = HttpClient(url)
        wire.get("/a")
        ((kept, used_at),) = wire._idle
        wire.post("/b", {"a": [1]})
        assert wire._idle[0][0] is kept and wire._idle[0][1] >= used_at
        # The server's end of this one is closed.
        ours, theirs = socket.socketpair()
        theirs.close()
        closed = HTTPConnection("127.0.0.1")
        closed.sock = ours
        wire._idle = [(closed, time.monotonic())]
        wire.get("/c")
        assert closed.sock is None and wire._idle[0][0] is not closed
        monkeypatch.setattr(control, "KEEPALIVE_S", 0.0)
        ((old, _),) = wire._idle
        wire.get("/d")
        assert wire._idle[0][0] is not old
        wire.close()
        assert not wire._idle
    with pytest.raises(UserError, match=r"give servers as http://host:port"):
        HttpClient("http://n1:x").get("/")


def test_nobody_there() -> None:
    with pytest.raises(Unreachable, match=r"http://127.0.0.1:9/fine: "):
        HttpClient("http://127.0.0.1:9", 1).get("/fine")


def test_info(url: str, monkeypatch: pytest.MonkeyPatch) -> None:
    info = SglangControl(url).info()
    assert (info.version, info.processes, info.dtype) == (None, 2, "bfloat16")
    monkeypatch.setitem(ANSWERS, "/model_info", (200, {"weight_version": "12"}))
    monkeypatch.setitem(ANSWERS, "/server_info", (200, SGLANG | {"dtype": "auto"}))
    info = SglangControl(url).info()
    assert (info.version, info.dtype) == (12, None)
    monkeypatch.setitem(ANSWERS, "/server_info", (200, SGLANG | {"pp_size": 2}))
    with pytest.raises(UserError, match=r"a server with pipeline parallelism"):
        SglangControl(url).info()
    monkeypatch.setitem(ANSWERS, "/server_info", (200, SGLANG | {"dp_size": 2}))
    with pytest.raises(UserError, match=r"has 2 copies .* start more servers instead of --dp, or set it to"):
        SglangControl(url).info()
    assert SglangControl(url, transport="disk").info().processes == 2
    monkeypatch.setitem(ANSWERS, "/server_info", (200, {"vllm_config": ""}))
    with pytest.raises(UserError, match=r"no SGLang server"):
        SglangControl(url).info()
    with pytest.raises(UserError, match=r"start vLLM with VLLM_SERVER_DEV_MODE=1"):
        VllmControl(url).info()
