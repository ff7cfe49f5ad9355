"""Hands jobs to submitit: to SLURM where there is one, to this machine otherwise."""

from __future__ import annotations

import os
import shlex
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from submitit import LocalExecutor, SlurmExecutor

from megatron_parallel_r1.cluster.job import LocalJob, ScriptJob
from megatron_parallel_r1.cluster.job_spec import Order
from megatron_parallel_r1.cluster.servers import check_served
from megatron_parallel_r1.cluster.site import SCRIPTS, Header, check_site, minutes_of, read_header, read_site
from megatron_parallel_r1.distributed.parallel_config import check_world
from megatron_parallel_r1.errors import UserError

# Time limits and preemptions; what makes no progress ends by MAX_FAILURES.
REQUEUES = 1000
LOCAL_SIGNAL_S = 120


@dataclass(frozen=True, slots=True)
class Wish:
    """What a command line says of a job; None: what the #SBATCH lines of its script say.

    Attributes:
        time: in one of SLURM's forms.
    """

    nodes: int | None = None
    ranks: int | None = None
    gpus: int | None = None
    cpus: int | None = None
    time: str | None = None
    partition: str | None = None
    account: str | None = None


class Launcher:
    """Submits orders from a repository's `slurm` folder.

    Args:
        local: run on this machine though it has SLURM's commands.
    """

    def __init__(self, repository: Path, wish: Wish, local: bool) -> None:
        self._repository, self._wish, self._local = repository, wish, local
        self._site = read_site(repository / "slurm")
        self.logs = repository / self._site["LOG_DIR"]
        self._settings = self._site | {"LOG_DIR": str(self.logs)}

    def describe(self, orders: Sequence[Order], name: str, after: str | None = None) -> str:
        """The job, exactly as `submit` would hand it over; as an array if there are several orders."""
        if self._local:
            ranks, minutes = self._local_size()
            row = ", one after the other" if len(orders) > 1 else ""
            lines = [f"on this machine, {ranks} processes, {minutes} minutes{row}:"]
            return "\n".join(
                [*lines, *(f"parallel-r1 {order.kind} {shlex.join(order.words)}" for order in orders)]
            )
        executor = self._slurm(orders[0].kind, name, after)
        if len(orders) > 1:
            executor.parameters["map_count"] = len(orders)
        text = executor._make_submission_file_text(executor._submitit_command_str, "")
        return "\n".join([text, *(f"# which runs: bash {shlex.join(script_of(one))}" for one in orders)])

    def check(self, orders: Sequence[Order], name: str) -> None:
        """
        Raises:
            UserError: SLURM would not take the job, or an order could not run in it.
        """
        if self._local:
            for order in orders:
                check_world(order.recipe.parallel, self._local_size()[0])
            return
        kind = orders[0].kind
        site = self._site if kind == "rl" else self._site | {"ROLLOUT_NODES": "0"}
        header = self._header(kind)
        check_site(site, header)
        servers = int(site["ROLLOUT_NODES"])
        for order in orders:
            check_world(order.recipe.parallel, (header.nodes - servers) * header.ranks_per_node)
            if servers:
                check_served(order, site["ROLLOUT_ENGINE"])
        with tempfile.NamedTemporaryFile("w", suffix=".sh") as file:
            file.write(self.describe(orders, name))
            file.flush()
            asked = subprocess.run(["sbatch", "--test-only", file.name], capture_output=True, text=True)
        if asked.returncode:
            why = " ".join(asked.stderr.split())
            raise UserError(f"SLURM refuses the job: {why}; --local runs it on this machine")

    def submit(self, orders: Sequence[Order], name: str, after: str | None = None) -> list[str]:
        """The ids of the jobs, one an order; on this machine, whose GPUs they share, one for all in a row.

        Args:
            after: a job that must have succeeded before; if it does not, these are never started.
        """
        if self._local:
            return [self._submit_local(orders, name)]
        executor = self._slurm(orders[0].kind, name, after)
        jobs = executor.submit_array(
            [ScriptJob(script_of(order), self._repository, self._settings) for order in orders]
        )
        return [str(job.job_id) for job in jobs]

    def _submit_local(self, orders: Sequence[Order], name: str) -> str:
        ranks, minutes = self._local_size()
        executor = LocalExecutor(self.logs / "submitit/%j", max_num_timeout=REQUEUES)
        executor.update_parameters(
            timeout_min=minutes,
            tasks_per_node=1,
            gpus_per_node=ranks if shutil.which("nvidia-smi") else 0,
            signal_delay_s=min(LOCAL_SIGNAL_S, 30 * minutes),
            stderr_to_stdout=True,
        )
        job = LocalJob(tuple(orders), ranks, self._repository, self.logs, name)
        with output_to(self.logs / "submitit/controllers.log"):
            return str(executor.submit(job).job_id)

    def _local_size(self) -> tuple[int, int]:
        if (self._wish.nodes or 1) > 1:
            raise UserError(f"--nodes {self._wish.nodes}: this machine is one node; it has no sbatch")
        return self._wish.ranks or 1, wished_minutes(self._wish.time or "7-0")

    def _slurm(self, kind: str, name: str, after: str | None) -> SlurmExecutor:
        header = self._header(kind)
        more: dict[str, Any] = header.more | {
            "signal": f"B:USR2@{header.signal_s}",
            "requeue": True,
            "kill-on-invalid-dep": "yes",
        }
        for key, value in (("partition", self._wish.partition), ("account", self._wish.account)):
            if value:
                more[key] = value
        if header.gpus_per_node:
            more["gpus-per-node"] = f"{header.gpu_type}{header.gpus_per_node}"
        # The batch shell becomes submitit's process, so that the signal reaches it.
        executor = SlurmExecutor(
            self.logs / "submitit/%j", max_num_timeout=REQUEUES, python=f"exec {shlex.quote(sys.executable)}"
        )
        executor.update_parameters(
            job_name=name,
            nodes=header.nodes,
            ntasks_per_node=header.ranks_per_node,
            cpus_per_task=header.cpus_per_rank,
            time=header.minutes,
            use_srun=False,
            stderr_to_stdout=True,
            additional_parameters=more | ({"dependency": f"afterok:{after}"} if after else {}),
        )
        return executor

    def _header(self, kind: str) -> Header:
        told, wish = read_header(self._repository / "slurm" / SCRIPTS[kind]), self._wish
        return replace(
            told,
            nodes=told.nodes if wish.nodes is None else wish.nodes,
            ranks_per_node=told.ranks_per_node if wish.ranks is None else wish.ranks,
            gpus_per_node=told.gpus_per_node if wish.gpus is None else wish.gpus,
            cpus_per_rank=told.cpus_per_rank if wish.cpus is None else wish.cpus,
            minutes=told.minutes if wish.time is None else wished_minutes(wish.time),
        )


@contextmanager
def output_to(file: Path) -> Iterator[None]:
    """Processes that are started meanwhile write there: submitit's outlive this one, and its reader."""
    kept = os.dup(1), os.dup(2)
    with file.open("ab") as log:
        os.dup2(log.fileno(), 1)
        os.dup2(log.fileno(), 2)
    try:
        yield
    finally:
        os.dup2(kept[0], 1)
        os.dup2(kept[1], 2)
        for descriptor in kept:
            os.close(descriptor)


def wished_minutes(time: str) -> int:
    """
    Raises:
        UserError: it is no time as SLURM writes it.
    """
    try:
        return minutes_of(time)
    except ValueError:
        raise UserError(f"--time {time}: write minutes, H:M:S or D-H, such as 90 or 24:00:00") from None


def script_of(order: Order) -> tuple[str, ...]:
    """The script that a user would give to sbatch, and its words."""
    return (f"slurm/{SCRIPTS[order.kind]}", *order.words)
