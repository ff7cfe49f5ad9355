"""Weight update to an SGLang server in MB/s, compared with a plain gloo broadcast of as many bytes.

    make engines && python -m benchmarks.weight_sync [--megabytes 160] [--repeats 5] [--bucket-mb 64]

Starts a server of a random float32 model of about that size on this CPU. Each repeat broadcasts as many bytes
from one process to another (one tensor, both ends this project's torch) and then publishes the model by each
transport. The time is that from pausing the server to resuming it, including the gathering of buckets and the
server's copy into its parameters, and for `disk` writing, reading back and checking. The first repeat is a
warm-up. Reports medians and the ratio to the broadcast in the same repeat.
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
from megatron_parallel_r1.rollout.launcher.command import LaunchSettings, build_command
from megatron_parallel_r1.rollout.launcher.run import server_url
from megatron_parallel_r1.rollout.launcher.supervisor import ServerProcess
from megatron_parallel_r1.sync.publisher import Publisher
from megatron_parallel_r1.sync.settings import Sync, TransportKind
from megatron_parallel_r1.sync.sglang import SglangControl
from megatron_parallel_r1.train.logprob_runner import LogprobRunner, causal_logprobs, probe_texts

KINDS: tuple[TransportKind, ...] = ("distributed", "tensor", "disk")
PYTHON = Path(__file__).resolve().parents[1] / ".venv-sglang" / "bin" / "python"


def shape_of(megabytes: int) -> ModelConfig:
    """About 16 MB per layer and a 33 MB embedding."""
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
    serving = LaunchSettings(folder, engine="sglang", port=free_port(), context_tokens=1024)
    url = server_url(serving.host, serving.port)
    child = ServerProcess(
        build_command(serving, PYTHON, "cpu", serving.port), url, folder.parent / "server.log"
    )
    child.start()
    try:
        while not child.healthy():
            if child.status is not None:
                raise SystemExit("\n".join(child.last_lines(20)))
            time.sleep(1)
        yield url
    finally:
        child.end()


def broadcasting(rank: int, port: int, size: int, requests: Connection) -> None:
    """One end of the plain broadcast: on each request sends or receives the bytes and reports the seconds."""
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"tcp://127.0.0.1:{port}", rank=rank, world_size=2)
    block = torch.ones(size, dtype=torch.uint8)
    while requests.recv():
        dist.barrier()
        began = time.perf_counter()
        dist.broadcast(block, src=0)
        # Wait until the other end has received all bytes.
        dist.barrier()
        requests.send(time.perf_counter() - began)
    dist.destroy_process_group()


@contextmanager
def plain(size: int) -> Iterator[list[Connection]]:
    """Connections to the two processes that broadcast."""
    context, port = multiprocessing.get_context("spawn"), free_port()
    pipes = [context.Pipe() for _ in range(2)]
    processes = [
        context.Process(target=broadcasting, args=(rank, port, size, theirs))
        for rank, (_ours, theirs) in enumerate(pipes)
    ]
    for peer in processes:
        peer.start()
    ends = [ours for ours, _theirs in pipes]
    yield ends
    for end in ends:
        end.send(False)
    for peer in processes:
        peer.join()


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
    args = parser.parse_args()
    if not PYTHON.exists():
        parser.error(f"no {PYTHON}: run `make engines` first")
    torch.set_num_threads(1)
    shape = shape_of(args.megabytes)
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
                        bucket_bytes=args.bucket_mb * 2**20,
                        tolerance=1e-3,
                        folder=Path(place) / "versions",
                    ),
                    rows,
                    lambda rows, _head: causal_logprobs(LogprobRunner(model), rows, 64),
                )
                for kind in KINDS
            }
            version = 0
            for _ in range(1 + args.repeats):
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
        rates = [size / 1e6 / second for second in taken[1:]]
        rows.append((name, spread(rates, ".0f"), spread(ratios(plainly, taken[1:]))))
    note = (
        f"{size / 1e6:.0f} MB in float32, buckets of {args.bucket_mb} MiB, {args.repeats} repeats; the "
        f"server's pause and loading are included. Log-probs then differ by {worst:.1e} at most."
    )
    table = Table("Weights to an SGLang server", ("transport", "MB/s", "of the broadcast's rate"), rows, note)
    publish("weight sync", [table], "one thread per side", args.write)


if __name__ == "__main__":
    main()
