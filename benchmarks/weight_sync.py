"""MB/s of weights published to an SGLang server, beside a plain gloo broadcast of as many bytes, in one run.

    make engines && python -m benchmarks.weight_sync [--megabytes 160] [--repeats 5] [--bucket-mb 64]

A server of a random float32 model of about that size is started on this CPU. Each repeat broadcasts as many
bytes from one process to another (one tensor, both ends this project's torch) and then publishes the model by
each transport: the time is that from the pause of the server to its going on, with the gathering of buckets
and the server's own copy into its parameters, and for `disk` writing, reading back and checking. The first
repeat warms up and does not count. Shown are medians, and the ratio to the broadcast beside it.
"""

from __future__ import annotations

import argparse
import socket
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from multiprocessing.connection import Connection
from pathlib import Path

import torch
import torch.distributed as dist
from torch import multiprocessing

from benchmarks.page import Table, add_write_option, publish
from benchmarks.side_by_side import ratios, spread
from megatron_parallel_r1.architecture.model_config import ModelConfig
from megatron_parallel_r1.checkpoint_formats.hf_folder import save_hf_folder
from megatron_parallel_r1.distributed import process
from megatron_parallel_r1.model.gpt import build_model
from megatron_parallel_r1.model.weights import load_hf_tensors, random_hf_tensors
from megatron_parallel_r1.rollout.launcher.commands import command_of
from megatron_parallel_r1.rollout.launcher.placement import url_of
from megatron_parallel_r1.rollout.launcher.server_process import Child
from megatron_parallel_r1.rollout.launcher.settings import Serving
from megatron_parallel_r1.sync.publisher import Publisher
from megatron_parallel_r1.sync.settings import Kind, Sync
from megatron_parallel_r1.sync.sglang import SglangControl
from megatron_parallel_r1.train.logprob_runner import LogprobRunner
from megatron_parallel_r1.train.probing import causal_logprobs, probe_texts

KINDS: tuple[Kind, ...] = ("distributed", "tensor", "disk")
PYTHON = Path(__file__).resolve().parents[1] / ".venv-sglang" / "bin" / "python"


def shape_of(megabytes: int) -> ModelConfig:
    """About 16 MB a layer, and an embedding of 33 MB."""
    layers = max(1, round((megabytes - 33) / 15.7))
    return ModelConfig(
        hidden=512, layers=layers, heads=8, kv_heads=4, head_dim=64, ffn=2048, vocab=16000, max_positions=1024
    )


def free_port() -> int:
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        return listener.getsockname()[1]


@contextmanager
def started(folder: Path) -> Iterator[str]:
    serving = Serving(folder, engine="sglang", port=free_port(), context_tokens=1024)
    url = url_of(serving.host, serving.port)
    child = Child(command_of(serving, PYTHON, "cpu", serving.port), url, folder.parent / "server.log")
    child.start()
    try:
        while not child.healthy():
            if child.status is not None:
                raise SystemExit("\n".join(child.last_lines(20)))
            time.sleep(1)
        yield url
    finally:
        child.end()


def broadcasting(rank: int, port: int, size: int, orders: Connection) -> None:
    """One end of the plain broadcast; at each order it sends, or takes, the bytes and tells the seconds."""
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"tcp://127.0.0.1:{port}", rank=rank, world_size=2)
    block = torch.ones(size, dtype=torch.uint8)
    while orders.recv():
        dist.barrier()
        began = time.perf_counter()
        dist.broadcast(block, src=0)
        # Until the other end has all of it.
        dist.barrier()
        orders.send(time.perf_counter() - began)
    dist.destroy_process_group()


@contextmanager
def plain(size: int) -> Iterator[list[Connection]]:
    """The ends of a pair of processes that broadcast."""
    context, port = multiprocessing.get_context("spawn"), free_port()
    pipes = [context.Pipe() for _ in range(2)]
    pair = [
        context.Process(target=broadcasting, args=(rank, port, size, theirs))
        for rank, (_ours, theirs) in enumerate(pipes)
    ]
    for one in pair:
        one.start()
    ends = [ours for ours, _theirs in pipes]
    yield ends
    for end in ends:
        end.send(False)
    for one in pair:
        one.join()


def broadcast_seconds(ends: list[Connection]) -> float:
    for end in ends:
        end.send(True)
    return max(end.recv() for end in ends)


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--megabytes", type=int, default=160)
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--bucket-mb", type=int, default=64)
    add_write_option(parser)
    given = parser.parse_args()
    if not PYTHON.exists():
        parser.error(f"no {PYTHON}: run `make engines` first")
    torch.set_num_threads(1)
    shape = shape_of(given.megabytes)
    seconds: dict[str, list[float]] = {name: [] for name in ("gloo broadcast", *KINDS)}
    worst = 0.0
    with tempfile.TemporaryDirectory() as place, process.running(seed=1):
        folder = Path(place) / "model"
        model = build_model(shape)
        load_hf_tensors(model, random_hf_tensors(shape, 0, std=0.05))
        save_hf_folder(folder, shape, random_hf_tensors(shape, 0, std=0.05))
        size = sum(parameter.nbytes for parameter in model.parameters())
        rows = probe_texts(shape.vocab, count=1, length=16)
        with started(folder) as url, plain(size) as ends:
            publishers = {
                kind: Publisher(
                    [SglangControl(url)],
                    model,
                    Sync(
                        transport=kind,
                        bucket_bytes=given.bucket_mb * 2**20,
                        tolerance=1e-3,
                        folder=Path(place) / "versions",
                    ),
                    rows,
                    lambda rows, _head: causal_logprobs(LogprobRunner(model), rows, 64),
                )
                for kind in KINDS
            }
            version = 0
            for _ in range(1 + given.repeats):
                seconds["gloo broadcast"].append(broadcast_seconds(ends))
                for kind, publisher in publishers.items():
                    version += 1
                    published = publisher.publish(version)
                    seconds[kind].append(published.seconds)
                    worst = max(worst, published.difference)
            for publisher in publishers.values():
                publisher.end()
    plainly, rows = seconds["gloo broadcast"][1:], []
    for name, taken in seconds.items():
        rates = [size / 1e6 / one for one in taken[1:]]
        rows.append((name, spread(rates, ".0f"), spread(ratios(plainly, taken[1:]))))
    note = (
        f"{size / 1e6:.0f} MB in float32, buckets of {given.bucket_mb} MiB, {given.repeats} repeats; the "
        f"server's pause and its own loading are included. Log-probs then differ by {worst:.1e} at most."
    )
    table = Table("Weights to an SGLang server", ("way", "MB/s", "of the broadcast's rate"), rows, note)
    publish("weight sync", [table], "one thread on each side", given.write)


if __name__ == "__main__":
    main()
