"""`serve --engine sglang` over a server that answers by script: the same API, and what servers cannot do."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import httpx
import pytest

from megatron_parallel_r1.errors import UserError
from megatron_parallel_r1.rollout.engine import Sampling
from megatron_parallel_r1.rollout.servers.client import GenerateRequest
from megatron_parallel_r1.serve.engines import EngineChoice
from tests.reference.traces import TAGS
from tests.serve.release import THINKING, write_release
from tests.serve.server import chat, events
from tests.unit.rollout.fake_servers import drawn
from tests.unit.rollout.scripted_server import Answer, as_json, scripted_server
from tests.unit.rollout.test_sglang import FakeSGLang, answer_of

CLI = [sys.executable, "-W", "ignore", "-m", "megatron_parallel_r1.cli", "serve", "--port", "0"]


class ServingSGLang(FakeSGLang):
    """Draws traces with blocks; what the handshake sends it answers as `FakeSGLang` does."""

    def __init__(self, folder: Path) -> None:
        super().__init__()
        self.server_info |= {"model_path": str(folder), "context_length": 4000}
        self.server_info |= {"max_total_num_tokens": 4000, "max_req_input_len": 4000}
        self.lost = False

    def __call__(self, path: str, body: Any) -> Answer:
        if self.lost:
            return as_json({"error": "out of memory"}, 500)
        return as_json({}) if path == "/health" else super().__call__(path, body)

    def handshake(self, body: dict[str, Any]) -> Any:
        params, tokens = body["sampling_params"], body["input_ids"]
        if tokens[0] == 0:
            return super().handshake(body)
        bias = frozenset(map(int, params.get("logit_bias", {})))
        sampling = Sampling(params["temperature"], seed=params["sampling_seed"])
        stop = frozenset(params["stop_token_ids"])
        request = GenerateRequest(tuple(tokens), sampling, params["max_new_tokens"], stop, bias, "t")
        new = list(drawn(request).tokens)
        return answer_of(new, "stop" if new[-1] in stop else "length", weight_version="default")


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    thinking = THINKING.replace(mode="replay", max_response_tokens=300)
    return write_release(tmp_path_factory.mktemp("servers") / "tiny", thinking)


@contextmanager
def over(folder: Path, script: ServingSGLang, *options: str) -> Iterator[httpx.Client]:
    with scripted_server(script) as url:
        command = [*CLI, "--checkpoint", str(folder), "--engine", "sglang", "--server", url, *options]
        with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as server:
            try:
                assert server.stdout is not None
                with httpx.Client(base_url=server.stdout.readline().split()[-1], timeout=60) as client:
                    yield client
            finally:
                server.terminate()


def test_the_same_api_over_servers(folder: Path) -> None:
    script = ServingSGLang(folder)
    with over(folder, script) as client:
        for seed in range(50):
            body = chat("w8 w9", seed=seed)
            (choice,) = client.post("/v1/chat/completions", json=body).json()["choices"]
            if choice["parallel"]["blocks"]:
                break
        assert choice["parallel"]["blocks"], "no seed opened a block"
        assert client.post("/v1/chat/completions", json=body).json()["choices"] == [choice]
        with client.stream("POST", "/v1/chat/completions", json=body | {"stream": True}) as response:
            chunks = [piece for chunk in events(response) for piece in chunk["choices"]]
        streamed = "".join(piece["delta"].get("content", "") for piece in chunks)
        assert streamed == choice["message"]["content"] and len(chunks) > 5
        sent = [made for made in script.bodies if made["input_ids"][0] != 0]
        assert max(made["sampling_params"]["max_new_tokens"] for made in sent) == 16
        scored = client.post("/v1/chat/completions", json=body | {"logprobs": True}).json()["choices"][0]
        logprobs = {entry["logprob"] for entry in scored["logprobs"]["content"]}
        assert logprobs == {-0.5, 0.0}
        for field, value in (
            ("parallel", {"mode": "isolated"}),
            ("top_logprobs", 2),
        ):
            refused = client.post("/v1/chat/completions", json=body | {"logprobs": True, field: value})
            assert refused.status_code == 400 and "rollout servers" in refused.json()["error"]["message"]
        echo = {"prompt": "w8", "echo": True, "logprobs": 0}
        assert client.post("/v1/completions", json=echo).json()["error"]["param"] == "echo"
        assert client.get("/health").json() == {
            **{"status": "ok", "running": 0, "waiting": 0, "cache_tokens": 0},
            **{"servers": 1, "servers_up": 1},
        }
        assert "parallel_r1_serve_servers_up 1.0" in client.get("/metrics").text
        assert TAGS.parallel in sent[0]["sampling_params"]["stop_token_ids"]


def test_a_server_that_fails_is_an_error_in_the_apis_shape(folder: Path) -> None:
    script = ServingSGLang(folder)
    with over(folder, script, "--seconds", "5") as client:
        assert client.get("/ready").status_code == 200
        script.lost = True
        answer = client.post("/v1/chat/completions", json=chat("w8"))
        assert answer.status_code in (502, 503, 504) and answer.json()["error"]["code"]
        script.lost = False
        while client.get("/ready").status_code != 200:
            pass
        assert client.post("/v1/chat/completions", json=chat("w8", max_tokens=5)).status_code == 200


@pytest.mark.parametrize(
    ("choice", "device", "message"),
    [
        (EngineChoice(urls=("http://x",)), None, "give --engine"),
        (EngineChoice("sglang"), None, "needs --server URL"),
        (EngineChoice("vllm", ("http://x",), servers=1), None, "needs --server URL"),
        (EngineChoice("sglang", servers=1), "cpu", "--device is of the native engine"),
    ],
)
def test_what_does_not_go_together(choice: EngineChoice, device: str | None, message: str) -> None:
    with pytest.raises(UserError, match=message):
        choice.check(device)


@pytest.mark.parametrize(
    ("engine", "changes", "message"),
    [
        ("sglang", {"mode": "isolated"}, "serve-rollout --isolated"),
        ("sglang", {}, "start it with that checkpoint"),
    ],
)
def test_servers_that_cannot_serve_it_are_one_line(
    tmp_path: Path, folder: Path, engine: str, changes: dict[str, Any], message: str
) -> None:
    other = write_release(tmp_path / "other", THINKING.replace(**({"mode": "replay"} | changes)))
    script = ServingSGLang(other if changes else folder)
    with scripted_server(script) as url:
        command = [*CLI, "--checkpoint", str(other), "--engine", engine, "--server", url]
        done = subprocess.run(command, capture_output=True, text=True, timeout=120)
    assert done.returncode == 2 and message in done.stderr
    assert len(done.stderr.strip().splitlines()) == 1, json.dumps(done.stderr)
