"""SGLang servers with the plugin that joins isolated paths, and traces rolled out with them."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import httpx

from megatron_parallel_r1.rollout.joined_blocks import FIELD, supports_joined_blocks
from megatron_parallel_r1.rollout.launcher.command import LaunchSettings, ServerCommand, build_command
from megatron_parallel_r1.rollout.launcher.ports import pick_ports
from megatron_parallel_r1.rollout.launcher.run import server_url
from megatron_parallel_r1.rollout.launcher.supervisor import ServerProcess
from megatron_parallel_r1.rollout.servers.client import GenerateRequest, GenerateResult
from megatron_parallel_r1.rollout.servers.engine import ServerContext, ServerEngine
from megatron_parallel_r1.rollout.servers.pool import ServerPool
from megatron_parallel_r1.rollout.servers.sglang import SglangClient
from megatron_parallel_r1.rollout.settings import Thinking
from megatron_parallel_r1.rollout.thinking import Thinker, roll_out
from megatron_parallel_r1.thought.trace import Trace
from tests.engines.servers import CONTEXT_TOKENS, python_of, wait_until_healthy
from tests.reference.traces import TAGS
from tests.unit.rollout.tiny import random_prompts

# SGLang then counts every slot of its cache after each pass, and ends the server if one is lost.
STRICT = {
    "SGLANG_ENABLE_STRICT_MEM_CHECK_DURING_BUSY": "1",
    "SGLANG_ENABLE_STRICT_MEM_CHECK_DURING_IDLE": "1",
}
# It retracts a running request every so many passes.
RETRACTING = {"SGLANG_TEST_RETRACT": "1", "SGLANG_TEST_RETRACT_INTERVAL": "11"}
# On a busy machine; httpx gives up after 5.
HTTP_SECONDS = 300
# Waits until so many joins have been answered.
Reached = Callable[[int], Awaitable[None]]


@contextmanager
def started(serving: LaunchSettings, env: dict[str, str], overlap: bool = False) -> Iterator[ServerProcess]:
    """A server that is being started.

    Args:
        overlap: it schedules a pass while the one before it runs, as on a GPU.
    """
    serving = replace(serving, isolated=True, port=0, context_tokens=CONTEXT_TOKENS)
    (port,) = pick_ports(serving)
    command = build_command(serving, python_of("sglang"), "cpu", port)
    left_out = {"--disable-overlap-schedule"} if overlap else set()
    arguments = tuple(argument for argument in command.arguments if argument not in left_out)
    with TemporaryDirectory() as folder:
        environment = command.environment | STRICT | env
        child = ServerProcess(
            ServerCommand(arguments, environment), server_url(serving.host, port), Path(folder) / "server.log"
        )
        child.start()
        try:
            yield child
        finally:
            child.end()


@contextmanager
def healthy(serving: LaunchSettings, env: dict[str, str], overlap: bool = False) -> Iterator[ServerProcess]:
    """A server with the plugin that answers; arguments as of `started`."""
    with started(serving, env, overlap) as child:
        wait_until_healthy(child)
        yield child


class Recorded(SglangClient):
    """Keeps what was asked with what was answered."""

    def __init__(self, url: str, log: list[tuple[GenerateRequest, GenerateResult]]) -> None:
        super().__init__(url)
        self.log = log

    async def generate(self, request: GenerateRequest) -> GenerateResult:
        answered = await super().generate(request)
        self.log.append((request, answered))
        return answered


class Flat(ServerEngine):
    """Claims to be isolated and asks for the flat text: what the plugin is there for."""

    modes = frozenset({"isolated"})

    def join(self, trunk: ServerContext, paths: Sequence[ServerContext]) -> ServerContext:
        return replace(super().join(trunk, paths), joined=())


@dataclass(frozen=True)
class Rolled:
    traces: list[Trace]
    log: list[tuple[GenerateRequest, GenerateResult]]
    counters: dict[str, int]

    def computed(self) -> list[int]:
        """Of each join's prompt, the tokens that its server did not have in its cache."""
        return [
            len(request.tokens) - answered.cached_tokens for request, answered in self.log if request.joined
        ]


def counters_of(url: str) -> dict[str, int]:
    info = httpx.get(f"{url}/server_info", timeout=HTTP_SECONDS).json()
    assert supports_joined_blocks(info)
    return info["internal_states"][0][FIELD]["counters"]


def rolled_out(
    url: str,
    thinking: Thinking,
    count: int,
    seed: int = 0,
    engine: type[ServerEngine] = ServerEngine,
    meanwhile: Callable[[httpx.AsyncClient, Reached], Awaitable[None]] | None = None,
) -> Rolled:
    """`count` traces at once, of 1..8 paths; `counters` are the server's since the call.

    Args:
        meanwhile: runs beside them, and is told when so many joins have been answered.
    """
    log: list[tuple[GenerateRequest, GenerateResult]] = []
    pool = ServerPool(lambda url: Recorded(url, log), (url,))
    pool.wait_ready()
    log.clear()
    before = counters_of(url)

    async def reached(joins: int) -> None:
        while sum(bool(request.joined) for request, _ in log) < joins:
            await asyncio.sleep(0.01)

    async def main() -> list[Trace]:
        async with httpx.AsyncClient(base_url=url, timeout=HTTP_SECONDS) as client:
            other = asyncio.ensure_future(meanwhile(client, reached)) if meanwhile is not None else None
            thinker = Thinker(engine(pool), TAGS, thinking)
            seeds = range(seed, seed + count)
            paths = [1 + index % 8 for index in range(count)]
            traces = await roll_out(thinker, random_prompts(count, seed), seeds, paths=paths)
            if other is not None:
                await asyncio.wait_for(other, HTTP_SECONDS)
            return traces

    traces = asyncio.run(main())
    after = counters_of(url)
    return Rolled(traces, log, {name: after[name] - before[name] for name in after})


def ask(url: str, body: dict[str, Any]) -> httpx.Response:
    return httpx.post(f"{url}/generate", json=body, timeout=HTTP_SECONDS)
