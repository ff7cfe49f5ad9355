"""A handle on one verification process: starts it, sends it a pair, reads its reply, ends it.

A separate program over two pipes, not `multiprocessing`, which would import the caller's main module in the
child, with torch and Megatron; the child needs only sympy.
"""

from __future__ import annotations

import json
import math
import os
import subprocess
import sys
from multiprocessing.connection import wait
from pathlib import Path

import psutil

START_LIMIT_S = 120.0
"""Importing sympy takes half a second, on a busy file system much longer."""


class VerifierWorker:
    """One process, started by the first pair and by the first pair after a `stop`.

    Args:
        limit_s: the caller's limit of processor time per pair, in seconds; the process ends itself at twice
            that.
        memory_bytes: the limit of its address space.
    """

    def __init__(self, limit_s: float, memory_bytes: int) -> None:
        self._settings = (str(2 * limit_s), str(memory_bytes))
        self._process: subprocess.Popen[bytes] | None = None
        self._ready = False
        self._owner = os.getpid()

    @property
    def pid(self) -> int | None:
        """The process id, None if no process runs."""
        return self._process.pid if self._process else None

    def cpu_s(self) -> float:
        """Returns the processor time that the process has used, in seconds; infinite if it is gone."""
        assert self._process, "the worker runs"
        try:
            spent = psutil.Process(self._process.pid).cpu_times()
        except psutil.NoSuchProcess:
            return math.inf
        return spent.user + spent.system

    def fileno(self) -> int:
        """Returns the descriptor that is readable after a reply or the death of the process."""
        assert self._process and self._process.stdout, "the worker runs"
        return self._process.stdout.fileno()

    def launch(self) -> None:
        """Starts the process unless it runs, without waiting for it."""
        if self._process:
            return
        root = str(Path(__file__).resolve().parents[2])
        paths = [root, *filter(None, [os.environ.get("PYTHONPATH")])]
        self._ready = False
        self._process = subprocess.Popen(
            [sys.executable, "-m", "megatron_parallel_r1.rewards.verifier_process", *self._settings],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            bufsize=0,
            env={**os.environ, "PYTHONPATH": os.pathsep.join(paths)},
            start_new_session=True,  # Ctrl-C is the parent's to handle
        )

    def send(self, answer: str, reference: str) -> None:
        """Sends one pair, to a new process if none runs or the idle one has died.

        JSON escapes lone surrogates, so they survive.

        Raises:
            RuntimeError: a new process ends at once (its stderr says why) or is not ready in time.
        """
        line = json.dumps([answer, reference]).encode() + b"\n"
        try:
            self._write(line)
        except BrokenPipeError:
            self.stop()
            self._write(line)

    def receive(self) -> bytes:
        """Reads `1` or `0`, or nothing if the process has died."""
        return os.read(self.fileno(), 1)

    def stop(self) -> None:
        """Kills the process and waits for its end; does nothing in a forked child, which does not own it."""
        process, self._process = self._process, None
        if process is None or self._owner != os.getpid():
            return
        process.kill()
        process.wait()
        for pipe in (process.stdin, process.stdout):
            if pipe:
                pipe.close()

    def _write(self, line: bytes) -> None:
        self.launch()
        assert self._process and self._process.stdin
        if not self._ready:
            replied = wait([self.fileno()], START_LIMIT_S)
            self._ready = bool(replied) and self.receive() == b"r"
            if not self._ready:
                self.stop()
                what = "cannot start" if replied else f"is not ready after {START_LIMIT_S:.0f} s"
                raise RuntimeError(f"the verification worker {what}")
        self._process.stdin.write(line)
