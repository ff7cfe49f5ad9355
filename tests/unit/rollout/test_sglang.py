"""What is sent to SGLang, and what is made of its answers. The real server: tests/engines."""

from __future__ import annotations

import asyncio
import gc
import json
import socket
import threading
import warnings
from collections.abc import Callable, Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

import httpx
import pytest

from megatron_parallel_r1.errors import UserError
from megatron_parallel_r1.rollout.engine import Completion, Sampling
from megatron_parallel_r1.rollout.joined_blocks import JoinedBlock
from megatron_parallel_r1.rollout.servers.client import (
    INITIAL_VERSION,
    NEUTRAL,
    STOCK_MODES,
    GenerateRequest,
    GenerateResult,
    ServerInfo,
    Timeouts,
    Unreachable,
)
from megatron_parallel_r1.rollout.servers.sglang import SglangClient

URL = "http://a:30000"
REQUEST = GenerateRequest(
    (7, 8, 9), Sampling(0.5, 0.9, 5, (1 << 62) + 3), 4, frozenset({3, 6}), frozenset({0}), "t"
)
Handler = Callable[[httpx.Request], httpx.Response]


class FakeSGLang:
    """Answers by script; `bodies` are what it was sent."""

    def __init__(self, *answers: Any, seeds: bool = True, tempered: bool = True) -> None:
        self.answers = list(answers)
        self.bodies: list[dict[str, Any]] = []
        self.server_info = {"model_path": "m", "context_length": 64, "max_total_num_tokens": 900}
        self.server_info |= {"max_req_input_len": 58, "internal_states": [{}]}
        self.model_info: Any = {"weight_version": "default"}
        self.seeds, self.tempered = seeds, tempered

    def __call__(self, request: httpx.Request) -> httpx.Response:
        if request.url.path == "/server_info":
            return httpx.Response(200, json=self.server_info)
        if request.url.path == "/model_info":
            return httpx.Response(200, json=self.model_info)
        body = json.loads(request.content)
        self.bodies.append(body)
        if self.answers:
            answer = self.answers.pop(0)
            if isinstance(answer, Exception):
                raise answer
            return answer if isinstance(answer, httpx.Response) else httpx.Response(200, json=answer)
        # The handshake: draws, and scores. A token's log-prob falls with its number.
        params = body["sampling_params"]
        if params["max_new_tokens"] == 0:
            scored = [[-float(token), token, None] for token in body["input_ids"]]
            return httpx.Response(200, json={"meta_info": {"input_token_logprobs": scored}})
        drawn = [5] * 31 + [5 if self.seeds else len(self.bodies)]
        if params["max_new_tokens"] == 1:
            drawn = [5 + params["sampling_seed"] % 4]
        slope = 1 / params["temperature"] if self.tempered else 1.0
        return httpx.Response(200, json=answer_of(drawn, logprob=-slope * drawn[-1]))

    def client(self) -> SglangClient:
        return SglangClient(URL + "/", Timeouts(1, 1, 1), httpx.MockTransport(self))

    def ask(self, request: GenerateRequest = REQUEST) -> GenerateResult:
        return asyncio.run(self.client().generate(request))


def answer_of(
    tokens: list[int], reason: str = "length", logprob: float = -0.5, **meta: Any
) -> dict[str, Any]:
    info = {"finish_reason": {"type": reason}, "cached_tokens": 2, "weight_version": "7"}
    logprobs = [[logprob, token, None] for token in tokens]
    return {"output_ids": tokens, "meta_info": {**info, "output_token_logprobs": logprobs, **meta}}


def test_all_that_is_asked_is_sent() -> None:
    server = FakeSGLang(answer_of([11, 12, 13, 6], "stop"))
    assert server.ask() == GenerateResult(Completion((11, 12, 13, 6), (-0.5,) * 4, (7,) * 4, True), 2)
    params = {
        "max_new_tokens": 4,
        "temperature": 0.5,
        "top_p": 0.9,
        "top_k": 5,
        **NEUTRAL,
        "sampling_seed": (1 << 62) + 3,
        "stop_token_ids": [3, 6],
        "skip_special_tokens": False,
        "no_stop_trim": True,
        "logit_bias": {"0": -1e9},
    }
    assert server.bodies == [{"input_ids": [7, 8, 9], "sampling_params": params, "return_logprob": True}]


def test_the_usual_sampling_sends_no_bias_and_no_top_k() -> None:
    server = FakeSGLang(answer_of([11]))
    server.ask(GenerateRequest((7,), Sampling(), 1, frozenset(), frozenset(), "t"))
    params = server.bodies[0]["sampling_params"]
    assert (params["top_k"], params["top_p"], params["stop_token_ids"]) == (-1, 1.0, [])
    assert "logit_bias" not in params and "custom_params" not in params


def test_joined_blocks_are_sent_for_the_plugin() -> None:
    server = FakeSGLang(answer_of([6], "stop"))
    blocks = (JoinedBlock(1, (3, 5)),)
    server.ask(GenerateRequest((7,) * 9, Sampling(), 4, frozenset({6}), frozenset(), "t", blocks))
    assert server.bodies[0]["sampling_params"]["custom_params"] == {"parallel_r1": [2, 1, 3, 5]}


def test_a_stop_at_the_models_own_end_token_is_asked_on() -> None:
    server = FakeSGLang(
        answer_of([11, 2], "stop"), answer_of([12, 3], "stop", logprob=-0.25, cached_tokens=9)
    )
    answered = server.ask()
    logprobs = (-0.5, -0.5, -0.25, -0.25)
    assert answered == GenerateResult(Completion((11, 2, 12, 3), logprobs, (7,) * 4, True), 2)
    second = server.bodies[1]
    assert second["input_ids"] == [7, 8, 9, 11, 2] and second["sampling_params"]["max_new_tokens"] == 2


def test_versions_are_those_of_each_token() -> None:
    spans = [{"version": "default", "start": 0, "end": 1}, {"version": "12", "start": 1, "end": 3}]
    server = FakeSGLang(answer_of([11, 12, 13, 14], weight_versions=spans))
    assert server.ask().completion.versions == (INITIAL_VERSION, 12, 12, 7)


@pytest.mark.parametrize(
    ("answer", "message"),
    [
        (answer_of([11, 12], "abort"), "aborted: no reason given"),
        (answer_of([11, 12]), "cut at 2 of 4 tokens"),
        (answer_of([]), "of 0 do not match"),
        (answer_of([1] * 5), "of 5 do not match"),
        (answer_of([1] * 4, output_token_logprobs=[[-1.0, 1, None]] * 3), "of 4 do not match"),
        (answer_of([1] * 4, output_token_logprobs=[[-1.0, 2, None]] * 4), "of 4 do not match"),
        (answer_of([1] * 4, output_token_logprobs=[[None, 1, None]] * 4), "of 4 do not match"),
        ({"output_ids": [1]}, "without KeyError"),
        ([], "without TypeError"),
        (httpx.Response(200, text="<html>"), "no JSON: '<html>'"),
        (httpx.Response(200, text='{"output_ids": [1'), "no JSON"),
        (httpx.Response(500, text="boom"), "answered 500: boom"),
        (httpx.Response(503, text="loading"), "answered 503: loading"),
        (httpx.Response(429, text="slow down"), "answered 429: slow down"),
        (httpx.ReadTimeout("late"), "no answer within 1 s"),
        (httpx.ReadError("reset"), "reset"),
        (httpx.RemoteProtocolError("disconnected"), "disconnected"),
    ],
)
def test_what_another_server_may_answer(answer: Any, message: str) -> None:
    with pytest.raises(Unreachable, match=message) as raised:
        FakeSGLang(answer).ask()
    assert URL in str(raised.value)


def test_what_the_server_refuses_ends_the_run_in_one_line() -> None:
    answer = httpx.Response(400, json={"error": {"message": "The input (99 tokens)\nis longer"}})
    with pytest.raises(
        UserError, match=r"http://a:30000/generate answered 400: .*99 tokens.*; change the recipe"
    ) as raised:
        FakeSGLang(answer).ask()
    assert "\n" not in str(raised.value)


def test_about() -> None:
    server = FakeSGLang()
    assert asyncio.run(server.client().info()) == ServerInfo("m", STOCK_MODES, INITIAL_VERSION, 58, 900, True)
    server.model_info = {"weight_version": "31"}
    plugin = {"protocol": 1, "missing": [], "nccl": [2, 30, 7]}
    server.server_info["internal_states"] = [{"parallel_r1": plugin}]
    about = asyncio.run(server.client().info())
    assert about.version == 31 and about.modes == STOCK_MODES | {"isolated"} and about.nccl == (2, 30, 7)
    server.server_info = {"model": "of another engine"}
    with pytest.raises(Unreachable, match="no SGLang server answers so"):
        asyncio.run(server.client().info())


def test_the_handshake_sees_seeds_that_are_ignored_and_log_probs_of_another_temperature() -> None:
    assert not asyncio.run(FakeSGLang(seeds=False).client().info()).seeded
    with pytest.raises(UserError, match="http://a:30000 returns log-probs that leave the temperature out"):
        asyncio.run(FakeSGLang(tempered=False).client().info())


def test_the_handshake_is_made_once() -> None:
    server = FakeSGLang()
    client = server.client()

    async def twice() -> None:
        await client.info()
        requests = len(server.bodies)
        assert requests
        await client.info()
        assert len(server.bodies) == requests

    asyncio.run(twice())


def test_score() -> None:
    meta = {"input_token_logprobs": [[None, 7, None], [-1.5, 8, None], [-2.0, 9, None]]}
    server = FakeSGLang({"meta_info": meta}, {"meta_info": {"input_token_logprobs": [[None, 7, None]]}})
    client = server.client()
    assert asyncio.run(client.score((7, 8, 9))) == (-1.5, -2.0)
    assert server.bodies[0]["logprob_start_len"] == 0
    with pytest.raises(Unreachable, match="no log-probs of the prompt"):
        asyncio.run(client.score((7, 8, 9)))


def test_abort_all_and_health() -> None:
    server = FakeSGLang(httpx.Response(200))
    asyncio.run(server.client().abort_all())
    assert server.bodies == [{"abort_all": True}]
    for code, healthy in ((200, True), (503, False), (404, False)):
        transport = httpx.MockTransport(lambda request, code=code: httpx.Response(code))
        assert asyncio.run(SglangClient(URL, transport=transport).healthy()) == healthy


def test_nobody_listens() -> None:
    with socket.socket() as bound:
        bound.bind(("127.0.0.1", 0))
        client = SglangClient(f"http://127.0.0.1:{bound.getsockname()[1]}")
        assert not asyncio.run(client.healthy())
        with pytest.raises(Unreachable, match="connect"):
            asyncio.run(client.generate(REQUEST))


def test_an_address_that_is_none() -> None:
    with pytest.raises(UserError, match="give servers as http://host:port"):
        asyncio.run(SglangClient("http://[::1").generate(REQUEST))
    with pytest.raises(UserError, match="give servers as http://host:port"):
        asyncio.run(SglangClient("node7:30000").generate(REQUEST))


@pytest.fixture
def listening() -> Iterator[str]:
    """A server that keeps connections open."""

    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def do_POST(self) -> None:
            self.rfile.read(int(self.headers["content-length"]))
            body = json.dumps(answer_of([11, 12, 13, 6], "stop")).encode()
            self.send_response(200)
            self.send_header("content-length", str(len(body)))
            self.end_headers()
            self.wfile.write(body)

        def log_message(self, *_: Any) -> None: ...

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    server.daemon_threads = True
    serving = threading.Thread(target=server.serve_forever)
    serving.start()
    yield f"http://127.0.0.1:{server.server_address[1]}"
    server.shutdown()
    serving.join()
    server.server_close()


def test_one_client_serves_one_event_loop_after_another_and_leaves_nothing_open(listening: str) -> None:
    async def ask() -> None:
        assert len({await client.generate(REQUEST) for _ in range(3)}) == 1

    client = SglangClient(listening)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        asyncio.run(ask())
        asyncio.run(ask())
        gc.collect()
