"""The ranks of a run on this machine alone, where no SLURM starts them."""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Sequence

POLL_S = 0.2


class LocalRanks:
    """As many processes as ranks, each with its place in the environment; one failure ends them all."""

    def __init__(self, words: Sequence[str], count: int) -> None:
        """
        Args:
            words: of the command line of `parallel-r1`.
        """
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            port = free.getsockname()[1]
        world = {"WORLD_SIZE": str(count), "LOCAL_WORLD_SIZE": str(count), "MASTER_ADDR": "127.0.0.1"}
        world |= {"MASTER_PORT": str(port)}
        self._processes = [
            subprocess.Popen(
                [sys.executable, "-m", "megatron_parallel_r1.cli", *words],
                env={**os.environ, **world, "RANK": str(rank), "LOCAL_RANK": str(rank)},
            )
            for rank in range(count)
        ]

    def wait(self) -> int:
        """Waits for all; the exit code of the first that failed, 0 if none did."""
        while True:
            codes = [exit_code(process) for process in self._processes]
            if failed := [code for code in codes if code]:
                self.kill()
                return failed[0]
            if all(code == 0 for code in codes):
                return 0
            time.sleep(POLL_S)

    def ask_to_stop(self) -> None:
        for process in self._processes:
            process.send_signal(signal.SIGUSR1)

    def kill(self) -> None:
        for process in self._processes:
            process.kill()
        for process in self._processes:
            process.wait()


def exit_code(child: subprocess.Popen[bytes]) -> int | None:
    """As `Popen.poll`, but a signal handler may call it too, whatever it interrupted: it reaps nothing."""
    if child.returncode is not None:  # its end was met before, as by `send_signal`
        return child.returncode
    ended = os.waitid(os.P_PID, child.pid, os.WEXITED | os.WNOHANG | os.WNOWAIT)
    if ended is None:
        return None
    return ended.si_status if ended.si_code == os.CLD_EXITED else -ended.si_status
