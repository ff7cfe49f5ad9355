"""Runs all CPU benchmarks in sequence: `make bench`.

    python -m benchmarks.run [--only NAME]... [--list]

Each is a separate program and writes its section of docs/performance.md. Benchmarks that need an inference
server's environment (`make engines`) are skipped with a message if it is absent. Prints the duration of each
at the end.
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
    """A module of this folder, its arguments, and the environment that it needs besides this one."""

    module: str
    arguments: tuple[str, ...] = ()
    environment: str | None = None


# Sized so that all take less than twenty minutes on two cores.
ALL = (
    Benchmark("sft_throughput"),
    Benchmark("mask_cost"),
    Benchmark("native_engine"),
    Benchmark("critical_path"),
    Benchmark("rl_step"),
    Benchmark("trace_exchange", ("--ranks", "1", "2", "4")),
    Benchmark("weight_sync", environment=".venv-sglang"),
    Benchmark("conversion"),
    Benchmark("verifier", ("--pairs", "200")),
    Benchmark("plan_error"),
)


def main(words: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--only", action="append", choices=[benchmark.module for benchmark in ALL])
    parser.add_argument("--list", action="store_true", help="print the commands without running them")
    args = parser.parse_args(words)
    chosen = [benchmark for benchmark in ALL if not args.only or benchmark.module in args.only]
    took: list[str] = []
    failed: list[str] = []
    for benchmark in chosen:
        command = [
            sys.executable,
            "-W",
            "ignore",
            "-m",
            f"benchmarks.{benchmark.module}",
            *benchmark.arguments,
            "--write",
        ]
        if args.list:
            print(" ".join(("python", *command[3:])))
            continue
        if benchmark.environment and not (ROOT / benchmark.environment / "ready").is_file():
            print(
                f"{benchmark.module} is skipped: no {benchmark.environment}; `make engines` builds it",
                flush=True,
            )
            continue
        began = time.monotonic()
        # One thread per process: small tensors on few cores.
        environment = {"OMP_NUM_THREADS": "1", "TOKENIZERS_PARALLELISM": "false", **os.environ}
        code = subprocess.run(command, cwd=ROOT, env=environment).returncode
        took.append(f"{benchmark.module} {time.monotonic() - began:.0f} s")
        if code:
            failed.append(f"{benchmark.module} ended with exit code {code}")
    if not args.list:
        print("; ".join(took + failed), flush=True)
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
