"""`parallel-r1 serve` under load, beside vLLM and SGLang that serve the same model.

    python -m benchmarks.serve_load [--clients 1 8 32 128] [--requests 64] [--tokens 64] [--without vllm]
    python -m benchmarks.serve_load --endurance 10000

The model is the demo's, with random weights, in float32, on a CPU; ours decodes in mode `sequential`, for
the others know no paths. Each client streams text completions one after another, `--requests` in all, and at
least two a client. Of an engine that `make engines` has not built, the table has no rows.

With `--endurance N`, eight clients send N short requests to ours, and break off every tenth after its first
chunk. It prints the server's resident memory after the first tenth and at the end, and fails if a request
hangs or if `/health` then says that anything is left.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from statistics import median
from typing import Any

import aiohttp
import psutil

from benchmarks.embedded_work import EmbeddedWork
from benchmarks.page import Table
from megatron_parallel_r1.checkpoint_formats.hf_folder import save_hf_folder
from megatron_parallel_r1.data.prompts import CHAT_TEMPLATE
from megatron_parallel_r1.rollout.launcher.command import EngineName, LaunchSettings
from megatron_parallel_r1.rollout.launcher.run import build_servers
from megatron_parallel_r1.rollout.settings import Thinking

ROOT = Path(__file__).resolve().parents[1]
ENGINES: tuple[EngineName, ...] = ("vllm", "sglang")
CONTEXT_TOKENS = 1024
START_SECONDS = 600
BREAKS_OFF = 10
HANGS_SECONDS = 120


@dataclass(frozen=True, slots=True)
class Streamed:
    """One request: seconds to its first text and to its end, and tokens that were drawn."""

    first_s: float
    seconds: float
    tokens: int


def write_model(folder: Path, work: EmbeddedWork) -> None:
    work.tokenizer.chat_template = CHAT_TEMPLATE
    thinking = Thinking(mode="sequential", max_response_tokens=CONTEXT_TOKENS // 2)
    settings = thinking.model_dump() | {"prompt": "plain", "prompt_template": "{problem}"}
    files = {"thinking.json": json.dumps(settings)}
    save_hf_folder(folder, work.shape, work.tensors.items(), work.tokenizer, files)


@contextmanager
def ours(folder: Path, running: int | None = None) -> Iterator[tuple[str, psutil.Process]]:
    """Address and process of our server."""
    command = [sys.executable, "-W", "ignore", "-m", "megatron_parallel_r1.cli", "serve", "--port", "0"]
    command += ["--checkpoint", str(folder), "--device", "cpu"]
    command += ["--running", str(running)] if running else []
    environment = os.environ | {"OMP_NUM_THREADS": "1", "TOKENIZERS_PARALLELISM": "false"}
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True, env=environment) as server:
        try:
            assert server.stdout is not None
            yield server.stdout.readline().split()[-1], psutil.Process(server.pid)
        finally:
            server.terminate()


@contextmanager
def theirs(engine: EngineName, folder: Path) -> Iterator[tuple[str, psutil.Process]]:
    """The same of a server of an engine, with one thread as ours has."""
    settings = LaunchSettings(
        folder, engine=engine, port=0, device="cpu", context_tokens=CONTEXT_TOKENS, log_dir=folder / "logs"
    )
    (server,) = build_servers(settings)
    server.start()
    try:
        while not server.healthy():
            if server.status is not None or server.age > START_SECONDS:
                raise RuntimeError("\n".join([f"{engine} does not start:", *server.last_lines(20)]))
            time.sleep(0.5)
        yield server.url, psutil.Process(server.pid)
    finally:
        server.end()


async def stream(http: aiohttp.ClientSession, body: dict[str, Any], break_off: bool = False) -> Streamed:
    began, first, tokens = time.perf_counter(), 0.0, 0
    options = {"stream": True, "stream_options": {"include_usage": True}}
    async with http.post("/v1/completions", json=body | options) as response:
        response.raise_for_status()
        async for line in response.content:
            if not line.startswith(b"data: {"):
                continue
            chunk = json.loads(line[len("data: ") :])
            if "error" in chunk:
                raise RuntimeError(chunk["error"]["message"])
            if not first and any(choice["text"] for choice in chunk["choices"]):
                first = time.perf_counter() - began
            if break_off:
                break
            tokens = (chunk.get("usage") or {}).get("completion_tokens", tokens)
    return Streamed(first, time.perf_counter() - began, tokens)


async def load(
    url: str, model: str, prompts: Sequence[list[int]], clients: int, tokens: int
) -> list[Streamed]:
    """Sends one request for each prompt, `clients` at a time."""
    waiting = iter(enumerate(prompts))

    async def client(http: aiohttp.ClientSession) -> list[Streamed]:
        return [
            await stream(http, {"model": model, "prompt": prompt, "max_tokens": tokens, "seed": number})
            for number, prompt in waiting
        ]

    async with session(url) as http:
        return [
            done for each in await asyncio.gather(*(client(http) for _ in range(clients))) for done in each
        ]


def session(url: str) -> aiohttp.ClientSession:
    timeout = aiohttp.ClientTimeout(total=HANGS_SECONDS)
    return aiohttp.ClientSession(url, timeout=timeout, connector=aiohttp.TCPConnector(limit=0))


async def served_name(url: str) -> str:
    async with session(url) as http, http.get("/v1/models") as response:
        return str((await response.json())["data"][0]["id"])


def measure(url: str, work: EmbeddedWork, clients: int, requests: int, tokens: int) -> list[str]:
    """A row's figures: requests/s, time to first token, tokens/s."""
    model = asyncio.run(served_name(url))
    asyncio.run(load(url, model, work.prompts(clients), clients, 4))
    prompts = work.prompts(max(requests, 2 * clients))
    began = time.perf_counter()
    done = asyncio.run(load(url, model, prompts, clients, tokens))
    seconds = time.perf_counter() - began
    firsts = sorted(request.first_s for request in done)
    return [
        f"{len(done) / seconds:.1f}",
        f"{1000 * median(firsts):.0f}",
        f"{1000 * firsts[int(0.95 * (len(firsts) - 1))]:.0f}",
        f"{sum(request.tokens for request in done) / seconds:.0f}",
    ]


async def endure(
    url: str, server: psutil.Process, prompts: Sequence[list[int]], clients: int = 8
) -> list[int]:
    """Resident bytes after a tenth of the requests, and at the end.

    Raises:
        RuntimeError: a request failed or hung, or the server is not idle afterwards.
    """
    waiting, resident = iter(enumerate(prompts)), []

    async def client(http: aiohttp.ClientSession) -> None:
        for number, prompt in waiting:
            body = {"prompt": prompt, "max_tokens": 4, "seed": number}
            await stream(http, body, break_off=number % BREAKS_OFF == 0)
            if number == len(prompts) // 10:
                resident.append(server.memory_info().rss)

    async with session(url) as http:
        await asyncio.gather(*(client(http) for _ in range(clients)))
        resident.append(server.memory_info().rss)
        end = time.monotonic() + HANGS_SECONDS
        while True:
            async with http.get("/health") as response:
                health = await response.json()
            if not (health["running"] or health["waiting"] or health["cache_tokens"]):
                return resident
            if time.monotonic() > end:
                raise RuntimeError(f"left behind: {health}")
            await asyncio.sleep(0.05)


def main(words: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--clients", type=int, nargs="+", default=[1, 8, 32, 128])
    parser.add_argument("--requests", type=int, default=64)
    parser.add_argument("--tokens", type=int, default=64)
    parser.add_argument("--without", nargs="*", choices=ENGINES, default=[])
    parser.add_argument("--running", type=int, help="as of `parallel-r1 serve`")
    parser.add_argument("--endurance", type=int, metavar="N")
    args = parser.parse_args(words)
    work = EmbeddedWork()
    with tempfile.TemporaryDirectory() as parent:
        folder = Path(parent) / "model"
        write_model(folder, work)
        if args.endurance:
            with ours(folder) as (url, server):
                began = time.perf_counter()
                early, late = asyncio.run(endure(url, server, work.prompts(args.endurance)))
            seconds = time.perf_counter() - began
            print(f"{args.endurance} requests in {seconds:.0f} s, every {BREAKS_OFF}th broken off")
            print(
                f"resident: {early / 2**20:.1f} MiB after a tenth of them, {late / 2**20:.1f} MiB at the end"
            )
            return
        rows = []
        for engine in (None, *ENGINES):
            if engine is not None:
                built = (ROOT / f".venv-{engine}" / "ready").exists()
                if engine in args.without or not built:
                    print(f"skipping {engine}" + ("" if built else ": `make engines` builds it"), flush=True)
                    continue
            with ours(folder, args.running) if engine is None else theirs(engine, folder) as (url, _):
                for clients in args.clients:
                    figures = measure(url, work, clients, args.requests, args.tokens)
                    rows.append([engine or "this project", str(clients), *figures])
                    print(" | ".join(rows[-1]), flush=True)
    columns = ("server", "clients", "requests/s", "first token ms, median", "95 %", "tokens/s")
    print(Table("Serving one model on a CPU", columns, rows).markdown())


if __name__ == "__main__":
    main()
