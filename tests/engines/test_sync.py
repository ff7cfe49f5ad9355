"""Weights published to a real SGLang server, by each transport and from a split model, are computed with."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path

import httpx
import pytest
import torch

from megatron_parallel_r1.errors import UserError
from megatron_parallel_r1.model import process
from megatron_parallel_r1.model.gpt import Model, build_model
from megatron_parallel_r1.sync.probe import difference
from megatron_parallel_r1.sync.publisher import Publisher
from megatron_parallel_r1.sync.settings import InFlight, Kind, Sync
from megatron_parallel_r1.sync.sglang import SglangControl
from tests.engines.servers import sglang
from tests.engines.trained import EXACT, ROWS, SHAPE, Trained, draw, write_drawn

pytestmark = [pytest.mark.engines, pytest.mark.slow]

ROOT = Path(__file__).resolve().parents[2]
KINDS: tuple[Kind, ...] = ("distributed", "tensor", "disk")


@pytest.fixture(scope="module")
def world() -> Iterator[None]:
    torch.set_num_threads(1)
    with process.running(seed=1):
        yield


@pytest.fixture(scope="module")
def model(world: None) -> Model:
    return build_model(SHAPE)


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """A server of the tied model. Each test publishes its own weights."""
    with sglang(write_drawn(tmp_path_factory.mktemp("sync") / "tied", SHAPE, seed=100)) as url:
        yield url


@contextmanager
def publishing(model: Model, folder: Path, *urls: str, **changed: object) -> Iterator[Publisher]:
    usual = Sync(bucket_bytes=30_000, tolerance=EXACT, timeout_s=120, folder=folder)
    controls = [SglangControl(url, 120) for url in urls]
    publisher = Publisher(controls, model, replace(usual, **changed), ROWS, Trained(model))
    yield publisher
    publisher.end()


def test_a_split_model_reaches_the_server_by_each_transport(server: str, tmp_path: Path) -> None:
    torchrun = (sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "4")
    out = tmp_path / "found.json"
    layout = ("--tensor", "2", "--pipeline", "2")
    done = subprocess.run(
        [*torchrun, "-m", "tests.engines.publishing", str(out), *layout, "--url", server, *KINDS],
        cwd=ROOT,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        timeout=900,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    found = json.loads(out.read_text())
    for kind, one in zip([kind for kind in KINDS for _ in range(2)], found, strict=True):
        print(f"TP2 x PP2, {kind}: largest difference {one['difference']:.1e}")
    assert [one["version"] for one in found] == list(range(1, 7))
    assert all(one["in_step"] == [server] and not one["out"] and one["difference"] <= EXACT for one in found)
    assert SglangControl(server).facts().version == 6


@pytest.mark.parametrize("kind", KINDS)
def test_two_updates_are_exact_and_differ(server: str, model: Model, tmp_path: Path, kind: Kind) -> None:
    control = SglangControl(server, 120)
    scores = []
    with publishing(model, tmp_path, server, transport=kind) as publisher:
        for version in (21, 22):
            draw(model, version)
            assert publisher.publish(version).difference <= EXACT
            scores.append(control.score(ROWS))
            assert control.facts().version == version
    # That exactness says something: the versions are nats apart.
    assert difference(*scores) > 0.5
    if kind == "disk":
        # SGLang reads a folder; the pruned ones are gone, and the last one is whole.
        assert sorted(path.name for path in tmp_path.iterdir()) == ["version-21", "version-22"]


@pytest.mark.parametrize("in_flight", ["finish", "retract", "abort"])
def test_what_becomes_of_requests_under_way(
    server: str, model: Model, tmp_path: Path, in_flight: InFlight
) -> None:
    asked = {
        "input_ids": [5, 6, 7],
        "sampling_params": {"max_new_tokens": 400, "temperature": 0, "ignore_eos": True},
    }
    answers: list[dict] = []

    def ask() -> None:
        answers.append(httpx.post(f"{server}/generate", json=asked, timeout=300).json())

    with publishing(model, tmp_path, server, in_flight=in_flight) as publisher:
        draw(model, 31)
        publisher.publish(31)
        request = threading.Thread(target=ask)
        request.start()
        wait_until_running(server)
        draw(model, 32)
        published = publisher.publish(32)
        request.join()
    assert published.in_step == (server,)
    about = answers[0]["meta_info"]
    spans = [(span["version"], span["end"] - span["start"]) for span in about["weight_versions"]]
    print(in_flight, about["finish_reason"], spans)
    if in_flight == "finish":
        assert spans == [("31", 400)]
    elif in_flight == "retract":
        assert [version for version, _count in spans] == ["31", "32"]
        assert sum(count for _version, count in spans) == 400 and about["finish_reason"]["type"] == "length"
    else:
        assert about["finish_reason"]["type"] == "abort" and len(answers[0]["output_ids"]) < 400
        assert {version for version, _count in spans} == {"31"}


def wait_until_running(url: str) -> None:
    end = time.monotonic() + 120
    while time.monotonic() < end:
        if httpx.get(f"{url}/v1/loads").json()["loads"][0]["num_running_reqs"]:
            return
        time.sleep(0.05)
    pytest.fail("the request did not begin")


def test_memory_is_given_back_and_taken_again(server: str, model: Model, tmp_path: Path) -> None:
    with publishing(model, tmp_path, server) as publisher:
        publisher.release()
        publisher.resume()
        draw(model, 41)
        assert publisher.publish(41).difference <= EXACT


def test_a_server_with_other_weights_is_not_gone_on_with(server: str, model: Model, tmp_path: Path) -> None:
    """As if the server had taken all and used none of it."""
    with publishing(model, tmp_path, server) as publisher:
        draw(model, 51)
        publisher.publish(51)
        publisher._sender.transport = Deaf(publisher._sender.transport)
        draw(model, 52)
        with pytest.raises(UserError, match=rf"{server}: .*version 52 .* weights of the version before"):
            publisher.publish(52)


class Deaf:
    """A transport that carries nothing, and says that all arrived."""

    def __init__(self, real) -> None:
        self._real = real

    def open(self, servers, facts, version) -> None: ...

    def send(self, bucket) -> None: ...

    def close(self):
        from megatron_parallel_r1.sync.transport import Passed

        return Passed({})

    def end(self) -> None:
        self._real.end()


def test_a_server_that_dies_is_left_out_and_one_that_comes_back_is_taken_in(
    server: str, model: Model, tmp_path: Path
) -> None:
    folder = write_drawn(tmp_path / "second", SHAPE, seed=101)
    with publishing(model, tmp_path, server) as publisher:
        with sglang(folder) as second:
            publisher.add(SglangControl(second, 120))
            draw(model, 61)
            assert set(publisher.publish(61).in_step) == {server, second}
            transport = publisher._sender.transport
            send, sent = transport.send, []

            def killing(bucket) -> None:
                sent.append(bucket)
                if len(sent) == 3:
                    end_now.set()
                    gone.wait()
                send(bucket)

            transport.send = killing
            draw(model, 62)
            end_now, gone = threading.Event(), threading.Event()
            result: list = []
            thread = threading.Thread(target=lambda: result.append(publisher.publish(62)))
            thread.start()
            end_now.wait(120)
        gone.set()
        thread.join(300)
        assert not thread.is_alive()
        (published,) = result
        assert published.in_step == (server,) and list(published.out) == [second]
        assert published.difference <= EXACT and SglangControl(server).facts().version == 62
        publisher.remove(second)
        draw(model, 63)
        assert publisher.publish(63).in_step == (server,)


def test_an_untied_model(model: Model, tmp_path: Path) -> None:
    untied = build_model(replace(SHAPE, tied=False))
    with sglang(write_drawn(tmp_path / "untied", untied.shape, seed=102)) as url:
        for version, kind in enumerate(KINDS, 71):
            with publishing(untied, tmp_path / "versions", url, transport=kind) as publisher:
                draw(untied, version)
                assert publisher.publish(version).difference <= EXACT
