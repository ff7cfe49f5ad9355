"""What is sent to vLLM, and what is made of its answers. The real server: tests/engines."""

from __future__ import annotations

import asyncio
import json
from dataclasses import replace
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
from megatron_parallel_r1.rollout.servers.vllm import VllmClient

URL = "http://a:8000"
GENERATE = "/inference/v1/generate"
REQUEST = GenerateRequest(
    (7, 8, 9), Sampling(0.5, seed=(1 << 62) + 3), 4, frozenset({3, 6}), frozenset({0}), "t"
)


class FakeVLLM:
    """Answers by script; `bodies` are what it was sent."""

    def __init__(self, *answers: Any, seeds: bool = True, tempered: bool = True) -> None:
        self.answers = list(answers)
        self.bodies: list[dict[str, Any]] = []
        self.weight_info = httpx.Response(200, json={"weight_version": "5"})
        self.models: Any = {"data": [{"root": "m", "max_model_len": 64}]}
        self.seeds, self.tempered = seeds, tempered

    def __call__(self, request: httpx.Request) -> httpx.Response:
        if request.url.path == "/v1/models":
            return httpx.Response(200, json=self.models)
        if request.url.path == "/weight_info":
            return self.weight_info
        body = json.loads(request.content)
        self.bodies.append(body)
        if self.answers:
            answer = self.answers.pop(0)
            return answer if isinstance(answer, httpx.Response) else httpx.Response(200, json=answer)
        # The handshake: draws, and scores. A token's log-prob falls with its number.
        params = body["sampling_params"]
        if "prompt_logprobs" in params:
            scored = [None, *({str(token): {"logprob": -float(token)}} for token in body["token_ids"][1:])]
            return httpx.Response(200, json={"prompt_logprobs": scored})
        drawn = [5] * 31 + [5 if self.seeds else len(self.bodies)]
        if params["max_tokens"] == 1:
            drawn = [5 + params["seed"] % 4]
        slope = 1 / params["temperature"] if self.tempered else 1.0
        return httpx.Response(200, json=answer_of(drawn, logprob=-slope * drawn[-1]))

    def client(self) -> VllmClient:
        return VllmClient(URL + "/", Timeouts(1, 1, 1), httpx.MockTransport(self))

    def ask(self, request: GenerateRequest = REQUEST) -> GenerateResult:
        return asyncio.run(self.client().generate(request))


def answer_of(
    tokens: list[int], reason: str = "length", logprob: float = -0.5, **choice: Any
) -> dict[str, Any]:
    content = [{"token_id": token, "logprob": logprob} for token in tokens]
    fields = {"token_ids": tokens, "finish_reason": reason, "logprobs": {"content": content}}
    usage = {"prompt_tokens_details": {"cached_tokens": 2}}
    return {"choices": [fields | choice], "usage": usage}


def test_all_that_is_asked_is_sent() -> None:
    spans = [{"version": "default", "start": 0, "end": 1}, {"version": "12", "start": 1, "end": 4}]
    server = FakeVLLM(answer_of([11, 12, 13, 6], "stop", weight_versions=spans))
    versions = (INITIAL_VERSION, 12, 12, 12)
    assert server.ask() == GenerateResult(Completion((11, 12, 13, 6), (-0.5,) * 4, versions, True), 2)
    (body,) = server.bodies
    assert body["token_ids"] == [7, 8, 9]
    seed = body["sampling_params"].pop("seed")
    assert 0 <= seed < 1 << 63
    assert body["sampling_params"] == {
        **NEUTRAL,
        "max_tokens": 4,
        "temperature": 0.5,
        "stop_token_ids": [3, 6],
        "ignore_eos": True,
        "logprobs": 0,
        "detokenize": False,
        "logit_bias": {"0": -1e9},
    }


def test_continuations_of_one_branch_have_seeds_of_their_own() -> None:
    server = FakeVLLM(*[answer_of([11] * 4)] * 4)
    longer, other = replace(REQUEST, tokens=(7, 8, 9, 10)), replace(REQUEST, sampling=Sampling(0.5, seed=4))
    for request in (REQUEST, longer, other, REQUEST):
        server.ask(request)
    seeds = [body["sampling_params"]["seed"] for body in server.bodies]
    assert len(set(seeds)) == 3 and seeds[0] == seeds[3]


def test_what_vllm_cannot_give_is_refused_before_it_is_sent() -> None:
    server = FakeVLLM()
    for sampling in (Sampling(top_k=5), Sampling(top_p=0.9)):
        with pytest.raises(UserError, match=r"http://a:8000: .*after top-k and top-p.*roll out with SGLang"):
            server.ask(replace(REQUEST, sampling=sampling))
    with pytest.raises(UserError, match="no mode isolated; use replay"):
        server.ask(replace(REQUEST, joined=(JoinedBlock(1, (2,)),)))
    assert not server.bodies
    server.answers.append(answer_of([11] * 4))
    assert server.ask(replace(REQUEST, sampling=Sampling(0.0, top_k=5))).completion.tokens == (11,) * 4


@pytest.mark.parametrize(
    ("answer", "message"),
    [
        (answer_of([11, 12], "abort"), "ended a request with 'abort'"),
        (answer_of([11, 12]), "cut at 2 of 4 tokens"),
        (answer_of([1] * 5), "of 5 do not match"),
        (answer_of([1] * 4, logprob=-9999.0), "of 4 do not match"),
        (answer_of([1] * 4, token_ids=[2] * 4), "of 4 do not match"),
        (answer_of([1] * 4, logprobs=None), "without TypeError"),
        ({"choices": []}, "without ValueError"),
        ([], "without TypeError"),
        (httpx.Response(200, text="<html>"), "no JSON: '<html>'"),
        (httpx.Response(500, text="EngineCore died"), "answered 500: EngineCore died"),
    ],
)
def test_what_another_server_may_answer(answer: Any, message: str) -> None:
    with pytest.raises(Unreachable, match=message) as raised:
        FakeVLLM(answer).ask()
    assert URL in str(raised.value)


def test_what_the_server_refuses_ends_the_run_in_one_line() -> None:
    answer = httpx.Response(403, json={"error": {"message": "Restart with\n--enable-scale-out"}})
    with pytest.raises(
        UserError, match=rf"{URL}{GENERATE} answered 403: .*enable-scale-out.*; change"
    ) as raised:
        FakeVLLM(answer).ask()
    assert "\n" not in str(raised.value)


def test_about() -> None:
    server = FakeVLLM()
    assert asyncio.run(server.client().info()) == ServerInfo("m", STOCK_MODES, 5, 64, None, True)
    # Out of its development mode it has no such path.
    server.weight_info = httpx.Response(404, json={"detail": "Not Found"})
    assert asyncio.run(server.client().info()).version == INITIAL_VERSION
    server.models = {"data": []}
    with pytest.raises(Unreachable, match="no vLLM server answers so"):
        asyncio.run(server.client().info())


def test_the_handshake_sees_seeds_that_are_ignored_and_raw_log_probs() -> None:
    assert not asyncio.run(FakeVLLM(seeds=False).client().info()).seeded
    with pytest.raises(UserError, match="start vLLM with --logprobs-mode processed_logprobs"):
        asyncio.run(FakeVLLM(tempered=False).client().info())


def test_score() -> None:
    scored = [None, {"8": {"logprob": -1.5}, "3": {"logprob": -0.1}}, {"9": {"logprob": -2.0}}]
    server = FakeVLLM({"prompt_logprobs": scored}, {"prompt_logprobs": scored[:2]})
    assert asyncio.run(server.client().score((7, 8, 9))) == (-1.5, -2.0)
    with pytest.raises(Unreachable, match="no log-probs of the prompt"):
        asyncio.run(server.client().score((7, 8, 9)))


def test_abort_all_names_what_is_under_way() -> None:
    names: list[list[str]] = []

    async def answer(request: httpx.Request) -> httpx.Response:
        body = json.loads(request.content)
        if request.url.path != GENERATE:
            names.append(body["request_ids"])
            aborted.set()
            return httpx.Response(200)
        requests.append(body["request_id"])
        await aborted.wait()
        return httpx.Response(200, json=answer_of([11], "abort"))

    async def work() -> None:
        answers = [asyncio.ensure_future(client.generate(REQUEST)) for _ in range(2)]
        while len(requests) < 2:
            await asyncio.sleep(0)
        await client.abort_all()
        results = await asyncio.gather(*answers, return_exceptions=True)
        assert [type(result) for result in results] == [Unreachable] * 2

    requests: list[str] = []
    aborted = asyncio.Event()
    client = VllmClient(URL, transport=httpx.MockTransport(answer))
    asyncio.run(work())
    assert {*names[0]} == {f"generate-tokens-{name}" for name in requests}
