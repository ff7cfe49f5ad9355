"""The parent of a server: ends every process that the server started, whichever dies first.

    python -m megatron_parallel_r1.rollout.launcher.guard SUPERVISOR_PID COMMAND...

A server starts processes of its own and may be killed before it ends them, and so may the supervisor. This
process outlives both: the kernel signals it when its supervisor dies (PR_SET_PDEATHSIG), and makes it the
parent of processes that a killed server leaves (PR_SET_CHILD_SUBREAPER). Linux only, see `SUPPORTED`; imports
nothing heavy.
"""

from __future__ import annotations

import ctypes
import os
import signal
import subprocess
import sys
from contextlib import suppress
from types import FrameType

import psutil

# <sys/prctl.h>
PR_SET_PDEATHSIG = 1
PR_SET_CHILD_SUBREAPER = 36
# Whether this system can guard servers.
SUPPORTED = hasattr(ctypes.CDLL(None), "prctl")
# For a clean exit; a rollout in flight is lost anyway.
GRACE_SECONDS = 10


class _Terminated(Exception):
    """SIGTERM, sent by the supervisor or at its death."""


def main(supervisor: int, command: list[str]) -> int:
    """Runs the command and returns its exit status, 128 + n for signal n."""
    adopt_orphans()
    signal.signal(signal.SIGTERM, _stop)
    server = None
    try:
        # A trainer under torchrun blocks it, and child processes inherit that.
        signal.pthread_sigmask(signal.SIG_UNBLOCK, {signal.SIGTERM})
        _prctl(PR_SET_PDEATHSIG, signal.SIGTERM)
        if os.getppid() != supervisor:
            return 128 + signal.SIGTERM
        # This process has one thread, so code may run between fork and exec.
        server = subprocess.Popen(command, stdin=subprocess.DEVNULL, preexec_fn=_die_with_parent)
        status = server.wait()
        signal.signal(signal.SIGTERM, signal.SIG_IGN)
        return 128 - status if status < 0 else status
    except _Terminated:
        signal.signal(signal.SIGTERM, signal.SIG_IGN)
        if server is not None:
            server.terminate()
            with suppress(subprocess.TimeoutExpired):
                server.wait(GRACE_SECONDS)
        return 128 + signal.SIGTERM
    finally:
        end_descendants()


def adopt_orphans() -> None:
    """Makes this process the parent of descendants whose own parent has died."""
    _prctl(PR_SET_CHILD_SUBREAPER, 1)


def end_descendants(keep: frozenset[int] = frozenset()) -> None:
    """Kills all descendants of this process except the children in `keep` and their descendants.

    Each round reaps one killed child; orphans become children, so the last round leaves none.
    """
    while children := [child for child in psutil.Process().children() if child.pid not in keep]:
        for child in children:
            for process in [child, *_descendants(child)]:
                with suppress(psutil.NoSuchProcess):
                    process.kill()
        with suppress(ChildProcessError):
            os.waitpid(children[0].pid, 0)


def _descendants(process: psutil.Process) -> list[psutil.Process]:
    try:
        return process.children(recursive=True)
    except psutil.NoSuchProcess:
        return []


def _stop(number: int, frame: FrameType | None) -> None:
    raise _Terminated


def _die_with_parent() -> None:
    _prctl(PR_SET_PDEATHSIG, signal.SIGKILL)


def _prctl(option: int, value: int) -> None:
    libc = ctypes.CDLL(None, use_errno=True)
    if libc.prctl(option, value, 0, 0, 0) != 0:
        raise OSError(ctypes.get_errno(), "prctl")


if __name__ == "__main__":
    sys.exit(main(int(sys.argv[1]), sys.argv[2:]))
