"""The pool against servers that die, hang, fall behind, join and leave."""

from __future__ import annotations

import asyncio
import threading
import time
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import pytest

from megatron_parallel_r1.errors import UserError
from megatron_parallel_r1.rollout.engine import Interrupted, Sampling
from megatron_parallel_r1.rollout.servers import engine, registry
from megatron_parallel_r1.rollout.servers.client import (
    INITIAL_VERSION,
    STOCK_MODES,
    GenerateRequest,
    GenerateResult,
    ServerInfo,
    Timeouts,
)
from megatron_parallel_r1.rollout.servers.engine import ServerEngine
from megatron_parallel_r1.rollout.servers.pool import PoolSettings, ServerPool
from megatron_parallel_r1.rollout.settings import Thinking
from megatron_parallel_r1.rollout.thinking import Thinker, roll_out
from megatron_parallel_r1.thought.trace import Trace
from tests.reference.traces import TAGS
from tests.unit.rollout.fake_servers import FakeServer, drawn
from tests.unit.rollout.tiny import random_prompts

# Checks follow one another at once and retries do not wait, so that tests are quick.
QUICK = PoolSettings(check_s=0.02, patience_s=30.0, backoff_s=0.001)
THINKING = Thinking(
    mode="replay", paths=3, max_blocks=3, max_depth=2, max_path_tokens=12, max_response_tokens=90
)
PROMPTS = random_prompts(24)


def pool_of(
    servers: Sequence[FakeServer], settings: PoolSettings = QUICK, version: int | None = None
) -> ServerPool:
    return shared_pool(servers, 0, 1, settings, version)


def shared_pool(
    servers: Sequence[FakeServer],
    rank: int,
    size: int,
    settings: PoolSettings = QUICK,
    version: int | None = None,
) -> ServerPool:
    known = {server.url: server for server in servers}
    pool = ServerPool(known.__getitem__, list(known), settings, version=version)
    pool.share(rank, size)
    pool.wait_ready()
    return pool


def two() -> tuple[FakeServer, FakeServer]:
    return FakeServer("http://a"), FakeServer("http://b")


def request(trace: str = "t", seed: int = 1, limit: int = 3) -> GenerateRequest:
    return GenerateRequest((7, 8), Sampling(seed=seed), limit, frozenset(), frozenset(), trace)


async def rolled(pool: ServerPool) -> list[Trace]:
    thinker = Thinker(ServerEngine(pool), TAGS, THINKING)
    return await roll_out(thinker, PROMPTS, list(range(len(PROMPTS))))


def test_a_server_killed_under_a_batch_costs_no_trace_and_changes_none() -> None:
    async def killing() -> list[Trace]:
        async def kill() -> None:
            while len(b.seen) < 20 or not b.under_way:
                await asyncio.sleep(0)
            b.die()

        killed = asyncio.ensure_future(kill())
        traces = await rolled(pool)
        await killed
        return traces

    quiet = asyncio.run(rolled(pool_of(two())))
    a, b = two()
    a.holds_s = b.holds_s = 0.001
    pool = pool_of([a, b])
    assert asyncio.run(killing()) == quiet
    assert sum(len(trace.tree.blocks) for trace in quiet) > 10
    metrics = pool.metrics()
    assert metrics["server_retries"] >= 1 and metrics["servers_lost"] == 1 and metrics["servers_up"] == 1
    # Each continuation counts once, whoever gave it in the end.
    assert metrics["server_tokens"] == sum(trace.sampled_count for trace in quiet)


def test_servers_that_ignore_seeds_are_told_and_counted(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    a, b = two()
    known = {a.url: a, b.url: b}
    monkeypatch.setattr(engine, "CLIENTS", {"sglang": lambda url, timeouts, key: known[url]})

    def met() -> ServerPool:
        return engine.connect_pool("sglang", list(known), Timeouts(), QUICK)

    assert met().metrics()["servers_unseeded"] == 0 and not caplog.messages
    b.info_sent = replace(b.info_sent, seeded=False)
    assert met().metrics()["servers_unseeded"] == 1
    (line,) = caplog.messages
    assert b.url in line and a.url not in line and "without --no-deterministic" in line and "\n" not in line
    monkeypatch.setenv("RANK", "1")
    monkeypatch.setenv("WORLD_SIZE", "2")
    met()
    assert len(caplog.messages) == 1, "the first process tells it for all"


def test_several_continuations_of_one_text() -> None:
    a, b = two()
    pool = pool_of([a, b])
    seeds = [2**63 - 2, 2**63 - 1, 0, 1]

    async def together() -> list[GenerateResult]:
        return list(await asyncio.gather(*(pool.generate(request(seed=seed, limit=9)) for seed in seeds)))

    answers = asyncio.run(together())
    assert [answer.completion for answer in answers] == [drawn(request(seed=seed, limit=9)) for seed in seeds]
    assert len({answer.completion.tokens for answer in answers}) == 4
    assert sorted([len(a.seen), len(b.seen)]) == [0, 4], "one trace, one server"


def test_a_batch_in_each_of_two_event_loops() -> None:
    pool = pool_of(two())
    assert asyncio.run(rolled(pool)) == asyncio.run(rolled(pool))


def test_a_server_that_hangs_is_given_up() -> None:
    async def ask() -> None:
        answers = [asyncio.ensure_future(pool.generate(request(str(i)))) for i in range(6)]
        while not a.under_way:
            await asyncio.sleep(0)
        assert [(await answer).completion for answer in answers] == [drawn(request())] * 6

    a, b = two()
    pool = pool_of([a, b])
    a.hangs = True
    asyncio.run(ask())
    metrics = pool.metrics()
    assert metrics["server_retries"] == len(a.seen) and metrics["servers_lost"] == 1


def test_a_loss_counts_while_another_check_is_under_way() -> None:
    class FakeSlowlyChecked(FakeServer):
        async def healthy(self) -> bool:
            await asyncio.sleep(0.05)
            return True

    async def ask() -> None:
        a.die()
        for number in range(20):
            await pool.generate(request(str(number)))
            await asyncio.sleep(0.01)

    a, b = FakeServer("http://a"), FakeSlowlyChecked("http://b")
    pool = pool_of([a, b])
    asyncio.run(ask())
    assert pool.metrics()["servers_lost"] == 1


def test_single_failures_are_retried_and_lose_no_server() -> None:
    (a,) = [FakeServer("http://a")]
    pool = pool_of([a])
    a.failures = 3
    assert asyncio.run(pool.generate(request())).completion == drawn(request())
    metrics = pool.metrics()
    assert (metrics["server_retries"], metrics["servers_lost"], metrics["server_requests"]) == (3, 0, 1)
    assert pool.metrics()["server_requests"] == 0, "counts are since the last call"


def test_a_continuation_that_fails_everywhere_ends_the_run() -> None:
    a, b = two()
    for server in (a, b):
        server.fails_on = lambda request: request.sampling.seed == 5
    pool = pool_of([a, b], replace(QUICK, attempts=4))

    async def ask() -> None:
        good = asyncio.ensure_future(pool.generate(request("good")))
        with pytest.raises(UserError, match=r"2 tokens failed 4 times, .*: .*answered 500: no luck"):
            await pool.generate(request("bad", seed=5))
        await good

    asyncio.run(ask())


def test_all_gone_is_an_error_after_the_patience_and_not_before() -> None:
    async def ask() -> None:
        await pool.generate(request())
        for server in (a, b):
            server.die()
        loop = asyncio.get_running_loop()
        began = loop.time()
        gone = r"http://a \(do.*refused\); http://b \(do.*refused\).*checkpoint"
        with pytest.raises(UserError, match=gone):
            await asyncio.gather(*(pool.generate(request(str(i))) for i in range(4)))
        assert loop.time() - began >= 0.3

    a, b = two()
    pool = pool_of([a, b], replace(QUICK, patience_s=0.3))
    asyncio.run(ask())


def test_a_pause_between_batches_is_no_time_without_servers(monkeypatch: pytest.MonkeyPatch) -> None:
    """The patience begins when somebody waits, not when an earlier batch was without a server."""

    async def given_up() -> None:
        waiting = asyncio.ensure_future(pool.generate(request()))
        while pool._registry._unusable_since is None:
            await asyncio.sleep(0)
        waiting.cancel()
        await asyncio.wait({waiting})

    a, _ = two()
    pool = pool_of([a])
    a.die()
    asyncio.run(given_up())
    later = SimpleNamespace(monotonic=lambda: time.monotonic() + 2 * QUICK.patience_s)
    monkeypatch.setattr(registry, "time", later)
    threading.Timer(0.1, setattr, (a, "alive", True)).start()
    assert asyncio.run(pool.generate(request())).completion == drawn(request())


def test_servers_that_cannot_serve_what_is_promised_end_the_run_at_once() -> None:
    a, b = two()
    a.refuses = b.refuses = "leaves the temperature out"
    with pytest.raises(UserError, match=r"http://b \(refused: leaves the temperature out\)"):
        pool_of([a, b])


def test_one_that_refuses_is_left_out() -> None:
    a, b = two()
    a.refuses = "leaves the temperature out"
    pool = pool_of([a, b])
    asyncio.run(rolled(pool))
    assert not a.seen and b.seen and set(pool.infos) == {"http://b"}


def test_weights_that_differ_keep_a_server_out() -> None:
    a, b = two()
    pool = pool_of([a, b])
    a.info_sent = replace(a.info_sent, version=3)
    pool.set_version(3, ["http://a/"])
    traces = asyncio.run(rolled(pool))
    assert not b.seen and pool.version == 3
    assert {version for trace in traces for version in trace.versions} == {3}
    b.info_sent = replace(b.info_sent, version=3)

    async def again() -> None:
        while not b.seen:
            await rolled(pool)

    # A later check sees that it holds them now.
    asyncio.run(asyncio.wait_for(again(), 60))


def test_a_server_started_anew_with_old_weights_is_noticed_by_its_tokens() -> None:
    a, b = (
        FakeServer(url, ServerInfo("model", STOCK_MODES, 4, 10_000, None)) for url in ("http://a", "http://b")
    )
    pool = pool_of([a, b])
    assert pool.version == 4
    a.info_sent = replace(a.info_sent, version=0)
    answers = [asyncio.run(pool.generate(request(str(i)))) for i in range(4)]
    assert {version for answer in answers for version in answer.completion.versions} == {4}
    assert pool.metrics()["server_retries"] >= 1


def test_one_that_comes_back_as_it_was_started_is_not_taken_for_the_first_version() -> None:
    a, b = two()
    pool = pool_of([a, b])
    pool.set_version(0, ["http://a", "http://b"])
    a.info_sent = replace(a.info_sent, version=INITIAL_VERSION)
    answers = [asyncio.run(pool.generate(request(str(i)))) for i in range(4)]
    assert {version for answer in answers for version in answer.completion.versions} == {0}
    assert pool.metrics()["server_retries"] >= 1
    with pytest.raises(UserError, match=r"http://a \(it holds weights as started, not 0\)"):
        pool_of([a], replace(QUICK, patience_s=1.0), version=0)


def test_no_server_holds_the_weights() -> None:
    with pytest.raises(UserError, match=r"http://a \(it holds weights 0, not 2\)"):
        pool_of(two(), replace(QUICK, patience_s=1.0), version=2)


def test_requests_at_one_server_are_bounded() -> None:
    a, b = two()
    a.holds_s = b.holds_s = 0.002
    pool = pool_of([a, b], replace(QUICK, concurrent=3))
    asyncio.run(rolled(pool))
    assert (a.most, b.most) == (3, 3)


def test_a_trace_stays_with_one_server() -> None:
    a, b = two()
    asyncio.run(rolled(pool_of([a, b])))
    traces = [{request.trace for request in server.seen} for server in (a, b)]
    assert not traces[0] & traces[1] and min(map(len, traces)) >= 3


def test_servers_join_and_leave_by_the_file_of_addresses(tmp_path: Path) -> None:
    a, b = two()
    known = {server.url: server for server in (a, b)}
    file = tmp_path / "urls"
    file.write_text("# two nodes\nhttp://a\n\n")
    pool = ServerPool(known.__getitem__, (), QUICK, urls_file=file)
    pool.wait_ready()

    async def work() -> None:
        await rolled(pool)
        assert a.seen and not b.seen
        file.write_text("http://b/\n")
        while set(pool.infos) != {"http://b"}:
            await pool.generate(request())
        before = len(a.seen)
        await rolled(pool)
        assert len(a.seen) == before and b.seen
        file.unlink()
        await rolled(pool)

    asyncio.run(work())


def test_add_and_remove_from_another_thread() -> None:
    a, b = two()
    known = {server.url: server for server in (a, b)}
    pool = ServerPool(known.__getitem__, ["http://a"], QUICK)
    pool.wait_ready()
    a.holds_s = b.holds_s = 0.001

    def change() -> None:
        pool.add("http://b")
        pool.remove("http://a")

    async def work() -> None:
        other = threading.Thread(target=change)
        while not b.seen:
            if len(a.seen) == 30 and not other.ident:
                other.start()
            await pool.generate(request(str(len(a.seen))))
        other.join()

    asyncio.run(work())


def test_a_later_server_must_be_exact_in_the_modes_of_the_first() -> None:
    modes = STOCK_MODES | {"isolated"}
    a, b = FakeServer("http://a", ServerInfo("model", modes, 0, 10_000, None)), FakeServer("http://b")
    known = {server.url: server for server in (a, b)}
    pool = ServerPool(known.__getitem__, ["http://a"], QUICK)
    pool.wait_ready()
    assert pool.modes == modes
    pool.add("http://b")
    asyncio.run(rolled(pool))
    assert a.seen and not b.seen
    assert pool_of([a, b]).modes == STOCK_MODES


def test_processes_have_servers_of_their_own_and_use_others_in_need() -> None:
    servers = [FakeServer(f"http://{name}") for name in "abcd"]
    pool = shared_pool(servers, 1, 2)
    assert {*pool.infos} == {"http://b", "http://d"}  # nothing is asked of the others
    asyncio.run(rolled(pool))
    assert [bool(server.seen) for server in servers] == [False, True, False, True]
    for server in (servers[1], servers[3]):
        server.die()
    asyncio.run(rolled(pool))
    assert servers[0].seen and servers[2].seen


def test_processes_share_a_server_and_its_bound() -> None:
    a, b = two()
    pool = shared_pool([a, b], 3, 4, replace(QUICK, concurrent=8))
    a.holds_s = b.holds_s = 0.002
    asyncio.run(rolled(pool))
    assert not a.seen and b.most == 4


def test_too_long_a_prompt_is_told_before_it_is_sent() -> None:
    a, _ = two()
    a.info_sent = replace(a.info_sent, max_tokens=4)
    pool = pool_of([a])
    with pytest.raises(UserError, match=r"http://a takes 4 tokens.*2 and up to 3 do not fit.*longer context"):
        asyncio.run(pool.generate(request()))
    assert not a.seen


def test_an_interrupt_from_another_thread_ends_what_runs_and_what_waits() -> None:
    a, _ = two()
    pool = pool_of([a], replace(QUICK, concurrent=2))
    a.holds_s = 1e9

    def interrupt() -> None:
        while a.under_way < 2:
            pause.wait(0.001)
        pool.interrupt()

    async def work() -> list[object]:
        asking = (pool.generate(request(str(i))) for i in range(5))
        return await asyncio.gather(*asking, return_exceptions=True)

    pause = threading.Event()
    other = threading.Thread(target=interrupt)
    other.start()
    assert [type(error) for error in asyncio.run(work())] == [Interrupted] * 5
    other.join()
    with pytest.raises(Interrupted):
        asyncio.run(pool.generate(request()))


def test_a_caller_that_gives_up_leaves_its_place() -> None:
    async def work() -> None:
        first = asyncio.ensure_future(pool.generate(request("x")))
        second = asyncio.ensure_future(pool.generate(request("x")))
        while not a.under_way:
            await asyncio.sleep(0)
        for task in (second, first):
            task.cancel()
        await asyncio.wait({first, second})
        a.holds_s = 0.0
        await pool.generate(request("x"))

    a, _ = two()
    pool = pool_of([a], replace(QUICK, concurrent=1))
    a.holds_s = 1e9
    asyncio.run(work())
