"""`parallel-r1 serve` hands its flags on, and ends in one line where there is nothing to serve."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import httpx

CLI = [sys.executable, "-W", "ignore", "-m", "megatron_parallel_r1.cli", "serve"]
ENVIRONMENT = os.environ | {"OMP_NUM_THREADS": "1", "PARALLEL_R1_API_KEY": "secret"}


def test_it_serves_with_its_flags(release: Path) -> None:
    limits = ["--max-tokens", "7", "--cache-tokens", "40"]
    command = [*CLI, "--checkpoint", str(release), "--port", "0", "--name", "mine", *limits]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True, env=ENVIRONMENT) as server:
        try:
            address = server.stdout.readline().split()[-1]
            body = {"messages": [{"role": "user", "content": "w8"}], "max_tokens": 8, "temperature": 0}
            with httpx.Client(base_url=address, timeout=60) as client:
                assert client.get("/v1/models").status_code == 401
                client.headers["Authorization"] = "Bearer secret"
                assert client.get("/v1/models").json()["data"][0]["id"] == "mine"
                answered = client.post("/v1/chat/completions", json=body).json()
                assert answered["usage"]["completion_tokens"] == 7
                assert answered["choices"][0]["finish_reason"] == "length"
                refused = client.post("/v1/chat/completions", json=body | {"n": 6})
                assert refused.status_code == 400 and "40" in refused.json()["error"]["message"]
        finally:
            server.terminate()


def test_no_checkpoint_is_one_line(tmp_path: Path) -> None:
    done = subprocess.run(
        [*CLI, "--checkpoint", str(tmp_path)], env=ENVIRONMENT, capture_output=True, text=True, timeout=120
    )
    assert done.returncode == 2 and len(done.stderr.strip().splitlines()) == 1, done.stderr
