"""`serve-rollout` in a process of its own, and all that descends from it."""

from __future__ import annotations

import json
import os
import queue
import re
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from types import MappingProxyType

import psutil

ROOT = Path(__file__).resolve().parents[4]
HEALTHY = re.compile(r"server (\d+)  (http://\S+)  pid (\d+)  log (\S+)")
# Ends within a second; machines that run tests may be busy.
GONE_SECONDS = 180


@dataclass
class Launched:
    """The supervisor's process, and its lines as they come; None is the last."""

    process: subprocess.Popen[str]
    lines: queue.Queue[str | None] = field(default_factory=queue.Queue)

    def next_line(self, seconds: float) -> str | None:
        return self.lines.get(timeout=seconds)

    def next_healthy(self, seconds: float) -> tuple[int, str, int]:
        """Index, URL and pid of the server that is told healthy next."""
        end = time.monotonic() + seconds
        lines: list[str] = []
        while (line := self.next_line(end - time.monotonic())) is not None:
            if healthy := HEALTHY.fullmatch(line):
                return int(healthy[1]), healthy[2], int(healthy[3])
            lines.append(line)
        raise AssertionError(f"ended with {self.process.wait()}: {lines[-5:]}")

    def family(self) -> list[psutil.Process]:
        """All that descends from it now."""
        return psutil.Process(self.process.pid).children(recursive=True)


def assert_gone(processes: list[psutil.Process]) -> None:
    _, alive = psutil.wait_procs(processes, timeout=GONE_SECONDS)
    assert not alive


@contextmanager
def launched(env: Mapping[str, str] = MappingProxyType({}), **settings: object) -> Iterator[Launched]:
    """A supervisor under these settings of `Serving`, its servers with `env` beside this process's own."""
    as_json = json.dumps(
        {name: str(value) if isinstance(value, Path) else value for name, value in settings.items()}
    )
    process = subprocess.Popen(
        [sys.executable, "-m", "tests.unit.rollout.serving.start", as_json],
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        cwd=ROOT,
        env={**os.environ, "OMP_NUM_THREADS": "1", **env},
    )
    it = Launched(process)
    reader = threading.Thread(target=_read, args=(it,))
    reader.start()
    family: list[psutil.Process] = []
    try:
        yield it
    finally:
        if process.poll() is None:
            family = it.family()
            process.send_signal(signal.SIGTERM)
            process.wait(GONE_SECONDS)
        reader.join()
        process.stdout.close()
        assert_gone(family)


def _read(it: Launched) -> None:
    for line in it.process.stdout:
        it.lines.put(line.rstrip("\n"))
    it.lines.put(None)
