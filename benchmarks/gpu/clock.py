"""Time and memory of a call on a GPU, or on a CPU to test the benchmarks."""

from __future__ import annotations

import gc
import time
from collections.abc import Callable
from dataclasses import dataclass
from statistics import median

import torch

WARM_UPS = 3
# Slow calls are repeated for at most this many seconds, but at least this often.
SECONDS, LEAST = 2.0, 3


@dataclass(frozen=True, slots=True)
class Cost:
    """Median milliseconds of a call, and its peak MiB beyond what was allocated before."""

    ms: float
    mib: float


def cost_of(call: Callable[[], object], device: torch.device, repeats: int) -> Cost:
    """Measures a call after warm-up; memory on a GPU only."""
    if device.type == "cpu":
        call()
        return Cost(median(_seconds(call) for _ in range(repeats)) * 1e3, 0.0)
    for _ in range(WARM_UPS - 1):
        call()
    torch.cuda.synchronize(device)
    torch.cuda.reset_peak_memory_stats(device)
    before = torch.cuda.memory_allocated(device)
    once = _seconds(lambda: (call(), torch.cuda.synchronize(device)))
    repeats = min(repeats, max(LEAST, int(SECONDS / once)))
    events = [[torch.cuda.Event(enable_timing=True) for _ in range(2)] for _ in range(repeats)]
    for start, stop in events:
        start.record()
        call()
        stop.record()
    torch.cuda.synchronize(device)
    mib = (torch.cuda.max_memory_allocated(device) - before) / 2**20
    return Cost(median(start.elapsed_time(stop) for start, stop in events), mib)


def free_memory(device: torch.device) -> None:
    """Frees the memory of a deleted model: Megatron's objects form cycles that wait for the collector."""
    gc.collect()
    if device.type == "cuda":
        torch.cuda.empty_cache()


def _seconds(call: Callable[[], object]) -> float:
    start = time.perf_counter()
    call()
    return time.perf_counter() - start
