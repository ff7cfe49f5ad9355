"""Records what a GPU would make slow or refuse, with the line of ours that caused it."""

from __future__ import annotations

import json
import sys
from collections import Counter
from pathlib import Path

# The innermost frame of a package counts; a line of Megatron's is named with the line of ours that called it.
OURS = "/megatron_parallel_r1/"
MEGATRON = "/megatron/core/"


class Ledger:
    """Counts of waits and copies, and faults, by place.

    Kinds of events: `wait` (the host waits until the device has computed), `copy to host` (waits too),
    `copy to device` (from pageable memory, which waits for the copy), `pinned copy` (does not wait).
    """

    def __init__(self) -> None:
        self.events: Counter[tuple[str, str, str]] = Counter()
        self.faults: Counter[tuple[str, str]] = Counter()

    def event(self, kind: str, what: str) -> None:
        self.events[kind, what, caller()] += 1

    def fault(self, what: str) -> None:
        """Something that CUDA or NCCL refuses."""
        self.faults[what, caller()] += 1

    def save(self, path: Path) -> None:
        events = [[*key, count] for key, count in self.events.most_common()]
        path.write_text(json.dumps({"faults": [[*f, n] for f, n in self.faults.items()], "events": events}))


def caller() -> str:
    """`file:line` in this package, preceded by the line in Megatron-Core that it called, if any."""
    megatron = ours = ""
    frame = sys._getframe(1)
    while frame is not None and not ours:
        file, line = frame.f_code.co_filename, frame.f_lineno
        if OURS in file and "/tests/" not in file:
            ours = f"{file.rpartition(OURS)[2]}:{line}"
        elif MEGATRON in file and not megatron:
            megatron = f"megatron {file.rpartition(MEGATRON)[2]}:{line} < "
        frame = frame.f_back
    return megatron + (ours or "elsewhere")


LEDGER = Ledger()
