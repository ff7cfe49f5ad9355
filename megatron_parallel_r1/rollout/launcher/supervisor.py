"""Server processes, and the supervisor that waits until they are healthy and restarts those that fail."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from contextlib import suppress
from pathlib import Path

import httpx
import psutil

from megatron_parallel_r1.errors import UserError
from megatron_parallel_r1.rollout.launcher.command import LaunchSettings, ServerCommand
from megatron_parallel_r1.rollout.launcher.guard import GRACE_SECONDS, adopt_orphans, end_descendants
from megatron_parallel_r1.utils.api_key import bearer

GUARD = "megatron_parallel_r1.rollout.launcher.guard"
# Variables by which torchrun describes a trainer's process group; an engine would take it for its own.
LAUNCHER = ("RANK", "LOCAL_", "GROUP_", "ROLE_", "WORLD_SIZE", "MASTER_", "TORCHELASTIC_")
# A rank's own CUDA settings (slurm/rank.sh). SGLang's memory saver refuses expandable segments.
OF_RANKS = ("CUDA_DEVICE_MAX_CONNECTIONS", "PYTORCH_ALLOC_CONF", "PYTORCH_CUDA_ALLOC_CONF")


class ServerProcess:
    """A server under a guard, in their own process group. Use it in one thread: the kernel ties a guard to
    the thread that starts it."""

    def __init__(self, command: ServerCommand, url: str, log: Path) -> None:
        """Starts nothing yet; appends its output to `log`."""
        self.url = url
        self.log = log
        self.command = command
        self._guard: subprocess.Popen[bytes] | None = None
        self._started = 0.0

    def start(self) -> None:
        """Starts or restarts it."""
        self.log.parent.mkdir(parents=True, exist_ok=True)
        guarded = (sys.executable, "-m", GUARD, str(os.getpid()), *self.command.arguments)
        left_out = LAUNCHER + (OF_RANKS if "RANK" in os.environ else ())
        own = {name: value for name, value in os.environ.items() if not name.startswith(left_out)}
        with open(self.log, "ab") as log:
            self._guard = subprocess.Popen(
                guarded,
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=subprocess.STDOUT,
                env=own | self.command.environment,
                start_new_session=True,
            )
        self._started = time.monotonic()

    @property
    def status(self) -> int | None:
        """Its exit status, 128 + n for signal n; None while it runs."""
        assert self._guard is not None, "not started"
        code = self._guard.poll()
        return 128 - code if code is not None and code < 0 else code

    def failure(self) -> str | None:
        """Why it must be restarted; None while it runs."""
        return None if self.status is None else f"ended with status {self.status}"

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
        """Of the server itself; None once it has ended."""
        assert self._guard is not None, "not started"
        with suppress(psutil.NoSuchProcess):
            for process in psutil.Process(self._guard.pid).children():
                return process.pid
        return None

    def healthy(self) -> bool:
        """Whether it is ready for requests."""
        return self._ask("/health") == 200

    def answers(self) -> bool:
        """Whether it gives any answer that its scheduler takes part in; also while its memory is released."""
        return self._ask(self.command.probe) is not None

    def _ask(self, path: str) -> int | None:
        """The status of the answer; None without one."""
        # Local: no proxy; no certificates, whose loading takes fifty times as long as the request.
        try:
            headers = bearer(self.command.key)
            answer = httpx.get(self.url + path, timeout=5, trust_env=False, verify=False, headers=headers)
            return answer.status_code
        except httpx.HTTPError:
            return None

    def terminate(self) -> None:
        """Asks it to end and returns at once; `end` waits."""
        if self._guard is not None and self._guard.poll() is None:
            self._guard.terminate()

    def end(self) -> None:
        """Ends it with all processes that it started."""
        if self._guard is None:
            return
        self.terminate()
        with suppress(subprocess.TimeoutExpired):
            self._guard.wait(GRACE_SECONDS + 10)
        # A guard that was killed itself leaves its process group.
        with suppress(ProcessLookupError):
            os.killpg(self._guard.pid, signal.SIGKILL)
        self._guard.wait()

    def last_lines(self, count: int) -> list[str]:
        """The last lines of its log that are not empty."""
        lines = self.log.read_text(errors="replace").splitlines()
        return [line for line in lines if line.strip()][-count:]


POLL_SECONDS = 0.2
# A healthy server is asked this often whether it still answers; each call may take 5 s.
PROBE_SECONDS = 30.0


class Supervisor:
    """Starts server processes, watches them and ends them: a context manager."""

    def __init__(
        self,
        servers: Sequence[ServerProcess],
        settings: LaunchSettings,
        tell: Callable[[str], None],
        alone: bool = False,
    ) -> None:
        """Starts nothing yet.

        Args:
            settings: of the servers; their `crashes`, `start_seconds` and `hang_seconds` count here.
            tell: receives a line about each event.
            alone: this process has no other children, so that it may end whatever a killed guard leaves.
        """
        self._servers = servers
        self._settings = settings
        self._answered_at = [0.0] * len(servers)
        self._probed_at = [0.0] * len(servers)
        self._tell = tell
        self._alone = alone
        self._healthy = [False] * len(servers)
        self._crash_counts = [0] * len(servers)

    def __enter__(self) -> Supervisor:
        if self._alone:
            adopt_orphans()
        for server in self._servers:
            server.start()
        return self

    def __exit__(self, *_: object) -> None:
        for server in self._servers:
            server.terminate()
        for server in self._servers:
            server.end()

    @property
    def healthy(self) -> bool:
        """Whether all were at the last `poll`."""
        return all(self._healthy)

    def poll(self, restarts: bool = True) -> None:
        """Checks each server once and restarts those that crashed or hang.

        Args:
            restarts: otherwise a later poll restarts them.

        Raises:
            UserError: one crashed too often.
        """
        for index, server in enumerate(self._servers):
            if not restarts:
                self._healthy[index] &= server.failure() is None and not self._hangs(index)
            elif (reason := server.failure()) is not None:
                self._on_crash(index, reason)
            elif not self._healthy[index] and server.healthy():
                self._healthy[index] = True
                self._crash_counts[index] = 0
                self._answered_at[index] = self._probed_at[index] = time.monotonic()
                self._tell(f"server {index}  {server.url}  pid {server.pid}  log {server.log}")
            elif not self._healthy[index] and server.age > self._settings.start_seconds:
                self._on_crash(index, f"is not healthy after {self._settings.start_seconds:g} s")
            elif self._healthy[index] and self._hangs(index):
                self._on_crash(index, f"has given no answer for {self._settings.hang_seconds:g} s")
        time.sleep(POLL_SECONDS)

    def _hangs(self, index: int) -> bool:
        """Probes a healthy server if it is time to."""
        now = time.monotonic()
        if now - self._probed_at[index] < min(PROBE_SECONDS, self._settings.hang_seconds / 2):
            return False
        self._probed_at[index] = now
        if self._servers[index].answers():
            self._answered_at[index] = now
        return now - self._answered_at[index] > self._settings.hang_seconds

    def _on_crash(self, index: int, reason: str) -> None:
        server = self._servers[index]
        server.end()
        if self._alone:
            end_descendants(keep=frozenset(other.guard_pid for other in self._servers if other is not server))
        self._healthy[index] = False
        self._crash_counts[index] += 1
        if self._crash_counts[index] >= self._settings.crashes:
            last = " ".join(server.last_lines(1))
            raise UserError(
                f"server {index} {reason}, {self._crash_counts[index]} times without being healthy in "
                f"between; see {server.log}, which ends with: {last}"
            )
        self._tell(f"server {index} {reason}; restarting it")
        server.start()
