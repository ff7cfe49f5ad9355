"""The metrics of a whole run, scraped after each step, and Grafana's dashboard of them."""

from __future__ import annotations

import json
import re
import socket
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest

from megatron_parallel_r1.config.reader import read_recipe
from megatron_parallel_r1.curriculum.run import run
from megatron_parallel_r1.distributed.stragglers import StragglerWatch
from megatron_parallel_r1.errors import UserError
from megatron_parallel_r1.rollout.servers.pool import ServerPool
from megatron_parallel_r1.run.stage_loop import StageLoop
from tests.unit.rollout.fake_servers import FakeServer
from tests.unit.run.test_exporter import free_port, samples

RECIPE = Path(__file__).parent / "mini.yaml"
DASHBOARD = Path(__file__).parents[2] / "docs/grafana_dashboard.json"
SHORT = ("stages.cold_start.steps=1", "stages.cold_start.evaluate=false", "stages.rl.evaluate=false")
SHORT += ("stages.rl.steps=2", "stages.rl.max_off_policy_steps=1", "evaluation=null")


@pytest.fixture(scope="module")
def scraped(tmp_path_factory: pytest.TempPathFactory) -> dict[tuple[str, int], dict[str, float]]:
    """The metrics after each step of a run, by stage and step."""
    port, found, end = free_port(), {}, StageLoop.end

    def end_and_scrape(loop: StageLoop, step: int, *arguments: Any) -> None:
        end(loop, step, *arguments)
        text = httpx.get(f"http://127.0.0.1:{port}/metrics").text
        stage = re.search(r'parallel_r1_step{.*stage="(\w+)"', text)
        assert stage
        found[stage[1], step] = samples(text)

    out = tmp_path_factory.mktemp("run")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(StageLoop, "end", end_and_scrape)
        run(read_recipe(RECIPE, [*SHORT, f"metrics_port={port}", f"out={out}"]))
    with pytest.raises(httpx.ConnectError):
        httpx.get(f"http://127.0.0.1:{port}/metrics")
    return found


def test_each_step_can_be_read_when_it_has_ended(scraped: dict[tuple[str, int], dict[str, float]]) -> None:
    assert list(scraped) == [("cold_start", 1), ("rl", 1), ("rl", 2)]
    assert [metrics["step"] for metrics in scraped.values()] == [1, 1, 2]
    assert scraped["cold_start", 1]["training_tokens_per_second"] > 0
    # The second batch may have been rolled out during the first step.
    last = scraped["rl", 2]
    assert last["rollout_tokens_per_second"] > 0 and last["training_tokens_per_second"] > 0
    assert last["staleness"] == 1 and last["queue_batches"] == 0 and last["mismatch_max"] <= 2e-5


def test_a_busy_port_is_said_before_anything_is_written(tmp_path: Path) -> None:
    with socket.create_server(("", 0)) as busy:
        port = busy.getsockname()[1]
        with pytest.raises(UserError, match=f"metrics_port {port}: Address already in use"):
            run(read_recipe(RECIPE, [*SHORT, f"metrics_port={port}", f"out={tmp_path}"]))
    assert not (tmp_path / "mini/config.yaml").exists()


def queries(node: Any) -> Iterator[str]:
    """All queries of a dashboard."""
    for key, value in node.items() if isinstance(node, dict) else enumerate(node):
        if key in ("expr", "query"):
            yield value
        elif isinstance(value, dict | list):
            yield from queries(value)


def test_the_dashboard_asks_for_metrics_that_exist(scraped: dict[tuple[str, int], dict[str, float]]) -> None:
    several = StragglerWatch(["n1", "n2"]).metrics([1.0, 2.0])
    names = {*ServerPool(FakeServer, ["http://a"]).gauges(), *several}.union(*scraped.values())
    queried = {
        name
        for query in queries(json.loads(DASHBOARD.read_text()))
        for name in re.findall(r"parallel_r1_(\w+)", query)
    }
    assert queried <= names, queried - names
    # What an operator watches.
    assert queried >= {
        "step",
        "seconds_since_step",
        "rollout_tokens_per_second",
        "training_tokens_per_second",
    }
    assert queried >= {"queue_batches", "staleness", "mismatch_max", "servers_up", "time_pass_max_s"}
