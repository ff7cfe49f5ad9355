"""The program of a verification worker.

Usage: `python -m megatron_parallel_r1.rewards.verifier_process LIMIT_S MEMORY_BYTES`.

It writes `r` when it is ready; then it reads JSON lines `[answer, reference]` and replies to each with one
byte, `1` for equal, `0` for not. Output of math-verify is discarded, so it cannot corrupt the replies.

The parent enforces the time limit. If the parent is gone, the process ends at the end of its input, or,
inside one endless multiplication, by a kernel timer of its processor time, which needs no interpreter.
"""

from __future__ import annotations

import json
import logging
import os
import resource
import signal
import sys
from contextlib import suppress


def main(limit_s: float, memory_bytes: int) -> None:
    with suppress(ValueError, OSError):  # not every kernel can limit the address space
        resource.setrlimit(resource.RLIMIT_AS, (memory_bytes, memory_bytes))
    signal.signal(signal.SIGPROF, signal.SIG_DFL)

    from megatron_parallel_r1.rewards.algebra import equal
    from megatron_parallel_r1.rewards.fast_equality import decide

    logging.disable(logging.CRITICAL)
    equal(r"\frac{1}{2}", "x")  # compiles the patterns
    replies = os.dup(1)
    nowhere = os.open(os.devnull, os.O_WRONLY)
    os.dup2(nowhere, 1)
    os.dup2(nowhere, 2)
    os.write(replies, b"r")
    for line in sys.stdin.buffer:
        signal.setitimer(signal.ITIMER_PROF, limit_s)
        try:
            answer, reference = json.loads(line)
            right = decide(answer, reference, equal)
        except (Exception, RecursionError, MemoryError):
            right = False
        signal.setitimer(signal.ITIMER_PROF, 0)
        os.write(replies, b"1" if right else b"0")


if __name__ == "__main__":
    main(float(sys.argv[1]), int(sys.argv[2]))
