"""A real server in a process of its own, and the questions that most tests ask it."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import httpx

PROMPT = "w8 w9 w10"


def chat(text: str = PROMPT, **fields: Any) -> dict[str, Any]:
    return {"messages": [{"role": "user", "content": text}], **fields}


def start(folder: Path, stderr: int | None = None, **settings: Any) -> subprocess.Popen[str]:
    """A fresh server; its first line has its address."""
    command = [sys.executable, "-W", "ignore", "-m", "tests.serve.start", str(folder), json.dumps(settings)]
    environment = os.environ | {"OMP_NUM_THREADS": "1", "TOKENIZERS_PARALLELISM": "false"}
    root = Path(__file__).resolve().parents[2]
    return subprocess.Popen(
        command, stdout=subprocess.PIPE, stderr=stderr, text=True, env=environment, cwd=root
    )


@contextmanager
def running(folder: Path, **settings: Any) -> Iterator[httpx.Client]:
    """A client of a fresh server, which is stopped afterwards and must then end of itself."""
    with start(folder, **settings) as server:
        try:
            line = server.stdout.readline()
            assert " thinks at http://" in line, line
            with httpx.Client(base_url=line.split()[-1], timeout=60) as client:
                yield client
        finally:
            server.terminate()
            assert server.wait(timeout=20) in (0, -signal.SIGTERM)


def events(response: httpx.Response) -> Iterator[dict[str, Any]]:
    """The chunks of a stream, which must end in [DONE]."""
    ended = False
    for line in response.iter_lines():
        assert not ended, "something came behind [DONE]"
        if line == "data: [DONE]":
            ended = True
        elif line and not ended:
            yield json.loads(line.removeprefix("data: "))
        if ended:
            break
    assert ended, "the stream broke off"


def wait_until_idle(client: httpx.Client, seconds: float = 10) -> dict[str, Any]:
    """What /health tells once nothing is under way, or after that time."""
    end = time.monotonic() + seconds
    while True:
        health = client.get("/health").json()
        if time.monotonic() > end or not (health["running"] or health["waiting"] or health["cache_tokens"]):
            return health
        time.sleep(0.02)
