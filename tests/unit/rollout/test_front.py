"""A pool behind a router: requests go there, checks to the servers, and what it drops is noticed."""

from __future__ import annotations

import asyncio
from collections.abc import Collection, Sequence
from dataclasses import replace

import pytest

from megatron_parallel_r1.config.rollout import Rollout
from megatron_parallel_r1.errors import ServersLost, UserError
from megatron_parallel_r1.rollout.engine import Completion
from megatron_parallel_r1.rollout.servers.client import (
    STOCK_MODES,
    GenerateRequest,
    GenerateResult,
    ServerInfo,
    Unreachable,
)
from megatron_parallel_r1.rollout.servers.pool import PoolSettings, ServerPool
from tests.unit.rollout.fake_servers import FakeServer, drawn
from tests.unit.rollout.test_pool import QUICK, request

ROUTER = "http://router:1"


class Behind(FakeServer):
    """Refuses impossible blocks, and its log-probs are of the temperature that the handshake asks for."""

    async def score(self, tokens: tuple[int, ...]) -> tuple[float, ...]:
        return tuple(-2.0 * token for token in tokens[1:])

    async def generate(self, request: GenerateRequest) -> GenerateResult:
        if any(block.fork >= block.stop for block in request.joined):
            raise UserError("blocks that no text can have")
        result = await super().generate(request)
        logprobs = tuple(-float(token) for token in result.completion.tokens)
        return replace(result, completion=replace(result.completion, logprobs=logprobs))


class FakeRouter:
    """Stands in for a site's router: takes turns among servers, whatever they hold.

    Attributes:
        drops: fields of requests that it does not know.
        alive: somebody listens there.
        seen: requests so far.
    """

    def __init__(self, servers: Sequence[FakeServer], drops: Collection[str] = ()) -> None:
        self.url = ROUTER
        self.servers, self.drops, self.alive, self.seen = servers, drops, True, 0

    async def generate(self, request: GenerateRequest) -> GenerateResult:
        if not self.alive:
            raise Unreachable(f"{ROUTER}: connection refused")
        if "sampling_seed" in self.drops:
            request = replace(request, sampling=replace(request.sampling, seed=self.seen))
        if "logit_bias" in self.drops:
            request = replace(request, suppress=frozenset())
        if "stop_token_ids" in self.drops:
            request = replace(request, stop=frozenset())
        if "custom_params" in self.drops:
            request = replace(request, joined=())
        self.seen += 1
        return await self.servers[self.seen % len(self.servers)].generate(request)

    async def score(self, tokens: tuple[int, ...]) -> tuple[float, ...]:
        return await self.servers[0].score(tokens)

    async def info(self) -> ServerInfo:
        raise AssertionError("only servers are asked")

    async def healthy(self) -> bool:
        raise AssertionError("only servers are asked")

    async def abort_all(self) -> None: ...

    async def close(self) -> None: ...


def two() -> list[FakeServer]:
    info = ServerInfo("model", STOCK_MODES | {"isolated"}, 0, 10_000, None)
    return [Behind(f"http://n{index}:1", info) for index in (1, 2)]


def behind(router: FakeRouter, settings: PoolSettings = QUICK) -> ServerPool:
    known = {server.url: server for server in [*router.servers, router]}
    pool = ServerPool(known.__getitem__, list(known)[:-1], settings, router=ROUTER)
    pool.wait_ready()
    return pool


def answers(pool: ServerPool, seeds: Sequence[int]) -> list[Completion]:
    async def together() -> list[GenerateResult]:
        return list(await asyncio.gather(*(pool.generate(request(seed=seed, limit=9)) for seed in seeds)))

    return [result.completion for result in asyncio.run(together())]


def test_requests_go_through_the_router_and_checks_do_not() -> None:
    router = FakeRouter(two())
    pool = behind(router, replace(QUICK, concurrent=5))
    assert pool.modes == STOCK_MODES | {"isolated"}
    pool.share(0, 2)
    router.seen = 0
    for server in router.servers:
        server.most, server.holds_s = 0, 0.01
    found = answers(pool, range(20))
    assert router.seen == 20 and pool.gauges()["servers_up"] == 2
    expected = [drawn(request(seed=seed, limit=9)).tokens for seed in range(20)]
    assert [completion.tokens for completion in found] == expected
    # Of the ten places at both servers, half are this process's.
    assert [server.most for server in router.servers] == [3, 3] or max(s.most for s in router.servers) <= 5


def test_draws_of_a_server_that_is_out_of_date_are_repeated() -> None:
    """The router does not know versions."""
    router = FakeRouter(two())
    pool = behind(router)
    first, second = router.servers
    first.info_sent = replace(first.info_sent, version=1)
    pool.set_version(1, [first.url])
    assert all(set(completion.versions) == {1} for completion in answers(pool, range(6)))
    assert pool.metrics()["server_retries"] > 0
    assert pool._destinations() == (ROUTER,)
    pool.remove(first.url)
    # Without a usable server, requests wait here.
    assert pool._destinations() == () and pool.infos[second.url].version == 0


@pytest.mark.parametrize("field", ["sampling_seed", "logit_bias", "stop_token_ids"])
def test_a_router_that_drops_a_field_is_refused(field: str) -> None:
    with pytest.raises(UserError, match=f"{ROUTER} drops .*{field}.* from requests; update that router"):
        behind(FakeRouter(two(), {field}))


def test_a_router_that_drops_joined_blocks_has_no_mode_isolated(caplog: pytest.LogCaptureFixture) -> None:
    assert behind(FakeRouter(two(), {"custom_params"})).modes == STOCK_MODES
    assert f"{ROUTER} drops custom_params: no mode isolated through it" in caplog.text


def test_a_router_that_is_not_there_is_one_line() -> None:
    router = FakeRouter(two())
    router.alive = False
    with pytest.raises(ServersLost, match=r"rollout\.router: http://router:1: connection refused; start it"):
        behind(router)
    router.alive = True
    pool = behind(router, replace(QUICK, attempts=2))
    router.alive = False
    with pytest.raises(ServersLost, match=r"2 failures by way of rollout\.router: .*refused"):
        answers(pool, [1])


def test_it_is_only_before_running_sglang_servers() -> None:
    for wrong in ({"engine": "sglang", "servers": 1}, {"engine": "native"}):
        with pytest.raises(ValueError, match="router: "):
            Rollout(router=ROUTER, **wrong)
    assert Rollout(engine="sglang", urls_file="urls", router=ROUTER).router == ROUTER
