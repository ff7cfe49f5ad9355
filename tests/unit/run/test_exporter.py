"""What Prometheus reads of a run. A whole run: tests/curriculum/test_metrics_endpoint.py."""

from __future__ import annotations

import re
from collections.abc import Iterator

import httpx
import pytest

from megatron_parallel_r1.errors import UserError
from megatron_parallel_r1.rollout.launcher.ports import free_port
from megatron_parallel_r1.rollout.servers.pool import ServerPool
from megatron_parallel_r1.run.exporter import Exporter
from tests.unit.rollout.fake_servers import FakeServer

SAMPLE = re.compile(r'^(parallel_r1_[a-z0-9_]+)\{((?:[a-z]+="(?:[^"\\\n]|\\.)*",?)+)\} (\S+)$')


@pytest.fixture
def exporter() -> Iterator[Exporter]:
    with Exporter({"run": 'a "run"', "seed": "0"}) as exporter:
        yield exporter


def samples(text: str) -> dict[str, float]:
    """Values by name and, if it has one, source; checks the format of each line."""
    found: dict[str, float] = {}
    typed = set()
    for line in text.splitlines():
        if line.startswith("# TYPE "):
            typed.add(line.split()[2])
            continue
        match = SAMPLE.match(line)
        assert match and match[1] in typed, line
        source = re.search(r'source="([^"]*)"', match[2])
        found[match[1].removeprefix("parallel_r1_") + (f"/{source[1]}" if source else "")] = float(match[3])
    return found


def test_a_scrape_reads_the_last_record_and_the_state_now(exporter: Exporter) -> None:
    port = free_port()
    exporter.serve(port)
    exporter.update({"stage": "rl", "kind": "rl", "step": 3, "steps": 9})
    assert samples(httpx.get(f"http://127.0.0.1:{port}/metrics").text)["step"] == 3
    record = {"tokens": 600, "time_draw_s": 2.0, "tokens_trained": 500, "time_train_s": 4.0}
    record |= {"loss": None, "reward_term": "accuracy", "servers_up": 9.0, "accuracy/gsm8k": 0.5}
    exporter.update({"stage": "rl", "kind": "rl", "step": 4, "steps": 9, "accuracy": 0.25, **record})
    pool = ServerPool(FakeServer, ["http://a", "http://b"])
    with exporter.following(pool):
        answer = httpx.get(f"http://127.0.0.1:{port}/metrics")
    found = samples(answer.text)
    assert answer.headers["content-type"].startswith("text/plain; version=0.0.4")
    assert (found["step"], found["steps"], found["accuracy"], found["accuracy/gsm8k"]) == (4, 9, 0.25, 0.5)
    assert found["rollout_tokens_per_second"] == 300 and found["training_tokens_per_second"] == 125
    # Servers that have not answered yet are not up, whatever the last step saw.
    assert (found["servers"], found["servers_up"], found["requests_waiting"]) == (2, 0, 0)
    assert 0 <= found["seconds_since_step"] < 600
    assert not {"loss", "reward_term", "stage"} & set(found)
    assert r'run="a \"run\"",seed="0",stage="rl",kind="rl"' in answer.text
    assert "servers" not in samples(exporter.text())
    assert httpx.get(f"http://127.0.0.1:{port}/").status_code == 404


def test_a_busy_port_is_one_line_and_a_port_is_free_again_at_the_end(exporter: Exporter) -> None:
    port = free_port()
    with Exporter({}) as first:
        first.serve(port)
        with pytest.raises(UserError, match=f"^metrics_port {port}: Address already in use; set"):
            exporter.serve(port)
    exporter.serve(port)


def test_no_port_is_no_endpoint(exporter: Exporter) -> None:
    exporter.serve(None)
    assert exporter._server is None
