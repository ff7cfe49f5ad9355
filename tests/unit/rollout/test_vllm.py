"""What is sent to vLLM, and what is made of its answers. The real server: tests/engines."""

from __future__ import annotations

import asyncio
import threading
from dataclasses import replace
from typing import Any

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
from megatron_parallel_r1.rollout.servers.vllm import VllmClient
from tests.unit.rollout.scripted_server import Answer, FakeEngine, as_json, scripted_server

GENERATE = "/inference/v1/generate"
REQUEST = GenerateRequest(
    (7, 8, 9), Sampling(0.5, seed=(1 << 62) + 3), 4, frozenset({3, 6}), frozenset({0}), "t"
)


class FakeVLLM(FakeEngine[VllmClient]):
    client = VllmClient

    def __init__(self, *answers: Any, seeds: bool = True, tempered: bool = True) -> None:
        super().__init__(*answers)
        self.weight_info = as_json({"weight_version": "5"})
        self.models: Any = {"data": [{"root": "m", "max_model_len": 64}]}
        self.seeds, self.tempered = seeds, tempered

    def inform(self, path: str) -> Any:
        return {"/v1/models": self.models, "/weight_info": self.weight_info}.get(path)

    def handshake(self, body: dict[str, Any]) -> Any:
        # A token's log-prob falls with its number.
        params = body["sampling_params"]
        if "prompt_logprobs" in params:
            scored = [None, *({str(token): {"logprob": -float(token)}} for token in body["token_ids"][1:])]
            return {"prompt_logprobs": scored}
        drawn = [5] * 31 + [5 if self.seeds else len(self.bodies)]
        if params["max_tokens"] == 1:
            drawn = [5 + params["seed"] % 4]
        slope = 1 / params["temperature"] if self.tempered else 1.0
        return answer_of(drawn, logprob=-slope * drawn[-1])

    def ask(self, request: GenerateRequest = REQUEST) -> GenerateResult:
        return self.do(lambda client: client.generate(request))


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
        with pytest.raises(UserError, match=r"127.0.0.1:\d+: .*after top-k and top-p.*roll out with SGLang"):
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
        (Answer(b"<html>"), "no JSON: '<html>'"),
        (Answer(b"EngineCore died", 500), "answered 500: EngineCore died"),
    ],
)
def test_what_another_server_may_answer(answer: Any, message: str) -> None:
    server = FakeVLLM(answer)
    with pytest.raises(Unreachable, match=message) as raised:
        server.ask()
    assert server.url in str(raised.value)


def test_what_the_server_refuses_ends_the_run_in_one_line() -> None:
    answer = as_json({"error": {"message": "Restart with\n--enable-scale-out"}}, 403)
    with pytest.raises(
        UserError, match=rf"http://127.0.0.1:\d+{GENERATE} answered 403: .*enable-scale-out.*; change"
    ) as raised:
        FakeVLLM(answer).ask()
    assert "\n" not in str(raised.value)


def test_about() -> None:
    server = FakeVLLM()
    assert server.do(VllmClient.info) == ServerInfo("m", STOCK_MODES, 5, 64, None, True)
    # Out of its development mode it has no such path.
    server.weight_info = as_json({"detail": "Not Found"}, 404)
    assert server.do(VllmClient.info).version == INITIAL_VERSION
    server.models = {"data": []}
    with pytest.raises(Unreachable, match="no vLLM server answers so"):
        server.do(VllmClient.info)


def test_the_handshake_sees_seeds_that_are_ignored_and_raw_log_probs() -> None:
    assert not FakeVLLM(seeds=False).do(VllmClient.info).seeded
    with pytest.raises(UserError, match="start vLLM with --logprobs-mode processed_logprobs"):
        FakeVLLM(tempered=False).do(VllmClient.info)


def test_score() -> None:
    scored = [None, {"8": {"logprob": -1.5}, "3": {"logprob": -0.1}}, {"9": {"logprob": -2.0}}]
    server = FakeVLLM({"prompt_logprobs": scored}, {"prompt_logprobs": scored[:2]})
    assert server.do(lambda client: client.score((7, 8, 9))) == (-1.5, -2.0)
    with pytest.raises(Unreachable, match="no log-probs of the prompt"):
        server.do(lambda client: client.score((7, 8, 9)))


def test_abort_all_names_what_is_under_way() -> None:
    names: list[list[str]] = []

    def answer(path: str, body: Any) -> Answer:
        if path != GENERATE:
            names.append(body["request_ids"])
            aborted.set()
            return Answer()
        requests.append(body["request_id"])
        aborted.wait(60)
        return as_json(answer_of([11], "abort"))

    async def work(client: VllmClient) -> None:
        answers = [asyncio.ensure_future(client.generate(REQUEST)) for _ in range(2)]
        while len(requests) < 2:
            await asyncio.sleep(0.01)
        await client.abort_all()
        results = await asyncio.gather(*answers, return_exceptions=True)
        assert [type(result) for result in results] == [Unreachable] * 2

    requests: list[str] = []
    aborted = threading.Event()
    with scripted_server(answer) as url:
        asyncio.run(work(VllmClient(url)))
    assert {*names[0]} == {f"generate-tokens-{name}" for name in requests}
