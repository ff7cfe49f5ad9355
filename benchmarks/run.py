"""All benchmarks that a CPU runs, one after the other: `make bench`.

    python -m benchmarks.run [--only NAME]... [--list]

Each is a program of its own and writes its section of docs/performance.md. One that needs the environment of
an inference server (`make engines`) is left out, with a line, where there is none. The times that they took
come last.
"""

from __future__ import annotations

import argparse
import os
import subprocess
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]


@dataclass(frozen=True, slots=True)
class Benchmark:
    """A module of this folder with its words, and the environment that it needs beside this one."""

    module: str
    words: tuple[str, ...] = ()
    environment: str | None = None


# Sizes are such that all of them take less than twenty minutes on two cores.
ALL = (
    Benchmark("sft_throughput"),
    Benchmark("mask_cost"),
    Benchmark("native_engine"),
    Benchmark("critical_path"),
    Benchmark("rl_step"),
    Benchmark("weight_sync", environment=".venv-sglang"),
    Benchmark("conversion"),
    Benchmark("verifier", ("--pairs", "200")),
    Benchmark("plan_error"),
)


def main(words: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--only", action="append", choices=[one.module for one in ALL])
    parser.add_argument("--list", action="store_true", help="print the commands and run nothing")
    told = parser.parse_args(words)
    chosen = [one for one in ALL if not told.only or one.module in told.only]
    took: list[str] = []
    failed: list[str] = []
    for one in chosen:
        command = [sys.executable, "-W", "ignore", "-m", f"benchmarks.{one.module}", *one.words, "--write"]
        if told.list:
            print(" ".join(("python", *command[3:])))
            continue
        if one.environment and not (ROOT / one.environment / "ready").is_file():
            print(f"{one.module} is left out: no {one.environment}; `make engines` builds it", flush=True)
            continue
        began = time.monotonic()
        # One thread a process, as everywhere: small tensors on few cores.
        environment = {"OMP_NUM_THREADS": "1", "TOKENIZERS_PARALLELISM": "false", **os.environ}
        code = subprocess.run(command, cwd=ROOT, env=environment).returncode
        took.append(f"{one.module} {time.monotonic() - began:.0f} s")
        if code:
            failed.append(f"{one.module} ended with exit code {code}")
    if not told.list:
        print("; ".join(took + failed), flush=True)
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
