"""What a request to a rollout server costs the client, as more of them are in flight.

    python -m benchmarks.client [--in-flight 14 56 224 512 1024 4096] [--tokens 200]

A server in another process answers every continuation after a pause, so that as many requests as stated are
in flight all the time. Beside the client that rollouts use, the same client over httpx's `AsyncClient`, whose
connection pool looks at all its connections at every event. CPU milliseconds a request are of this process
alone, JSON and checks included; the rate is that of drawn tokens which they allow one process.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import math
import multiprocessing
import resource
import time
from collections.abc import Mapping
from multiprocessing.connection import Connection
from typing import Any

import httpx

from megatron_parallel_r1.rollout.engine import Sampling
from megatron_parallel_r1.rollout.servers.client import GenerateRequest
from megatron_parallel_r1.rollout.servers.sglang import SglangClient

PROMPT_TOKENS = 500
PAUSE_S = 0.2
MOST_HTTPX = 1024  # more take it many minutes


class Answering(asyncio.Protocol):
    """Sends `answer` `PAUSE_S` after the end of each request."""

    def __init__(self, answer: bytes) -> None:
        self.answer, self.received = answer, b""

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self.transport: Any = transport

    def data_received(self, data: bytes) -> None:
        self.received += data
        head, end, body = self.received.partition(b"\r\n\r\n")
        if not end:
            return
        length = int(head.lower().split(b"content-length:")[1].split(b"\r\n")[0])
        if len(body) >= length:
            self.received = b""
            asyncio.get_running_loop().call_later(PAUSE_S, self.transport.write, self.answer)


def serve(tokens: int, port: Connection) -> None:
    drawn = [[-0.123456789 * (i % 7 + 1), i, None] for i in range(tokens)]
    meta = {"finish_reason": {"type": "length"}, "cached_tokens": 480, "weight_version": "7"}
    content = json.dumps(
        {"output_ids": [i for _, i, _ in drawn], "meta_info": {**meta, "output_token_logprobs": drawn}}
    )
    head = f"HTTP/1.1 200 OK\r\ncontent-type: application/json\r\ncontent-length: {len(content)}\r\n\r\n"

    async def run() -> None:
        loop = asyncio.get_running_loop()
        server = await loop.create_server(
            lambda: Answering((head + content).encode()), "127.0.0.1", 0, backlog=4096
        )
        port.send(server.sockets[0].getsockname()[1])
        await server.serve_forever()

    asyncio.run(run())


class OverHttpx(SglangClient):
    """The same client with httpx beneath it."""

    async def _checked(
        self, method: str, path: str, body: Mapping[str, Any] | None, timeout_s: float
    ) -> bytes:
        response = await self.httpx.request(method, self.url + path, json=body, timeout=timeout_s)
        response.raise_for_status()
        return response.content

    async def __aenter__(self) -> OverHttpx:
        self.httpx = httpx.AsyncClient(limits=httpx.Limits(max_connections=None), trust_env=False)
        return self

    async def __aexit__(self, *_: object) -> None:
        await self.httpx.aclose()


async def cost_ms(client: SglangClient, in_flight: int, tokens: int) -> float:
    """CPU milliseconds a request, after each connection has been used once."""

    async def work(requests: int) -> None:
        for _ in range(requests):
            await client.generate(request)

    prompt = tuple(range(PROMPT_TOKENS))
    request = GenerateRequest(prompt, Sampling(seed=1), tokens, frozenset({3}), frozenset(), "t")
    await asyncio.gather(*(work(1) for _ in range(in_flight)))
    each = max(2, 1000 // in_flight)
    start = time.process_time()
    await asyncio.gather(*(work(each) for _ in range(in_flight)))
    return 1e3 * (time.process_time() - start) / (each * in_flight)


async def measure(url: str, in_flight: int, tokens: int) -> tuple[float, float]:
    httpx_ms = math.nan
    if in_flight <= MOST_HTTPX:
        async with OverHttpx(url) as other:
            httpx_ms = await cost_ms(other, in_flight, tokens)
    client = SglangClient(url)
    aiohttp_ms = await cost_ms(client, in_flight, tokens)
    await client.close()
    return httpx_ms, aiohttp_ms


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--in-flight", type=int, nargs="+", default=[14, 56, 224, 512, 1024, 4096])
    parser.add_argument("--tokens", type=int, default=200, help="drawn in a request")
    arguments = parser.parse_args()
    _, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))
    port, child = multiprocessing.Pipe()
    server = multiprocessing.get_context("spawn").Process(
        target=serve, args=(arguments.tokens, child), daemon=True
    )
    server.start()
    url = f"http://127.0.0.1:{port.recv()}"
    print(
        "| in flight | httpx, CPU ms a request | aiohttp | ratio | tokens/s of one process |",
        "|---|---|---|---|---|",
        sep="\n",
    )
    for in_flight in arguments.in_flight:
        httpx_ms, aiohttp_ms = asyncio.run(measure(url, in_flight, arguments.tokens))
        rate, ratio = arguments.tokens * 1e3 / aiohttp_ms, httpx_ms / aiohttp_ms
        print(
            f"| {in_flight} | {httpx_ms:.2f} | {aiohttp_ms:.2f} | {ratio:.1f} | {rate:,.0f} |",
            flush=True,
        )
    server.terminate()
    server.join()


if __name__ == "__main__":
    main()
