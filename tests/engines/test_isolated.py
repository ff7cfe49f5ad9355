"""Isolated paths in a real SGLang server: log-probs are the trainer's, and nothing is computed twice.

The trainer's are those of `transformers` under the layout of mode `isolated`; tests/unit/train holds the
trainer to the same."""

from __future__ import annotations

import asyncio
import os
import socket
import subprocess
import time
from collections.abc import Callable
from pathlib import Path

import httpx
import pytest
import torch

from megatron_parallel_r1.rollout.joined_blocks import FIELD, JoinedBlock, encode_blocks
from megatron_parallel_r1.rollout.launcher.command import LaunchSettings
from megatron_parallel_r1.rollout.launcher.ports import bind_free
from megatron_parallel_r1.rollout.servers.sglang import SglangClient
from megatron_parallel_r1.rollout.settings import Thinking
from megatron_parallel_r1.rollout.thinking import Thinker, roll_out
from megatron_parallel_r1.sync.broadcast import BroadcastTransport
from megatron_parallel_r1.sync.buckets import Bucket
from megatron_parallel_r1.sync.settings import Sync
from megatron_parallel_r1.sync.sglang import SglangControl
from megatron_parallel_r1.thought.trace import Trace
from tests.engines.folders import untied_model, write_folder
from tests.engines.isolated import (
    HTTP_SECONDS,
    RETRACTING,
    STRICT,
    Flat,
    Reached,
    ask,
    healthy,
    rolled_out,
    started,
)
from tests.engines.servers import CONTEXT_TOKENS, START_SECONDS, Shared, python_of
from tests.reference.traces import TAGS
from tests.unit.rollout.serving.launched import launched
from tests.unit.rollout.test_exactness import TOLERANCE, largest_difference
from tests.unit.rollout.tiny import native_engine, random_prompts

pytestmark = [pytest.mark.engines, pytest.mark.slow, pytest.mark.xdist_group("sglang")]
LONG = Thinking(max_blocks=4, max_path_tokens=60, max_response_tokens=500)
NESTED = Thinking(max_blocks=4, max_depth=2, max_path_tokens=40, max_response_tokens=400)
# Of a join's prompt: the last token drawn, or `</Parallel><Summary>`; a nested one's forced `</Summary>` too.
NEW = 3


@pytest.fixture
def folder(isolated_server: Shared) -> Path:
    return isolated_server.folder


@pytest.fixture
def url(isolated_server: Shared) -> str:
    """Of a server with room for all; each test leaves its weights as they were."""
    return isolated_server.url


def blocks_of(traces: list[Trace]) -> int:
    return sum(len(list(trace.tree.all_blocks())) for trace in traces)


def assert_exact(name: str, traces: list[Trace], counters: dict[str, int], seed: int = 0) -> None:
    worst = largest_difference(untied_model(seed), traces, "isolated")
    tokens = sum(len(trace.tokens) for trace in traces)
    print(f"{name}: {worst:.2g} over {len(traces)} traces of {tokens} tokens, {counters}")
    assert worst <= TOLERANCE


@pytest.mark.parametrize("thinking", [LONG, NESTED], ids=["blocks", "nested"])
def test_logprobs_are_the_trainers_and_each_token_is_computed_once(url: str, thinking: Thinking) -> None:
    rolled = rolled_out(url, thinking, 32)
    assert_exact("a roomy cache", rolled.traces, rolled.counters)
    assert max(trace.tree.depth for trace in rolled.traces) == thinking.max_depth
    all_blocks = [block for trace in rolled.traces for _, block in trace.tree.all_blocks()]
    assert {len(block.paths) for block in all_blocks} >= {1, 2, 4, 8}
    assert sum(len(trace.tree.blocks) > 2 for trace in rolled.traces) >= 3
    lengths = [path.stop - path.start for block in all_blocks for path in block.paths]
    assert max(lengths) >= 6 * min(lengths)
    assert len(rolled.computed()) > 50 and max(rolled.computed()) <= NEW
    assert rolled.counters["joins"] == len(rolled.computed())
    assert rolled.counters["ends"] > 50
    assert rolled.counters["rebuilds"] == rolled.counters["rebuilt_tokens"] == 0


def test_without_the_plugins_joins_logprobs_are_off(url: str) -> None:
    rolled = rolled_out(url, NESTED, 32, engine=Flat)
    assert blocks_of(rolled.traces) > 10 and rolled.counters["joins"] == 0
    off = largest_difference(untied_model(0), rolled.traces, "isolated")
    print(f"flat text: {off:.2g}")
    assert off > 1000 * TOLERANCE


def test_a_seed_draws_the_native_engines_trace(url: str) -> None:
    rolled = rolled_out(url, NESTED, 24, seed=100)
    thinker = Thinker(native_engine(untied_model(0)), TAGS, NESTED)
    paths = [1 + index % 8 for index in range(24)]
    native = asyncio.run(roll_out(thinker, random_prompts(24, 100), range(100, 124), paths=paths))
    same = sum(served.tokens == theirs.tokens for served, theirs in zip(rolled.traces, native, strict=True))
    # A draw within rounding of the border between two tokens may fall on either side: one in some 1e5 tokens.
    assert same >= 22 and blocks_of(native) > 20


def test_a_flushed_cache_is_rebuilt_under_what_runs(url: str, folder: Path) -> None:
    async def update_again_and_again(client: httpx.AsyncClient, reached: Reached) -> None:
        for mode, joins in (("retract", 20), ("in_place", 40), ("retract", 80)):
            await reached(joins)
            (await client.post("/pause_generation", json={"mode": mode})).raise_for_status()
            if mode == "retract":
                body = {"model_path": str(folder), "flush_cache": True}
                (await client.post("/update_weights_from_disk", json=body)).raise_for_status()
            (await client.post("/continue_generation", json={})).raise_for_status()

    rolled = rolled_out(url, LONG, 32, seed=200, meanwhile=update_again_and_again)
    assert_exact("pauses, flushes", rolled.traces, rolled.counters)
    assert rolled.counters["rebuilds"] > 0 and rolled.counters["rebuilt_tokens"] > 0


def test_aborted_requests_leave_nothing_behind(url: str) -> None:
    async def abort_twice(client: httpx.AsyncClient, reached: Reached) -> None:
        for joins in (20, 60):
            await reached(joins)
            (await client.post("/flush_cache")).read()
            (await client.post("/abort_request", json={"abort_all": True})).raise_for_status()

    rolled = rolled_out(url, NESTED, 24, seed=300, meanwhile=abort_twice)
    assert_exact("aborts", rolled.traces, rolled.counters)


def test_new_weights_rebuild_what_the_old_ones_wrote(url: str, folder: Path, tmp_path: Path) -> None:
    other = write_folder(tmp_path / "second", untied_model(1))

    def update(to: Path) -> None:
        body = {"model_path": str(to), "flush_cache": True}
        httpx.post(f"{url}/update_weights_from_disk", json=body, timeout=HTTP_SECONDS).raise_for_status()

    try:
        before = rolled_out(url, LONG, 8, seed=400)
        update(other)
        after = rolled_out(url, LONG, 16, seed=400)
        assert_exact("new weights", after.traces, after.counters, seed=1)
        assert after.counters["joins"] > 5
        # What a join drew from the old weights, asked of the new ones: the same as on a server of their own.
        request = max(
            (request for request, _ in before.log if request.joined), key=lambda request: len(request.joined)
        )
        old = asyncio.run(SglangClient(url).generate(request))
        assert old.cached_tokens >= len(request.tokens) - NEW, "the writers brought it all"
        httpx.post(f"{url}/flush_cache", timeout=HTTP_SECONDS).raise_for_status()
        again = asyncio.run(SglangClient(url).generate(request))
        assert again.completion.tokens == old.completion.tokens
        assert again.completion.logprobs == pytest.approx(old.completion.logprobs, abs=TOLERANCE)
    finally:
        update(folder)


def test_bad_blocks_are_answered_and_the_server_lives(url: str) -> None:
    good = encode_blocks([JoinedBlock(2, (4, 6))])
    bad = {
        "list of integers": ("x", -1),
        "breaks off": ([2, 2, 4], -1),
        "does not fit": (encode_blocks([JoinedBlock(2, (4, 9))]), -1),
        "logprob_start_len lies below 6": (good, 3),
    }
    for why, (numbers, start) in bad.items():
        params = {"max_new_tokens": 2, "custom_params": {FIELD: numbers}}
        body = {"input_ids": list(range(7, 15)), "sampling_params": params, "return_logprob": True}
        answer = ask(url, body | {"logprob_start_len": start})
        assert answer.status_code == 400 and why in answer.text, answer.text
    params = {"max_new_tokens": 2, "n": 4, "custom_params": {FIELD: good}}
    answers = ask(url, {"input_ids": list(range(7, 15)), "sampling_params": params}).json()
    assert [answer["meta_info"]["prompt_tokens"] for answer in answers] == [8] * 4


def test_requests_without_blocks_are_a_stock_servers(url: str, sglang_server: Shared) -> None:
    prompts = random_prompts(12, seed=5)

    def answers(of: str) -> list[tuple[list[int], list[float]]]:
        httpx.post(f"{of}/flush_cache", timeout=HTTP_SECONDS).raise_for_status()
        results = []
        for index, prompt in enumerate(prompts):
            params = {"max_new_tokens": 24, "sampling_seed": index, "ignore_eos": True}
            params["temperature"] = 0.0 if index % 2 else 1.0
            answer = ask(of, {"input_ids": prompt, "sampling_params": params, "return_logprob": True}).json()
            logprobs = [logprob for logprob, *_ in answer["meta_info"]["output_token_logprobs"]]
            results.append((answer["output_ids"], logprobs))
        return results

    stock = sglang_server.url
    assert "isolated" not in asyncio.run(SglangClient(stock).info()).modes
    assert "isolated" in asyncio.run(SglangClient(url).info()).modes
    assert answers(stock) == answers(url)


# Live traces of 32 want 3.5 times the cache; requests are retracted and long prompts cut into chunks.
SMALL = {"cache_tokens": 1100, "options": ("--chunked-prefill-size", "64")}


def assert_a_small_cache_is_exact(url: str, ranks: int, log: Callable[[], str]) -> None:
    thinking = Thinking(max_blocks=4, max_depth=2, max_path_tokens=40, max_response_tokens=300)
    rolled = rolled_out(url, thinking, 32, seed=500)
    assert_exact(f"a small cache, {ranks} ranks", rolled.traces, rolled.counters)
    assert sum(len(trace.prompt) + len(trace.tokens) for trace in rolled.traces) > 3.5 * 1100
    assert rolled.counters["rebuilds"] > 10 and rolled.counters["rebuilt_tokens"] > 300
    # Each is told in the log too, by every rank.
    assert log().count("lost paths from the cache") == ranks * rolled.counters["rebuilds"]
    assert log().count("lost tokens of") == ranks * rolled.counters["rebuilt_paths"]


def test_a_cache_too_small_for_all_finishes_every_trace_exactly(folder: Path) -> None:
    # It schedules ahead as on a GPU.
    with healthy(LaunchSettings(folder, **SMALL), RETRACTING, overlap=True) as server:
        assert_a_small_cache_is_exact(server.url, 1, lambda: "\n".join(server.last_lines(10**6)))


def test_two_ranks_on_two_nodes_do_too_and_take_weights(folder: Path, tmp_path: Path) -> None:
    """Of one server, each under a supervisor of its own; both on this machine."""
    env = STRICT | RETRACTING | {"SGLANG_CPU_OMP_THREADS_BIND": "0|1"}
    with socket.socket() as listener:
        meeting = {"nodes": 2, "rendezvous": f"127.0.0.1:{bind_free(listener, '127.0.0.1')}"}
    usual = {"checkpoint": folder, "isolated": True, "port": 0, "context_tokens": CONTEXT_TOKENS, "tensor": 2}
    both = usual | meeting | SMALL | {"python": python_of("sglang"), "device": "cpu"}
    logs = [tmp_path / "0", tmp_path / "1"]
    with (
        launched(env, **both, log_dir=logs[0]) as first,
        launched(env, **both, node_rank=1, log_dir=logs[1]),
    ):
        _, url, _ = first.next_healthy(START_SECONDS)

        def log() -> str:
            return "".join((folder / "server-0.log").read_text() for folder in logs)

        assert_a_small_cache_is_exact(url, 2, log)
        control, model = SglangControl(url), untied_model(1)
        assert control.info().processes == 2
        rows = [tuple(prompt) for prompt in random_prompts(3, seed=9)]
        control.pause("retract")
        transport = BroadcastTransport(Sync(timeout_s=HTTP_SECONDS), "gloo")
        transport.open([control], {url: control.info()}, version=7)
        transport.send(Bucket(list(model.state_dict().items()), last=True))
        assert not transport.close().lost
        control.continue_generation()
        transport.end()
        assert control.info().version == 7
        for row, scores in zip(rows, control.score(rows), strict=True):
            with torch.no_grad():
                logprobs_LV = model(torch.tensor([row])).logits[0].log_softmax(-1)
            expected = [float(logprobs_LV[place, token]) for place, token in enumerate(row[1:])]
            assert scores == pytest.approx(expected, abs=TOLERANCE)


def test_what_it_cannot_serve_is_refused_at_start(folder: Path) -> None:
    options = ("--page-size", "16", "--disable-radix-cache")
    with started(LaunchSettings(folder, options=options), {}) as child:
        while child.status is None and not child.healthy():
            assert child.age < START_SECONDS
            time.sleep(0.5)
        log = "\n".join(child.last_lines(400))
        assert child.status is not None
    assert "parallel_r1: this server cannot serve isolated paths exactly: leave the radix cache on" in log
    assert "set --attention-backend triton); set --page-size 1" in log


def test_an_unknown_release_of_sglang_loads_no_plugin() -> None:
    """By SGLang's own loader, which goes on after an exception of a plugin."""
    loads = (
        "from megatron_parallel_r1.rollout import sglang_plugin; sglang_plugin.TESTED = ('0.4.0',); "
        "from sglang.srt.plugins import load_plugins; load_plugins(); print('loaded')"
    )
    for allowed in ("", "1"):
        done = subprocess.run(
            [str(python_of("sglang")), "-c", loads],
            env={
                **os.environ,
                "SGLANG_PLUGINS": "parallel_r1",
                "SGLANG_USE_CPU_ENGINE": "0",
                "PARALLEL_R1_ANY_SGLANG": allowed,
            },
            capture_output=True,
            text=True,
            timeout=HTTP_SECONDS,
        )
        if allowed:
            assert done.returncode == 0 and done.stdout == "loaded\n", done.stderr
        else:
            assert done.returncode == 1 and not done.stdout
            assert "parallel_r1: tested with SGLang 0.4.0, this is 0.5.23: " in done.stderr


def test_what_a_release_of_sglang_lacks_is_told_as_missing() -> None:
    """In the place of another release: hooks with targets that this one does not have."""
    targets = ("sglang.srt.managers.scheduler.Scheduler.of_old", "sglang.srt.of_old.Cache.lock")
    asks = (
        "from dataclasses import replace; from megatron_parallel_r1.rollout.sglang_plugin import hooks; "
        f"hooks.HOOKS += tuple(replace(hooks.HOOKS[0], target=target) for target in {targets}); "
        "from sglang.srt.plugins import load_plugins; load_plugins(); print(*hooks.missing_hooks())"
    )
    done = subprocess.run(
        [str(python_of("sglang")), "-c", asks],
        env={**os.environ, "SGLANG_PLUGINS": "parallel_r1", "SGLANG_USE_CPU_ENGINE": "0"},
        capture_output=True,
        text=True,
        timeout=HTTP_SECONDS,
    )
    assert done.returncode == 0 and done.stdout.split() == list(targets), done.stderr
