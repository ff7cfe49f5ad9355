"""One server and what became of it."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from pathlib import Path

import httpx
import psutil

from megatron_parallel_r1.errors import UserError
from megatron_parallel_r1.rollout.launcher.command import ServerCommand
from megatron_parallel_r1.rollout.launcher.guard import GRACE_SECONDS, adopt_orphans, end_descendants

GUARD = "megatron_parallel_r1.rollout.launcher.guard"
# What torchrun tells a trainer of its own process group; an engine would take it for its own.
LAUNCHER = ("RANK", "LOCAL_", "GROUP_", "ROLE_", "WORLD_SIZE", "MASTER_", "TORCHELASTIC_")


def _without_launcher(environment: Mapping[str, str]) -> dict[str, str]:
    return {name: value for name, value in environment.items() if not name.startswith(LAUNCHER)}


class ServerProcess:
    """A server under a guard, in a process group of their own. Not for several threads: the kernel ties a
    guard to the thread that starts it."""

    def __init__(self, command: ServerCommand, url: str, log: Path) -> None:
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


POLL_SECONDS = 0.2


class Supervisor:
    """Of children that it starts and ends: a context manager."""

    def __init__(
        self,
        children: Sequence[ServerProcess],
        crashes: int,
        start_seconds: float,
        tell: Callable[[str], None],
        alone: bool = False,
    ) -> None:
        """Starts nothing yet; `crashes` and `start_seconds` as in settings.Serving.

        Args:
            tell: is given a line about each thing that happens.
            alone: this process has no other children, so that it may end whatever a killed guard leaves.
        """
        self._children = children
        self._crashes = crashes
        self._start_seconds = start_seconds
        self._tell = tell
        self._alone = alone
        self._healthy = [False] * len(children)
        self._failed = [0] * len(children)

    def __enter__(self) -> Supervisor:
        if self._alone:
            adopt_orphans()
        for child in self._children:
            child.start()
        return self

    def __exit__(self, *_: object) -> None:
        for child in self._children:
            child.tell_to_end()
        for child in self._children:
            child.end()

    @property
    def healthy(self) -> bool:
        """Whether all are, as of the last `look`."""
        return all(self._healthy)

    def look(self) -> None:
        """Looks at each once, and does what is needed.

        Raises:
            UserError: one crashed too often.
        """
        for index, child in enumerate(self._children):
            if child.status is not None:
                self._crashed(index, f"ended with status {child.status}")
            elif not self._healthy[index] and child.healthy():
                self._healthy[index] = True
                self._failed[index] = 0
                self._tell(f"server {index}  {child.url}  pid {child.pid}  log {child.log}")
            elif not self._healthy[index] and child.age > self._start_seconds:
                self._crashed(index, f"is not healthy after {self._start_seconds:g} s")
        time.sleep(POLL_SECONDS)

    def _crashed(self, index: int, how: str) -> None:
        child = self._children[index]
        child.end()
        if self._alone:
            end_descendants(keep=frozenset(other.guard_pid for other in self._children if other is not child))
        self._healthy[index] = False
        self._failed[index] += 1
        if self._failed[index] >= self._crashes:
            last = " ".join(child.last_lines(1))
            raise UserError(
                f"server {index} {how}, {self._failed[index]} times without being healthy in between; "
                f"look into {child.log}, which ends: {last}"
            )
        self._tell(f"server {index} {how}; starting it again")
        child.start()
