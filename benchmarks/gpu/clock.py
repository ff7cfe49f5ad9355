"""Time and memory of a call, on a GPU or, to test the benchmarks, on a CPU."""

from __future__ import annotations

import gc
import time
from collections.abc import Callable
from dataclasses import dataclass
from statistics import median

import torch

WARM_UPS = 3
# A slow call is repeated less often than asked, but not less than this.
SECONDS, LEAST = 2.0, 3


@dataclass(frozen=True, slots=True)
class Cost:
    """Median milliseconds of a call, and the most MiB that it had allocated beyond what was there before."""

    ms: float
    mib: float


def cost_of(call: Callable[[], object], device: torch.device, repeats: int) -> Cost:
    """Runs a call until it is compiled and warm, then so many times; memory is counted on a GPU alone."""
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


def let_go(device: torch.device) -> None:
    """Frees what a dropped model held: Megatron's parts refer to each other and wait for the collector."""
    gc.collect()
    if device.type == "cuda":
        torch.cuda.empty_cache()


def _seconds(call: Callable[[], object]) -> float:
    start = time.perf_counter()
    call()
    return time.perf_counter() - start
