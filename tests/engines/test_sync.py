"""Weights published to a real SGLang server, by each transport and from a split model, are computed with.

A tied model. An untied one, two servers and one that dies: test_losses.py."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
import torch

from megatron_parallel_r1.distributed import process
from megatron_parallel_r1.errors import UserError
from megatron_parallel_r1.model.gpt import Model, build_model
from megatron_parallel_r1.sync.probe import difference
from megatron_parallel_r1.sync.publisher import Publisher
from megatron_parallel_r1.sync.sender import PassResult
from megatron_parallel_r1.sync.settings import InFlightPolicy, Sync, TransportKind
from megatron_parallel_r1.sync.sglang import SglangControl
from tests.engines.servers import sglang
from tests.engines.trained import EXACT, ROWS, SHAPE, Trained, draw, write_drawn
from tests.engines.under_way import LONG, Asked

pytestmark = [pytest.mark.engines, pytest.mark.slow, pytest.mark.xdist_group("sync")]

ROOT = Path(__file__).resolve().parents[2]
KINDS: tuple[TransportKind, ...] = ("distributed", "tensor", "disk")


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
    publisher = Publisher(controls, model, usual.replace(**changed), ROWS, Trained(model))
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
    for kind, update in zip([kind for kind in KINDS for _ in range(2)], found, strict=True):
        print(f"TP2 x PP2, {kind}: largest difference {update['difference']:.1e}")
    assert [update["version"] for update in found] == list(range(1, 7))
    assert all(
        update["up_to_date"] == [server] and not update["failed"] and update["difference"] <= EXACT
        for update in found
    )
    assert SglangControl(server).info().version == 6


@pytest.mark.parametrize("kind", KINDS)
def test_two_updates_are_exact_and_differ(
    server: str, model: Model, tmp_path: Path, kind: TransportKind
) -> None:
    control = SglangControl(server, 120)
    scores = []
    with publishing(model, tmp_path, server, transport=kind) as publisher:
        for version in (21, 22):
            draw(model, version)
            assert publisher.publish(version).difference <= EXACT
            scores.append(control.score(ROWS))
            assert control.info().version == version
    # That exactness says something: the versions are nats apart.
    assert difference(*scores) > 0.5
    if kind == "disk":
        # SGLang reads a folder; the pruned ones are gone, and the last one is whole.
        assert sorted(path.name for path in tmp_path.iterdir()) == ["version-21", "version-22"]


class AskedControl(Asked, SglangControl):
    def question(self) -> tuple[str, dict]:
        params = {"max_new_tokens": LONG, "temperature": 0, "ignore_eos": True}
        return "/generate", {"input_ids": [5, 6, 7], "sampling_params": params}


@pytest.mark.parametrize("in_flight", ["finish", "retract", "abort"])
def test_what_becomes_of_requests_under_way(
    server: str, model: Model, tmp_path: Path, in_flight: InFlightPolicy
) -> None:
    # On a busy machine a request may be over before the pause comes; then another one is asked.
    for old in (31, 33, 35, 37, 39):
        with publishing(model, tmp_path, server) as publisher:
            draw(model, old)
            publisher.publish(old)
        with publishing(model, tmp_path, server, in_flight=in_flight) as publisher:
            control = AskedControl(server)
            publisher.add(control)
            draw(model, old + 1)
            published = publisher.publish(old + 1)
            control.request.join(300)
        assert published.up_to_date == (server,) and published.difference <= EXACT
        answer = control.answers[-1]
        about, count = answer["meta_info"], len(answer["output_ids"])
        spans = [(int(span["version"]), span["end"] - span["start"]) for span in about["weight_versions"]]
        print(in_flight, about["finish_reason"], spans)
        if in_flight == "finish" or spans != [(old, LONG)]:
            break
    if in_flight == "finish":
        assert spans == [(old, LONG)]
    elif in_flight == "retract":
        assert [version for version, _count in spans] == [old, old + 1]
        assert count == LONG and about["finish_reason"]["type"] == "length"
    else:
        assert about["finish_reason"]["type"] == "abort" and count < LONG
        assert {version for version, _count in spans} == {old}


def test_memory_is_given_back_and_taken_again(server: str, model: Model, tmp_path: Path) -> None:
    with publishing(model, tmp_path, server) as publisher:
        draw(model, 40)
        publisher.publish(40)
        publisher.release()
        draw(model, 41)
        assert publisher.publish(41).difference <= EXACT


def test_a_server_with_other_weights_is_not_gone_on_with(server: str, model: Model, tmp_path: Path) -> None:
    """As if the server had taken all and used none of it."""
    with publishing(model, tmp_path, server) as publisher:
        draw(model, 51)
        publisher.publish(51)
        publisher._sender.transport = Deaf(publisher._sender.transport)
        draw(model, 52)
        with pytest.raises(UserError, match=rf"{server}: .*version 52 .* previous version's weights"):
            publisher.publish(52)


class Deaf:
    """A transport that carries nothing, and says that all arrived."""

    def __init__(self, real) -> None:
        self._real = real

    def open(self, servers, infos, version) -> None: ...

    def send(self, bucket) -> None: ...

    def close(self):
        return PassResult({})

    def end(self) -> None:
        self._real.end()
