"""What a cluster's size costs the processes that talk to all of it, simulated on one machine.

    python -m benchmarks.scale [--ranks 64 256 1024] [--servers 32 128 512]

The code measured is the product's; what it talks to is light. CPU seconds are those of one process:
- heartbeats: of the store's host, a second of training. Rank 0's watchdog runs there; another process holds
  the connections of all other ranks and does for each what its watchdog does in a second.
- pool: of a process that connects to all servers (`wait_ready`), and of a round of health checks. The servers
  are one process that answers as SGLang does, without a model.
- controls: of the sender, a client for every server, and a message to every server, as for each bucket of a
  publication.
- addresses: of reading a file of addresses and comparing it with the known ones, as each check round does.
- jobs: of `status` over that number of running jobs with records of 200 steps, without SLURM's own command.
- nodes: of a look at the files by which a job's server nodes say that they are ready (slurm/common.sh).

A column's last row over its first, divided by the sizes' ratio, is 1 where the cost is linear.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import multiprocessing
import os
import resource
import subprocess
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any
from unittest import mock

import torch.distributed as dist

from megatron_parallel_r1.cluster import job_registry
from megatron_parallel_r1.cluster.attempts import SPEC_FILE, JobAttempt, write_attempts
from megatron_parallel_r1.cluster.job_registry import RegisteredJob, job_statuses
from megatron_parallel_r1.distributed.heartbeat import Heartbeat
from megatron_parallel_r1.distributed.watchdog import HEARTBEAT_S, Watchdog
from megatron_parallel_r1.rollout.engine import Sampling
from megatron_parallel_r1.rollout.servers.client import GenerateRequest, Timeouts
from megatron_parallel_r1.rollout.servers.pool import PoolSettings, ServerPool
from megatron_parallel_r1.rollout.servers.registry import ServerRegistry
from megatron_parallel_r1.rollout.servers.sglang import SglangClient
from megatron_parallel_r1.sync.sender import map_servers
from megatron_parallel_r1.sync.sglang import SglangControl

SPAWN = multiprocessing.get_context("spawn")
WATCHED_S = 5.0
LAST_S = 60.0
ROUND_S, ROUNDS = 3.0, 3
Row = dict[str, float]


# Heartbeats.


def connect(port: int) -> dist.Store:
    return dist.PrefixStore("watchdog", dist.TCPStore("127.0.0.1", port, is_master=False))


def beat(port: int, ranks: int, ready: Connection) -> None:
    """Does what the watchdogs of ranks 1 to `ranks` - 1 do, until the store is gone."""
    os.dup2(os.open(os.devnull, os.O_WRONLY), 2)  # torch prints a stack where a connection ends
    with ThreadPoolExecutor(64) as pool:  # for each, torch may ask a slow name server
        stores = list(pool.map(lambda _: connect(port), range(1, ranks)))
    ready.send(len(stores))
    count = 0
    while True:
        count, began = count + 1, time.monotonic()
        for rank, store in enumerate(stores, start=1):
            heartbeat = Heartbeat(count, "stage rl, step 17", "all_reduce (distributed_c10d.py:2810)", "here")
            try:
                store.set(f"heartbeat/{rank}", heartbeat.pack())
                store.multi_get(["verdict", "failure", "heartbeat/0"])
            except dist.DistError:
                return
        time.sleep(max(0.0, HEARTBEAT_S - (time.monotonic() - began)))


def watch(ranks: int, sent: Connection) -> None:
    """Rank 0 with the store, in a process of its own."""
    store = dist.TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
    ready, child = SPAWN.Pipe()
    others = SPAWN.Process(target=beat, args=(store.port, ranks, child), daemon=False)
    others.start()
    ready.recv()
    watchdog = Watchdog(rank=0, world_size=ranks, timeout_s=LAST_S)
    watchdog.start(dist.TCPStore("127.0.0.1", store.port, is_master=False), "the store's host")
    time.sleep(2 * HEARTBEAT_S)
    began, cpu = time.monotonic(), time.process_time()
    time.sleep(WATCHED_S)
    sent.send((time.process_time() - cpu) / (time.monotonic() - began))
    others.terminate()
    others.join()
    sent.close()


def heartbeats(ranks: int) -> Row:
    received, child = SPAWN.Pipe()
    process = SPAWN.Process(target=watch, args=(ranks, child))
    process.start()
    seconds = received.recv()
    process.terminate()  # its watchdog waits for ranks that never say goodbye
    process.join()
    return {"heartbeats, CPU s a second": seconds}


# Servers.


class LightServer(asyncio.Protocol):
    """Answers as an SGLang server does, at once and without a model."""

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self.transport: Any = transport
        self.received = b""

    def data_received(self, data: bytes) -> None:
        self.received += data
        head, end, body = self.received.partition(b"\r\n\r\n")
        if not end:
            return
        _, _, length = head.lower().partition(b"content-length:")
        if len(body) < int(length.split(b"\r\n")[0] or 0):
            return
        self.received = b""
        path = head.split(b" ")[1].decode()
        content = json.dumps(self.answer(path, json.loads(body) if body else {})).encode()
        header = (
            f"HTTP/1.1 200 OK\r\ncontent-type: application/json\r\ncontent-length: {len(content)}\r\n\r\n"
        )
        self.transport.write(header.encode() + content)

    def answer(self, path: str, body: dict[str, Any]) -> Any:
        if path == "/generate":
            limit = body["sampling_params"]["max_new_tokens"]
            if not limit:
                scored = [[-float(token), token, None] for token in body["input_ids"]]
                return {"meta_info": {"input_token_logprobs": scored}}
            seed = body["sampling_params"]["sampling_seed"]
            drawn = [5 + seed % 4] * limit
            logprob = -drawn[0] / body["sampling_params"]["temperature"]
            meta = {"finish_reason": {"type": "length"}, "weight_version": "0"}
            meta["output_token_logprobs"] = [[logprob, token, None] for token in drawn]
            return {"output_ids": drawn, "meta_info": meta}
        limits = {"context_length": 64, "max_req_input_len": 58, "max_total_num_tokens": 900}
        return {"/server_info": {"model_path": "m", **limits}, "/model_info": {"weight_version": "0"}}.get(
            path, {}
        )


def serve(count: int, ports: Connection) -> None:
    raise_file_limit()

    async def run() -> None:
        loop = asyncio.get_running_loop()
        servers = [await loop.create_server(LightServer, "127.0.0.1", 0) for _ in range(count)]
        ports.send([server.sockets[0].getsockname()[1] for server in servers])
        await asyncio.Event().wait()

    asyncio.run(run())


@contextmanager
def light_servers(count: int) -> Iterator[list[str]]:
    ports, child = SPAWN.Pipe()
    process = SPAWN.Process(target=serve, args=(count, child), daemon=True)
    process.start()
    try:
        yield [f"http://127.0.0.1:{port}" for port in ports.recv()]
    finally:
        process.terminate()
        process.join()


def cpu_seconds(work: Callable[[], object]) -> float:
    began = time.process_time()
    work()
    return time.process_time() - began


async def idle(pool: ServerPool) -> None:
    """Sends one request, then lets the pool check its servers."""
    await pool.generate(GenerateRequest((0,), Sampling(), 1, frozenset(), frozenset(), "t"))
    await asyncio.sleep((ROUNDS - 0.5) * ROUND_S)


def servers(count: int) -> Row:
    timeouts = Timeouts(connect_s=60, check_s=60)
    with light_servers(count) as urls:
        settings = PoolSettings(patience_s=120, check_s=ROUND_S)
        pool = ServerPool(lambda url: SglangClient(url, timeouts), urls, settings)
        connected = cpu_seconds(pool.wait_ready)
        checked = cpu_seconds(lambda: asyncio.run(idle(pool))) / ROUNDS
        controls: list[SglangControl] = []
        created = cpu_seconds(lambda: controls.extend(map(SglangControl, urls)))
        bucket = [f"layers.{i}.mlp.weight" for i in range(8)], ["bfloat16"] * 8, [[9728, 2560]] * 8

        def send() -> None:
            _, failed = map_servers(
                controls, lambda control: control.receive_broadcast(*bucket, "group", None)
            )
            assert not failed, failed

        send()
        posted = cpu_seconds(send)
        for control in controls:
            control.close()
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "urls"
        file.write_text("\n".join(urls))
        registry = ServerRegistry(lambda url: SglangClient(url, timeouts), file, None)
        file.write_text("\n".join(urls[1:]))
        read = cpu_seconds(registry.read_urls)
    return {
        "pool connects, CPU s": connected,
        "pool checks, CPU s a round": checked,
        "controls, CPU s of their clients": created,
        "controls, CPU s a message to all": posted,
        "addresses, CPU s": read,
    }


# Files.

STEPS_A_JOB = 200
LOOK = "find . -name 'urls.[0-9]*' -type f | wc -l"  # as start_servers in slurm/common.sh


def files(count: int) -> Row:
    jobs = [RegisteredJob(str(index), "run", "rl recipe.yaml", (), False) for index in range(count)]
    states = {job.id: ("RUNNING", "None") for job in jobs}
    record = {"stage": "rl", "steps": STEPS_A_JOB, "time_rollout_s": 9.0, "sampled_tokens": 400_000}
    lines = "".join(json.dumps(record | {"step": step + 1}) + "\n" for step in range(STEPS_A_JOB))
    with tempfile.TemporaryDirectory() as place:
        logs = Path(place)
        for job in jobs:
            folder, records = logs / f"run-{job.id}", logs / "runs" / job.id
            folder.mkdir()
            records.mkdir(parents=True)
            (records / "metrics.jsonl").write_text(lines)
            (folder / SPEC_FILE).write_text(json.dumps({"folders": [str(records)]}))
            write_attempts(folder, [JobAttempt("running")])
            (logs / f"urls.{job.id}").write_text(f"http://n{job.id}:30000\n")
        with mock.patch.object(job_registry, "slurm_states", lambda ids: states):
            read = cpu_seconds(lambda: job_statuses(logs, jobs))
        before = resource.getrusage(resource.RUSAGE_CHILDREN)
        found = subprocess.run(["bash", "-c", LOOK], cwd=logs, capture_output=True, text=True, check=True)
        after = resource.getrusage(resource.RUSAGE_CHILDREN)
        assert int(found.stdout) == count, found
    looked = after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime
    return {"status of all jobs, CPU s": read, "a look at the nodes' files, CPU s": looked}


# The table.


def raise_file_limit() -> None:
    _, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))


def table(what: str, sizes: Sequence[int], rows: Sequence[Row]) -> str:
    names = list(rows[0])
    lines = [f"| {what} | " + " | ".join(names) + " |", "|---" * (len(names) + 1) + "|"]
    lines += [
        f"| {size} | " + " | ".join(f"{row[name]:.4g}" for name in names) + " |"
        for size, row in zip(sizes, rows, strict=True)
    ]
    if len(sizes) > 1:
        growth = [rows[-1][name] / rows[0][name] / (sizes[-1] / sizes[0]) for name in names]
        lines.append("| growth over linear | " + " | ".join(f"{value:.2f}" for value in growth) + " |")
    return "\n".join(lines) + "\n"


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--ranks", type=int, nargs="*", default=[64, 256, 1024])
    parser.add_argument("--servers", type=int, nargs="*", default=[32, 128, 512])
    parser.add_argument("--files", type=int, nargs="*", default=[32, 128, 512], help="jobs, and nodes")
    arguments = parser.parse_args()
    raise_file_limit()
    if arguments.ranks:
        print(table("ranks", arguments.ranks, [heartbeats(ranks) for ranks in arguments.ranks]), flush=True)
    if arguments.servers:
        print(
            table("servers", arguments.servers, [servers(count) for count in arguments.servers]), flush=True
        )
    if arguments.files:
        print(table("jobs, or nodes", arguments.files, [files(count) for count in arguments.files]))


if __name__ == "__main__":
    main()
