"""What is sent to SGLang, and what is made of its answers. The real server: tests/engines."""

from __future__ import annotations

import asyncio
import gc
import socket
import warnings
from base64 import b64encode
from dataclasses import replace
from typing import Any

import numpy as np
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
    Unreachable,
)
from megatron_parallel_r1.rollout.servers.sglang import SglangClient
from tests.unit.rollout.scripted_server import Answer, FakeEngine, as_json, scripted_server

REQUEST = GenerateRequest(
    (7, 8, 9), Sampling(0.5, 0.9, 5, (1 << 62) + 3), 4, frozenset({3, 6}), frozenset({0}), "t"
)


class FakeSGLang(FakeEngine[SglangClient]):
    client = SglangClient

    def __init__(self, *answers: Any, seeds: bool = True, tempered: bool = True) -> None:
        super().__init__(*answers)
        self.server_info = {"model_path": "m", "context_length": 64, "max_total_num_tokens": 900}
        self.server_info |= {"max_req_input_len": 58, "internal_states": [{}]}
        self.model_info: Any = {"weight_version": "default"}
        self.seeds, self.tempered = seeds, tempered

    def inform(self, path: str) -> Any:
        return {"/server_info": self.server_info, "/model_info": self.model_info}.get(path)

    def handshake(self, body: dict[str, Any]) -> Any:
        # A token's log-prob falls with its number.
        params = body["sampling_params"]
        if params["max_new_tokens"] == 0:
            scored = [[-float(token), token, None] for token in body["input_ids"]]
            return {"meta_info": {"input_token_logprobs": scored}}
        drawn = [5] * 31 + [5 if self.seeds else len(self.bodies)]
        if params["max_new_tokens"] == 1:
            drawn = [5 + params["sampling_seed"] % 4]
        slope = 1 / params["temperature"] if self.tempered else 1.0
        return answer_of(drawn, logprob=-slope * drawn[-1])

    def ask(self, request: GenerateRequest = REQUEST) -> GenerateResult:
        return self.do(lambda client: client.generate(request))


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
        (Answer(b"<html>"), "no JSON: '<html>'"),
        (Answer(b'{"output_ids": [1'), "no JSON"),
        (Answer(b"boom", 500), "answered 500: boom"),
        (Answer(b"loading", 503), "answered 503: loading"),
        (Answer(b"slow down", 429), "answered 429: slow down"),
        (Answer(b"{}", fault="cut"), "ContentLengthError|not completed"),
        (Answer(fault="reset"), "disconnected"),
    ],
)
def test_what_another_server_may_answer(answer: Any, message: str) -> None:
    server = FakeSGLang(answer)
    with pytest.raises(Unreachable, match=message) as raised:
        server.ask()
    assert server.url in str(raised.value)


def test_no_answer_in_time() -> None:
    server = FakeSGLang(Answer(fault="silent"))
    with pytest.raises(Unreachable, match=r":\d+/generate: no answer within 0.5 s"):
        server.do(lambda client: client.generate(REQUEST), timeout_s=0.5)


def test_what_the_server_refuses_ends_the_run_in_one_line() -> None:
    answer = as_json({"error": {"message": "The input (99 tokens)\nis longer"}}, 400)
    with pytest.raises(
        UserError, match=r"http://127.0.0.1:\d+/generate answered 400: .*99 tokens.*; change the recipe"
    ) as raised:
        FakeSGLang(answer).ask()
    assert "\n" not in str(raised.value)


def test_a_redirect_is_not_followed() -> None:
    """A proxy's page for signing in is no server."""
    server = FakeSGLang(Answer(status=302, location="/server_info"))
    with pytest.raises(UserError, match=r"/generate answered 302: .*change the recipe"):
        server.ask()


def test_about() -> None:
    server = FakeSGLang()
    assert server.do(SglangClient.info) == ServerInfo("m", STOCK_MODES, INITIAL_VERSION, 58, 900, True)
    server.model_info = {"weight_version": "31"}
    plugin = {"protocol": 1, "missing": [], "nccl": [2, 30, 7]}
    server.server_info["internal_states"] = [{"parallel_r1": plugin}]
    about = server.do(SglangClient.info)
    assert about.version == 31 and about.modes == STOCK_MODES | {"isolated"} and about.nccl == (2, 30, 7)
    server.server_info["enable_return_routed_experts"] = True
    assert server.do(SglangClient.info).experts and not about.experts
    server.server_info = {"model": "of another engine"}
    with pytest.raises(Unreachable, match="no SGLang server answers so"):
        server.do(SglangClient.info)


def test_the_handshake_sees_seeds_that_are_ignored_and_log_probs_of_another_temperature() -> None:
    assert not FakeSGLang(seeds=False).do(SglangClient.info).seeded
    with pytest.raises(UserError, match=r"127.0.0.1:\d+ returns log-probs that leave the temperature out"):
        FakeSGLang(tempered=False).do(SglangClient.info)


def test_the_handshake_is_made_once() -> None:
    server = FakeSGLang()

    async def twice(client: SglangClient) -> None:
        await client.info()
        requests = len(server.bodies)
        assert requests
        await client.info()
        assert len(server.bodies) == requests

    server.do(twice)


EXPERTS = replace(REQUEST, limit=1, experts_from=1)


def test_experts_come_in_half_the_bytes() -> None:
    """SGLang has one row of choices for each token that has another after it: here two, of two layers."""
    chosen = np.arange(8, dtype=np.int32)
    server = FakeSGLang(answer_of([11], routed_experts=b64encode(chosen.tobytes()).decode()))
    assert server.ask(EXPERTS).experts == chosen.astype(np.int16).tobytes()
    sent = server.bodies[0]
    assert sent["return_routed_experts"] is True and sent["routed_experts_start_len"] == 1


def test_a_server_that_returns_no_experts_is_told_apart_from_one_that_breaks_off() -> None:
    with pytest.raises(UserError, match="returns no experts; start SGLang with --enable-return-routed"):
        FakeSGLang(answer_of([11])).ask(EXPERTS)
    with pytest.raises(Unreachable, match="5 experts of 2 tokens"):
        FakeSGLang(answer_of([11], routed_experts=b64encode(bytes(20)).decode())).ask(EXPERTS)


def test_score() -> None:
    meta = {"input_token_logprobs": [[None, 7, None], [-1.5, 8, None], [-2.0, 9, None]]}
    server = FakeSGLang({"meta_info": meta}, {"meta_info": {"input_token_logprobs": [[None, 7, None]]}})
    assert server.do(lambda client: client.score((7, 8, 9))) == (-1.5, -2.0)
    assert server.bodies[0]["logprob_start_len"] == 0
    with pytest.raises(Unreachable, match="no log-probs of the prompt"):
        server.do(lambda client: client.score((7, 8, 9)))


def test_abort_all_and_health() -> None:
    server = FakeSGLang(Answer())
    server.do(SglangClient.abort_all)
    assert server.bodies == [{"abort_all": True}]
    for code, healthy in ((200, True), (503, False), (404, False)):
        with scripted_server(lambda *_, code=code: Answer(status=code)) as url:
            assert asyncio.run(SglangClient(url).healthy()) == healthy


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


def test_one_client_serves_one_event_loop_after_another_and_leaves_nothing_open() -> None:
    async def ask() -> None:
        assert len({await client.generate(REQUEST) for _ in range(3)}) == 1

    with (
        scripted_server(lambda *_: as_json(answer_of([11, 12, 13, 6], "stop"))) as url,
        warnings.catch_warnings(),
    ):
        client = SglangClient(url)
        warnings.simplefilter("error")
        asyncio.run(ask())
        asyncio.run(ask())
        gc.collect()
