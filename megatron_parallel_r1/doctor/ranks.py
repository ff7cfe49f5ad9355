"""Checks between ranks: clocks, the shared folder, and an all-reduce with its bandwidth."""

from __future__ import annotations

import os
import platform
import time
from pathlib import Path

import torch
import torch.distributed as dist

from megatron_parallel_r1.distributed.collectives import all_gather_objects, barrier
from megatron_parallel_r1.doctor.findings import Finding
from megatron_parallel_r1.utils.rank import rank, world_size

# What a barrier leaves between the ranks is far below.
CLOCK_S = 2.0
# NFS clients look for new files every 3 to 60 s by default; a run waits no longer.
VISIBLE_S = 60.0
GPU_BYTES, CPU_BYTES = 256 * 2**20, 16 * 2**20
REPEATS = 5
# Bytes per second that each rank sends and receives: below it NCCL runs over Ethernet, not InfiniBand.
SLOW_NETWORK = 5e9


def clocks() -> list[Finding]:
    """How far the nodes' clocks are apart."""
    barrier()
    times = all_gather_objects((platform.node(), time.time()))
    apart = max(at for _, at in times) - min(at for _, at in times)
    nodes = len({node for node, _ in times})
    found = f"{apart:.1f} s apart on {nodes} nodes"
    if apart > CLOCK_S:
        return [Finding("clocks", found, "note", "logs cannot be put in order; run chrony on all nodes")]
    return [Finding("clocks", f"less than {CLOCK_S:g} s apart on {nodes} node{'s' * (nodes > 1)}")]


def shared_folder(folder: Path) -> list[Finding]:
    """Whether every rank sees what every other one writes to the run's folder."""
    token = all_gather_objects(f"{os.getpid()}-{time.time_ns()}")[0]
    own = folder / f".doctor_{token}_{rank()}"
    # Whatever fails on one rank, the others meet it at both barriers.
    try:
        own.write_text(token)
    except OSError as error:
        failure = f"{folder.resolve()}: {platform.node()} cannot write there: {error.strerror}"
    else:
        failure = ""
    barrier()
    missing = _unseen([folder / f".doctor_{token}_{other}" for other in range(world_size())], token)
    barrier()
    own.unlink(missing_ok=True)
    if failure:
        return [Finding("shared folder", failure, "fault", "set out to a folder that this user can write")]
    if missing:
        ranks = ", ".join(path.name.rpartition("_")[2] for path in missing)
        return [
            Finding(
                "shared folder",
                f"{folder.resolve()}: {platform.node()} does not see what ranks {ranks} write",
                "fault",
                "set out to a folder on a file system that all nodes mount",
            )
        ]
    return [Finding("shared folder", f"{folder.resolve()}: all ranks see each other's files")]


def _unseen(files: list[Path], token: str) -> list[Path]:
    """Those that do not appear with their content in time."""
    give_up = time.monotonic() + VISIBLE_S
    while True:
        missing = [file for file in files if not _holds(file, token)]
        if not missing or time.monotonic() > give_up:
            return missing
        time.sleep(0.2)


def _holds(file: Path, token: str) -> bool:
    try:
        return file.read_text() == token
    except OSError:
        return False


def all_reduce() -> list[Finding]:
    """Sums a tensor over all ranks: the result, and the bytes per second that a rank sends.

    A ring all-reduce sends 2 (n - 1) / n times the tensor from each of n ranks; NCCL's tests call this the
    bus bandwidth.
    """
    size = world_size()
    if size == 1:
        return [Finding("all-reduce", "one rank: nothing to send")]
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    count = (GPU_BYTES if device.type == "cuda" else CPU_BYTES) // 4
    ones_N = torch.ones(count, device=device)
    dist.all_reduce(ones_N)  # the first one connects
    wrong = ones_N[ones_N != size][:3].tolist()
    barrier()
    started = time.perf_counter()
    for _ in range(REPEATS):
        dist.all_reduce(ones_N.fill_(1))
    ones_N[0].item()  # waits for the GPU
    seconds = max(all_gather_objects((time.perf_counter() - started) / REPEATS))
    rate = 2 * (size - 1) / size * count * 4 / seconds
    nodes = len(set(all_gather_objects(platform.node())))
    found = f"{size} ranks on {nodes} node{'s' * (nodes > 1)}, {dist.get_backend()}: {rate / 1e9:.2g} GB/s"
    if wrong:
        return [Finding("all-reduce", f"a sum of {size} ones is {wrong}", "fault", "run NCCL's own tests")]
    if device.type == "cuda" and rate < SLOW_NETWORK:
        advice = "NCCL_DEBUG=INFO shows its way; set NCCL_IB_HCA and NCCL_SOCKET_IFNAME in slurm/site.env"
        return [Finding("all-reduce", found, "note", advice)]
    return [Finding("all-reduce", found)]
