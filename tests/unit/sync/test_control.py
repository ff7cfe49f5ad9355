"""What a server's answers and silences are called."""

from __future__ import annotations

import json
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, HTTPServer

import pytest

from megatron_parallel_r1.errors import UserError
from megatron_parallel_r1.rollout.servers.client import Unreachable
from megatron_parallel_r1.sync.control import HttpClient
from megatron_parallel_r1.sync.sglang import SglangControl
from megatron_parallel_r1.sync.vllm import VllmControl

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
