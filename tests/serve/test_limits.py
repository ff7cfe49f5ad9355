"""Queue, time, a client that goes away, the key: each ends in a status, and nothing is left open."""

from __future__ import annotations

import json
import shutil
import socket
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import httpx
import pytest

from megatron_parallel_r1.errors import UserError
from megatron_parallel_r1.serve.run import _listen
from megatron_parallel_r1.serve.served_model import ServedModel
from tests.serve.server import chat, events, running, wait_until_idle

IDLE = {"status": "ok", "running": 0, "waiting": 0, "cache_tokens": 0}
# Greedy, the random model repeats itself until its limit: about three seconds.
LONG = chat("w20", temperature=0)


def post(client: httpx.Client, body: dict) -> httpx.Response:
    return client.post("/v1/chat/completions", json=body)


def counters(client: httpx.Client) -> dict[str, float]:
    """What `/metrics` says."""
    lines = [line for line in client.get("/metrics").text.splitlines() if not line.startswith("#")]
    values = (line.removeprefix("parallel_r1_serve_").rpartition(" ")[::2] for line in lines)
    return {name: float(value) for name, value in values}


def test_a_full_queue_sends_away_and_the_time_limit_ends_the_rest(narrow: httpx.Client) -> None:
    with ThreadPoolExecutor(6) as pool:
        begin = time.monotonic()
        answers = list(pool.map(lambda _: post(narrow, LONG), range(6)))
    statuses = sorted(answer.status_code for answer in answers)
    assert statuses == [503] * 3 + [504] * 3
    assert time.monotonic() - begin < 4
    for answer in answers:
        error = answer.json()["error"]
        assert error["type"] == "server_error"
        if answer.status_code == 503:
            assert error["code"] == "queue_full" and int(answer.headers["retry-after"]) > 0
        else:
            assert error["code"] == "timeout"
    assert wait_until_idle(narrow) == IDLE
    before = counters(narrow)
    assert (before['requests_total{status="503"}'], before['requests_total{status="504"}']) == (3, 3)
    assert narrow.get("/ready").status_code == 200
    usage = post(narrow, chat(seed=1, max_tokens=5)).json()["usage"]
    after = counters(narrow)
    assert after['requests_total{status="200"}'] - before.get('requests_total{status="200"}', 0) == 1
    for name, field in (
        ("prompt_tokens_total", "prompt_tokens"),
        ("response_tokens_total", "completion_tokens"),
    ):
        assert after[name] - before[name] == usage[field]
    assert after["request_seconds_total"] > before["request_seconds_total"]


@pytest.mark.slow
def test_requests_wait_for_room_in_the_cache(release: Path) -> None:
    limits = {"cache_tokens": 6100, "waiting": 1, "seconds": 2.0}
    with running(release, limits=limits) as client, ThreadPoolExecutor(6) as pool:
        answers = list(pool.map(lambda _: post(client, LONG), range(6)))
        # Room for two of 3000 tokens, one waits.
        assert sorted(answer.status_code for answer in answers) == [503] * 3 + [504] * 3
        assert wait_until_idle(client) == IDLE
        refused = post(client, chat(n=3))
        assert refused.status_code == 400 and "6100 is the limit" in refused.json()["error"]["message"]
        assert post(client, chat(n=3, max_tokens=5)).status_code == 200


def test_a_stream_that_takes_too_long_ends_in_an_error(narrow: httpx.Client) -> None:
    with narrow.stream("POST", "/v1/chat/completions", json=LONG | {"stream": True}) as response:
        assert response.status_code == 200
        lines = [line for line in response.iter_lines() if line]
    assert '"code": "timeout"' in lines[-1] and "data: [DONE]" not in lines
    assert wait_until_idle(narrow) == IDLE


def most_tokens_until_idle(client: httpx.Client) -> int:
    """The largest number of tokens in the KV cache that /health tells until nothing is under way."""
    most = 0
    while (health := client.get("/health").json()) != IDLE:
        most = max(most, health["cache_tokens"])
        time.sleep(0.02)
    return most


def test_whoever_goes_away_frees_its_place(client: httpx.Client) -> None:
    """While it waits for its answer, in the middle of a stream, before it has read a byte of one."""
    with pytest.raises(httpx.ReadTimeout):
        client.post("/v1/chat/completions", json=LONG, timeout=0.5)
    held = [most_tokens_until_idle(client)]
    with client.stream("POST", "/v1/chat/completions", json=LONG | {"stream": True, "n": 3}) as response:
        stream = events(response)
        for _ in range(20):
            next(stream)
        assert client.get("/health").json()["cache_tokens"] > 0
    held.append(most_tokens_until_idle(client))
    with client.stream("POST", "/v1/chat/completions", json=LONG | {"stream": True}):
        pass
    held.append(most_tokens_until_idle(client))
    # At its own end, each response would hold 3000.
    assert max(held) < 2000, held


def test_health_answers_while_it_decodes(client: httpx.Client) -> None:
    with client.stream("POST", "/v1/chat/completions", json=LONG | {"stream": True, "n": 8}) as response:
        stream = events(response)
        next(stream)
        waits = []
        for _ in range(20):
            begin = time.monotonic()
            assert client.get("/health").json()["running"] == 1
            waits.append(time.monotonic() - begin)
    # One pass of eight rows takes some milliseconds; a busy machine is allowed a hundred times that.
    assert sorted(waits)[10] < 0.5
    assert wait_until_idle(client) == IDLE


def test_without_the_key_nothing_is_answered(narrow: httpx.Client) -> None:
    for header in (None, "", "Bearer", "Bearer wrong", "Basic ключ", "Bearer ключ2"):
        headers = {} if header is None else {"Authorization": header.encode()}
        with httpx.Client(base_url=narrow.base_url, headers=headers) as stranger:
            for answer in (post(stranger, chat()), stranger.get("/v1/models")):
                assert answer.status_code == 401 and answer.json()["error"]["code"] == "invalid_api_key"
            assert stranger.get("/health").status_code == stranger.get("/").status_code == 200
    (model,) = narrow.get("/v1/models").json()["data"]
    assert model["id"] == "tiny" and narrow.get("/v1/models/tiny").json() == model
    unknown = narrow.get("/v1/models/someone/else")
    assert unknown.status_code == 404 and unknown.json()["error"]["code"] == "model_not_found"


def test_it_listens_at_the_loopback_alone_and_only_under_its_name(client: httpx.Client) -> None:
    port = client.base_url.port
    assert client.base_url.host == "127.0.0.1"
    with socket.socket() as probe:  # all of 127/8 is this machine, but only one address was bound
        assert probe.connect_ex(("127.0.0.2", port)) != 0
    for host, status in (("evil.example", 403), (f"localhost:{port}", 200), ("[::1]", 200), ("", 403)):
        assert client.get("/v1/models", headers={"Host": host}).status_code == status, host


def test_the_port_is_held_from_the_start() -> None:
    """Who reads the address may ask at once; a second server is told while the first reads its weights."""
    with _listen("127.0.0.1", 0) as first:
        assert first.proto == socket.IPPROTO_TCP  # asyncio then sends each event of a stream at once
        port = first.getsockname()[1]
        socket.create_connection(("127.0.0.1", port), timeout=10).close()
        with pytest.raises(UserError, match="cannot listen"):
            _listen("127.0.0.1", port)


@pytest.mark.slow
def test_an_open_address_without_a_key_is_warned_of(release: Path, capfd: pytest.CaptureFixture[str]) -> None:
    with running(release, host="0.0.0.0") as client:
        url = f"http://127.0.0.1:{client.base_url.port}/v1/models"
        assert httpx.get(url, headers={"Host": "a.cluster"}).status_code == 200
    assert "warning: 0.0.0.0 is open to other machines, and no API key is set" in capfd.readouterr().err


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ('{"host": "256.0.0.1"}', "cannot listen"),
        pytest.param('{"api_key": " "}', "API key is empty", marks=pytest.mark.slow),
        pytest.param('{"device": "abacus"}', "device abacus", marks=pytest.mark.slow),
        ('{"limits": {"running": 0}}', "running must be at least 1"),
    ],
)
def test_what_it_cannot_start_with(release: Path, settings: str, message: str) -> None:
    command = [sys.executable, "-W", "ignore", "-m", "tests.serve.start", str(release), settings]
    done = subprocess.run(command, capture_output=True, text=True, timeout=60)
    assert done.returncode == 1 and message in done.stderr, done.stderr


@pytest.mark.parametrize("spoilt", ["absent", "no template", "unknown mode", "half a path", "no json"])
def test_a_folder_without_good_thinking_json(release: Path, tmp_path: Path, spoilt: str) -> None:
    folder = shutil.copytree(release, tmp_path / "spoilt")
    file = folder / "thinking.json"
    thinking = json.loads(file.read_text())
    texts = {
        "no template": json.dumps(thinking | {"prompt_template": "no place"}),
        "unknown mode": json.dumps(thinking | {"mode": "telepathic"}),
        "half a path": json.dumps(thinking | {"paths": 2.5}),
        "no json": "{",
    }
    file.unlink() if spoilt == "absent" else file.write_text(texts[spoilt])
    with pytest.raises(UserError, match=r"thinking\.json"):
        ServedModel.load(folder)
