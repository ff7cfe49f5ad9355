"""What submitit runs: a script of `slurm/` within a SLURM job, or the ranks themselves on a machine without.

Of a SLURM job, submitit's process is the batch shell alone (no srun). The script starts servers and ranks as
it does under sbatch; so both ways share containers, logs, and what becomes of a failure.
"""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING

from submitit import JobEnvironment
from submitit.core.utils import DelayedSubmission

from megatron_parallel_r1.cluster import attempts
from megatron_parallel_r1.cluster.attempts import Attempt, steps_written
from megatron_parallel_r1.cluster.local_ranks import POLL_S, LocalRanks, exit_code
from megatron_parallel_r1.distributed.stop_signals import unblock_stop_signals
from megatron_parallel_r1.errors import LOST_EXIT_CODE, STOPPED_EXIT_CODE

if TYPE_CHECKING:
    from megatron_parallel_r1.cluster.job_spec import Order

REQUEUE_S = 120.0  # for the controller to end a job that was requeued


class JobFailed(RuntimeError):
    """It has failed for good; the message says why in a line."""


@dataclass
class ScriptJob:
    """A script of `slurm/` in the allocation of this job; Checkpointable in submitit's sense.

    Attributes:
        script: with its words.
        repository: from which it runs.
        settings: those of site.env.
    """

    script: tuple[str, ...]
    repository: Path
    settings: dict[str, str]
    _running: subprocess.Popen[bytes] | None = field(default=None, init=False)

    def __call__(self) -> None:
        """
        Raises:
            JobFailed: the script says why in its log.
        """
        unblock_stop_signals()
        environment = {**os.environ, **self.settings, "SLURM_SUBMIT_DIR": str(self.repository)}
        # submitit lets SIGTERM pass, which a cancelled job gets; what it starts shall end of it.
        self._running = subprocess.Popen(["bash", *self.script], cwd=self.repository, env=environment)
        while (code := exit_code(self._running)) is None:
            time.sleep(POLL_S)
        if code == STOPPED_EXIT_CODE:
            # Its steps were asked without this process, as `scancel --signal` may; nobody else requeues it.
            subprocess.run(["scontrol", "requeue", os.environ["SLURM_JOB_ID"]], check=True)
        if code in (LOST_EXIT_CODE, STOPPED_EXIT_CODE):
            time.sleep(REQUEUE_S)
        if code:
            raise JobFailed(f"{self.script[0]} ended with exit code {code}")

    def checkpoint(self) -> DelayedSubmission:
        """Called by submitit's handler of the signal before the time limit; the script has the ranks save."""
        assert self._running, "submitit calls it within __call__"
        self._running.send_signal(signal.SIGUSR1)
        give_up = time.monotonic() + float(self.settings["GRACE_S"])
        while exit_code(self._running) is None and time.monotonic() < give_up:
            time.sleep(POLL_S)
        return DelayedSubmission(ScriptJob(self.script, self.repository, self.settings))


@dataclass
class LocalJob:
    """Orders one after the other on this machine, each over `ranks` processes; a failure ends the row.

    Attributes:
        logs: where a job has a folder of its own, as those of the scripts do.
    """

    orders: Sequence[Order]
    ranks: int
    repository: Path
    logs: Path
    name: str
    _running: LocalRanks | None = field(default=None, init=False)

    def __call__(self) -> None:
        """
        Raises:
            JobFailed: an order did.
        """
        unblock_stop_signals()
        os.chdir(self.repository)
        self._folder.mkdir(parents=True, exist_ok=True)
        attempts.begin(self._folder, self._steps())
        for order in self.orders:
            self._running = LocalRanks((order.kind, *order.words), self.ranks)
            try:
                code = self._running.wait()
            finally:
                self._running.kill()
            if code == STOPPED_EXIT_CODE:
                attempts.end(self._folder, Attempt("stopped", steps=self._steps()))
                sys.exit(STOPPED_EXIT_CODE)
            if code:
                why = f"{order.recipe.name}: {order.stage or order.kind} ended with exit code {code}"
                attempts.end(self._folder, Attempt("failed", why, self._steps()))
                raise JobFailed(why)
        attempts.end(self._folder, Attempt("done", steps=self._steps()))

    def checkpoint(self) -> DelayedSubmission:
        """Called by submitit before its time limit; what is done is passed over when it runs again."""
        assert self._running, "submitit calls it within __call__"
        self._running.ask_to_stop()
        self._running.wait()
        attempts.end(self._folder, Attempt("stopped", steps=self._steps()))
        return DelayedSubmission(LocalJob(self.orders, self.ranks, self.repository, self.logs, self.name))

    @property
    def _folder(self) -> Path:
        return self.logs / f"{self.name}-{JobEnvironment().job_id}"

    def _steps(self) -> int:
        return steps_written({folder for order in self.orders for folder in order.folders})
