"""Checks of one node: GPUs and driver, memory, disk, software, the interpreter of rollout servers."""

from __future__ import annotations

import os
import platform
import shutil
import subprocess
import time
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

import psutil
import torch

from megatron_parallel_r1.doctor.findings import Finding
from megatron_parallel_r1.errors import UserError
from megatron_parallel_r1.model.layers import Layers, LayerSupport
from megatron_parallel_r1.rollout.launcher.command import EngineName, LaunchSettings
from megatron_parallel_r1.rollout.launcher.run import find_python, visible_gpus
from megatron_parallel_r1.run.transport import engine_versions, trainer_nccl

GB = 1e9
DISK_BYTES = 256 * 2**20
# A checkpoint of Qwen3-4B with its optimizer has 56 GB: at this rate, 5 minutes.
SLOW_DISK = 0.2 * GB
FULL_DISK = 100 * GB
# Less is free on a GPU on which something else runs.
FREE_SHARE = 0.9


def software() -> list[Finding]:
    """Versions of what trains, and whether kernels can be compiled."""
    names = ("torch", "megatron-core", "transformers", "triton", "transformer_engine")
    found = [f"Python {platform.python_version()}", *(f"{name} {_version(name)}" for name in names)]
    findings = [Finding("software", ", ".join(found))]
    if not torch.cuda.is_available():
        return findings
    if _version("triton") == "absent":
        findings.append(
            Finding("kernels", "no triton", "note", "attention is much slower; pip install triton")
        )
    elif not any(map(shutil.which, ("cc", "gcc", "clang"))):
        findings.append(
            Finding("kernels", "no C compiler, which triton needs", "fault", "install gcc, or set CC")
        )
    return findings


def gpus() -> list[Finding]:
    """The GPU of this rank: its driver, its memory, and whether it is free; FP8 of Transformer Engine."""
    listed = visible_gpus()
    if not torch.cuda.is_available():
        if listed:
            built = torch.version.cuda
            reason = f"built for CUDA {built}; update the driver" if built else "built for the CPU alone"
            return [
                Finding(
                    "GPU",
                    f"{len(listed)} on this node, but torch {torch.__version__} sees none: it was {reason}",
                    "fault",
                    "" if built else "install torch with CUDA: pip install torch",
                )
            ]
        return [Finding("GPU", "none: models train on the CPU over gloo")]
    device = torch.device("cuda", torch.cuda.current_device())
    properties, (free, total) = torch.cuda.get_device_properties(device), torch.cuda.mem_get_info(device)
    major, minor = properties.major, properties.minor
    text = f"{properties.name}, {total / GB:.0f} GB, sm_{major}{minor}, driver {_driver()}"
    nccl = ".".join(map(str, torch.cuda.nccl.version()))
    findings = [Finding("GPU", f"{text}, CUDA {torch.version.cuda}, NCCL {nccl}")]
    # This process's own context takes up to 1 GB.
    if free + GB < FREE_SHARE * total:
        findings.append(
            Finding(
                "GPU memory",
                f"{(total - free) / GB:.0f} of {total / GB:.0f} GB of GPU {device.index} are in use",
                "fault",
                "nvidia-smi shows by which process; end it, or ask for whole nodes (--exclusive)",
            )
        )
    support = LayerSupport.detect(Layers(kind="transformer_engine", fp8="current"))
    if support.engine is None:
        findings.append(Finding("FP8", "no Transformer Engine: model.layers local, bfloat16 alone", "note"))
    elif refusal := support.engine_refusal or support.fp8_refusal:
        findings.append(Finding("FP8", refusal, "note", "keep model.fp8: none, or repair the installation"))
    else:
        findings.append(Finding("FP8", f"Transformer Engine {support.engine}"))
    return findings


def memory() -> list[Finding]:
    """Cores and memory of the node, and room in /dev/shm, which NCCL and sync.transport tensor use."""
    total = psutil.virtual_memory().total
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    findings = [Finding("node", f"{cores} cores for this rank, {total / GB:.0f} GB")]
    shared = Path("/dev/shm")
    if shared.is_dir() and (size := shutil.disk_usage(shared).total) < GB:
        findings.append(
            Finding(
                "shared memory",
                f"{shared} has {size / 1e6:.0f} MB",
                "fault" if torch.cuda.is_available() else "note",
                "NCCL and sync.transport tensor need more; start the container with --shm-size=16g or "
                "--ipc=host",
            )
        )
    return findings


def disk(folder: Path) -> list[Finding]:
    """How fast a checkpoint can be written to the run's folder, and how much room there is."""
    file = folder / f".doctor_{platform.node()}_{os.getpid()}"
    block, started = os.urandom(2**20), time.perf_counter()
    try:
        with file.open("wb") as out:
            for _ in range(DISK_BYTES // len(block)):
                out.write(block)
            out.flush()
            os.fsync(out.fileno())
        rate = DISK_BYTES / (time.perf_counter() - started)
    finally:
        file.unlink(missing_ok=True)
    free = shutil.disk_usage(folder).free
    findings = [Finding("disk", f"{folder.resolve()}: {rate / 1e6:.0f} MB/s, {free / GB:.0f} GB free")]
    if rate < SLOW_DISK:
        findings.append(
            Finding(
                "disk rate",
                f"{rate / 1e6:.0f} MB/s",
                "note",
                "a 4B model's checkpoint takes 5 min or more",
            )
        )
    if free < FULL_DISK:
        findings.append(
            Finding("disk room", f"{free / GB:.0f} GB", "note", "a 4B model's checkpoint alone takes 56 GB")
        )
    return findings


def engine(name: EngineName) -> list[Finding]:
    """The environment of rollout servers, and whether they can share an NCCL group with the trainer."""
    try:
        python = find_python(LaunchSettings(checkpoint=Path(), engine=name))
    except UserError as error:
        return [Finding("servers", str(error), "note", "the native engine needs none")]
    try:
        found = engine_versions(python, name)
    except UserError as error:
        return [Finding("servers", str(error), "fault", "make engines builds it anew")]
    findings = [Finding("servers", f"{name} {found.engine}, torch {found.torch} ({python})")]
    trainer = trainer_nccl()
    if trainer and found.nccl and found.nccl != trainer:
        theirs, ours = (".".join(map(str, v)) for v in (found.nccl, trainer))
        findings.append(
            Finding(
                "NCCL",
                f"{ours} here and {theirs} in the servers: they cannot share a group",
                "fault",
                "set sync.transport disk with a sync.folder, or give both one torch",
            )
        )
    return findings


def _driver() -> str:
    query = ["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"]
    try:
        lines = subprocess.run(query, capture_output=True, text=True, timeout=60).stdout.split()
    except (OSError, subprocess.TimeoutExpired):
        return "unknown"
    return lines[0] if lines else "unknown"


def _version(name: str) -> str:
    try:
        return version(name)
    except PackageNotFoundError:
        return "absent"
