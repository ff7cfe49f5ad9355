"""The program of a verification worker.

Usage: `python -m megatron_parallel_r1.rewards.verifier_process LIMIT_S MEMORY_BYTES`.

It says `r` when it is ready; then it reads one JSON line `[answer, reference]` at a time and answers with
one byte, `1` for equal, `0` for not. Whatever math-verify prints goes nowhere, so it cannot disturb that.

The parent enforces the time limit. Should the parent be gone, the process ends with its input, or, from
inside one endless multiplication, by a kernel timer of its processor time that needs no turn of the
interpreter.
"""

from __future__ import annotations

import json
import logging
import os
import resource
import signal
import sys
from contextlib import suppress
from functools import lru_cache


def main(limit_s: float, memory_bytes: int) -> None:
    with suppress(ValueError, OSError):  # not every kernel limits the address space
        resource.setrlimit(resource.RLIMIT_AS, (memory_bytes, memory_bytes))
    signal.signal(signal.SIGPROF, signal.SIG_DFL)

    from math_verify import LatexExtractionConfig, parse, verify

    logging.disable(logging.CRITICAL)
    latex = [LatexExtractionConfig()]

    # Their time-outs are signal handlers, which wait for the interpreter: off.
    @lru_cache(maxsize=256)  # the samples of a problem share its reference
    def read(text: str) -> list[object]:
        return parse(f"${text}$", latex, parsing_timeout=None)

    def equal(answer: str, reference: str) -> bool:
        return verify(read(reference), read(answer), timeout_seconds=None)

    equal(r"\frac{1}{2}", "x")  # compiles its patterns
    replies = os.dup(1)
    nowhere = os.open(os.devnull, os.O_WRONLY)
    os.dup2(nowhere, 1)
    os.dup2(nowhere, 2)
    os.write(replies, b"r")
    for line in sys.stdin.buffer:
        signal.setitimer(signal.ITIMER_PROF, limit_s)
        try:
            right = equal(*json.loads(line))
        except (Exception, RecursionError, MemoryError):
            right = False
        signal.setitimer(signal.ITIMER_PROF, 0)
        os.write(replies, b"1" if right else b"0")


if __name__ == "__main__":
    main(float(sys.argv[1]), int(sys.argv[2]))
