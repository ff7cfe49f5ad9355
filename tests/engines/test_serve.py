"""`parallel-r1 serve` over a real SGLang server, running or started by it."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import httpx
import pytest

from tests.engines.servers import START_SECONDS, Shared, python_of
from tests.serve.server import chat, events, wait_until_idle

pytestmark = [pytest.mark.engines, pytest.mark.slow, pytest.mark.xdist_group("sglang")]


@contextmanager
def serving(folder: Path, *options: str) -> Iterator[httpx.Client]:
    command = [sys.executable, "-W", "ignore", "-m", "megatron_parallel_r1.cli", "serve", "--port", "0"]
    command += ["--checkpoint", str(folder), "--engine", "sglang", *options]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as server:
        try:
            assert server.stdout is not None
            with httpx.Client(base_url=server.stdout.readline().split()[-1], timeout=START_SECONDS) as client:
                yield client
        finally:
            server.terminate()


def assert_serves(client: httpx.Client) -> None:
    blocks = 0
    for seed in range(6):
        body = chat("w8 w9", seed=seed)
        (choice,) = client.post("/v1/chat/completions", json=body).json()["choices"]
        with client.stream("POST", "/v1/chat/completions", json=body | {"stream": True}) as response:
            pieces = [piece for chunk in events(response) for piece in chunk["choices"]]
        assert "".join(piece["delta"].get("content", "") for piece in pieces) == choice["message"]["content"]
        blocks += len(choice["parallel"]["blocks"])
    assert blocks > 0
    assert wait_until_idle(client)["servers_up"] == 1


def test_serves_over_a_running_server(sglang_server: Shared) -> None:
    with serving(sglang_server.folder, "--server", sglang_server.url) as client:
        assert_serves(client)


def test_serves_over_a_server_of_its_own(sglang_server: Shared) -> None:
    assert python_of("sglang")
    with serving(sglang_server.folder, "--servers", "1") as client:
        assert_serves(client)
