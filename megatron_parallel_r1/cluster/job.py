"""The callables that submitit runs: a `slurm/` script in a SLURM job, or the ranks on this machine."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, NoReturn

from submitit import JobEnvironment
from submitit.core.utils import DelayedSubmission

from megatron_parallel_r1.cluster.attempts import (
    SPEC_FILE,
    JobAttempt,
    begin_attempt,
    end_attempt,
    steps_written,
)
from megatron_parallel_r1.cluster.job_progress import last_error
from megatron_parallel_r1.errors import STOPPED_EXIT_CODE
from megatron_parallel_r1.rollout.launcher.ports import free_port
from megatron_parallel_r1.utils.exit import unblock_stop_signals

if TYPE_CHECKING:
    from megatron_parallel_r1.cluster.job_spec import JobSpec

POLL_S = 0.2
# As in slurm/rank.sh.
RANK_DEFAULTS = {"CUDA_DEVICE_MAX_CONNECTIONS": "1", "PYTORCH_ALLOC_CONF": "expandable_segments:True"}


class JobFailed(RuntimeError):
    """The job failed for good; the message is one line."""


@dataclass(frozen=True)
class ScriptJob:
    """Replaces submitit's process, the batch shell of a SLURM job, by a script of `slurm/`.

    From then on the job is the one that `sbatch` would have started: the script handles signals, requeues
    and failures.

    Attributes:
        script: its path and arguments.
        repository: the working directory.
        settings: values of site.env.
    """

    script: tuple[str, ...]
    repository: Path
    settings: dict[str, str]

    def __call__(self) -> NoReturn:
        unblock_stop_signals()
        for ignored_by_python in (signal.SIGPIPE, signal.SIGXFSZ):
            signal.signal(ignored_by_python, signal.SIG_DFL)  # exec passes ignored signals on
        sys.stdout.flush()
        sys.stderr.flush()
        os.chdir(self.repository)
        environment = {**os.environ, **self.settings, "SLURM_SUBMIT_DIR": str(self.repository)}
        os.execvpe("bash", ["bash", *self.script], environment)


@dataclass
class LocalJob:
    """Runs job specs in sequence on this machine, each over `ranks` processes, until one fails.

    Attributes:
        logs: the parent of the job's log folder.
    """

    specs: Sequence[JobSpec]
    ranks: int
    repository: Path
    logs: Path
    name: str
    _running: LocalRanks | None = field(default=None, init=False)

    def __call__(self) -> None:
        """
        Raises:
            JobFailed: a job spec failed.
        """
        unblock_stop_signals()
        os.chdir(self.repository)
        self._folder.mkdir(parents=True, exist_ok=True)
        folders = sorted({str(folder.resolve()) for spec in self.specs for folder in spec.folders})
        (self._folder / SPEC_FILE).write_text(json.dumps({"folders": folders}) + "\n")
        begin_attempt(self._folder, self._steps())
        for spec in self.specs:
            self._running = LocalRanks((spec.kind, *spec.arguments), self.ranks)
            try:
                code = self._running.wait()
            finally:
                self._running.kill()
            if code == STOPPED_EXIT_CODE:
                end_attempt(self._folder, JobAttempt("stopped", steps=self._steps()))
                sys.exit(STOPPED_EXIT_CODE)
            if code:
                run = f"{spec.recipe.name}: " if spec.recipe else ""
                why = f"{run}{spec.stage or spec.kind} ended with exit code {code}"
                job = JobEnvironment().job_id
                if error := last_error(self.logs / f"submitit/{job}/{job}_0_log.out"):
                    why += f": {error}"
                end_attempt(self._folder, JobAttempt("failed", why, self._steps()))
                raise JobFailed(why)
        end_attempt(self._folder, JobAttempt("done", steps=self._steps()))

    def checkpoint(self) -> DelayedSubmission:
        """Called by submitit before its time limit. Finished stages are skipped in the next attempt."""
        assert self._running, "submitit calls this during __call__"
        self._running.request_stop()
        self._running.wait()
        end_attempt(self._folder, JobAttempt("stopped", steps=self._steps()))
        return DelayedSubmission(LocalJob(self.specs, self.ranks, self.repository, self.logs, self.name))

    @property
    def _folder(self) -> Path:
        return self.logs / f"{self.name}-{JobEnvironment().job_id}"

    def _steps(self) -> int:
        return steps_written({folder for spec in self.specs for folder in spec.folders})


class LocalRanks:
    """One process per rank, with torch's rendezvous variables set; the first failure ends all of them."""

    def __init__(self, arguments: Sequence[str], count: int) -> None:
        """
        Args:
            arguments: of `parallel-r1`.
        """
        world = {"WORLD_SIZE": str(count), "LOCAL_WORLD_SIZE": str(count), "MASTER_ADDR": "127.0.0.1"}
        world |= {"MASTER_PORT": str(free_port())}
        self._processes = [
            subprocess.Popen(
                [sys.executable, "-m", "megatron_parallel_r1.cli", *arguments],
                env={**RANK_DEFAULTS, **os.environ, **world, "RANK": str(rank), "LOCAL_RANK": str(rank)},
            )
            for rank in range(count)
        ]

    def wait(self) -> int:
        """Waits for all ranks; returns the exit code of the first that failed, else 0."""
        while True:
            codes = [exit_code(process) for process in self._processes]
            if failed := [code for code in codes if code]:
                self.kill()
                return failed[0]
            if all(code == 0 for code in codes):
                return 0
            time.sleep(POLL_S)

    def request_stop(self) -> None:
        for process in self._processes:
            process.send_signal(signal.SIGUSR1)

    def kill(self) -> None:
        for process in self._processes:
            process.kill()
        for process in self._processes:
            process.wait()


def exit_code(child: subprocess.Popen[bytes]) -> int | None:
    """Like `Popen.poll`, but reaps nothing, so a signal handler may call it whatever it interrupted."""
    if child.returncode is not None:  # already reaped, e.g. by `send_signal`
        return child.returncode
    if not hasattr(os, "waitid"):  # macOS before Python 3.13
        return child.poll()
    status = os.waitid(os.P_PID, child.pid, os.WEXITED | os.WNOHANG | os.WNOWAIT)
    if status is None:
        return None
    return status.si_status if status.si_code == os.CLD_EXITED else -status.si_status
