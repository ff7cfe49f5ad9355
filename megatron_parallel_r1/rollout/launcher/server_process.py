"""One server and what became of it."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path

import httpx
import psutil

from megatron_parallel_r1.rollout.launcher.commands import Command
from megatron_parallel_r1.rollout.launcher.guard import GRACE_SECONDS

GUARD = "megatron_parallel_r1.rollout.launcher.guard"
# What torchrun tells a trainer of its own process group; an engine would take it for its own.
LAUNCHER = ("RANK", "LOCAL_", "GROUP_", "ROLE_", "WORLD_SIZE", "MASTER_", "TORCHELASTIC_")


def _without_launcher(environment: Mapping[str, str]) -> dict[str, str]:
    return {name: value for name, value in environment.items() if not name.startswith(LAUNCHER)}


class Child:
    """A server under a guard, in a process group of their own. Not for several threads: the kernel ties a
    guard to the thread that starts it."""

    def __init__(self, command: Command, url: str, log: Path) -> None:
        """Starts nothing yet.

        Args:
            url: base address at which the command makes it listen.
            log: its output is appended here.
        """
        self.url = url
        self.log = log
        self._command = command
        self._guard: subprocess.Popen[bytes] | None = None
        self._started = 0.0

    def start(self) -> None:
        """Starts it, or starts it again after its end."""
        self.log.parent.mkdir(parents=True, exist_ok=True)
        guarded = (sys.executable, "-m", GUARD, str(os.getpid()), *self._command.arguments)
        with open(self.log, "ab") as log:
            self._guard = subprocess.Popen(
                guarded,
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=subprocess.STDOUT,
                env=_without_launcher(os.environ) | self._command.environment,
                start_new_session=True,
            )
        self._started = time.monotonic()

    @property
    def status(self) -> int | None:
        """Its exit status, 128 + n for signal n; None while it runs."""
        assert self._guard is not None, "not started"
        code = self._guard.poll()
        return 128 - code if code is not None and code < 0 else code

    @property
    def age(self) -> float:
        """Seconds since its last start."""
        return time.monotonic() - self._started

    @property
    def guard_pid(self) -> int:
        assert self._guard is not None, "not started"
        return self._guard.pid

    @property
    def pid(self) -> int | None:
        """Of the server itself; None when it has ended."""
        assert self._guard is not None, "not started"
        with suppress(psutil.NoSuchProcess):
            for process in psutil.Process(self._guard.pid).children():
                return process.pid
        return None

    def healthy(self) -> bool:
        """Whether it answers."""
        # No proxy, for it is near; no certificates, for to read them takes fifty times what a question does.
        try:
            answer = httpx.get(f"{self.url}/health", timeout=5, trust_env=False, verify=False)
        except httpx.HTTPError:
            return False
        return answer.status_code == 200

    def tell_to_end(self) -> None:
        """Returns at once; `end` waits."""
        if self._guard is not None and self._guard.poll() is None:
            self._guard.terminate()

    def end(self) -> None:
        """Ends it with all that it started."""
        if self._guard is None:
            return
        self.tell_to_end()
        with suppress(subprocess.TimeoutExpired):
            self._guard.wait(GRACE_SECONDS + 10)
        # A guard that was killed itself leaves the group to us.
        with suppress(ProcessLookupError):
            os.killpg(self._guard.pid, signal.SIGKILL)
        self._guard.wait()

    def last_lines(self, count: int) -> list[str]:
        """Of its log, without empty ones."""
        lines = self.log.read_text(errors="replace").splitlines()
        return [line for line in lines if line.strip()][-count:]
