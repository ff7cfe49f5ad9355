"""Submits job specs through submitit: to SLURM, or to this machine where there is no SLURM."""

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
from megatron_parallel_r1.cluster.job_spec import SAMPLING_KINDS, JobSpec, check_servers_fit
from megatron_parallel_r1.cluster.limits import check_limit, slow_step_note
from megatron_parallel_r1.cluster.site import (
    SCRIPTS,
    SbatchHeader,
    check_site,
    parse_minutes,
    read_header,
    read_site,
)
from megatron_parallel_r1.distributed.parallel_config import check_world
from megatron_parallel_r1.errors import UserError
from megatron_parallel_r1.rollout.launcher.run import visible_gpus

# Time limits of a local job; crash loops end by themselves.
LOCAL_REQUEUES = 1000
LOCAL_SIGNAL_S = 120


@dataclass(frozen=True, slots=True)
class ResourceRequest:
    """Resources given on a command line; None takes the value of the script's #SBATCH lines.

    Attributes:
        ranks: processes per node.
        gpus: GPUs per node.
        cpus: CPUs per process.
        time: time limit in one of SLURM's forms.
    """

    nodes: int | None = None
    ranks: int | None = None
    gpus: int | None = None
    cpus: int | None = None
    time: str | None = None
    partition: str | None = None
    account: str | None = None


class JobLauncher:
    """Validates, describes and submits job specs, with the settings of a repository's `slurm` folder.

    Args:
        local: run on this machine even if it has SLURM's commands.
    """

    def __init__(self, repository: Path, request: ResourceRequest, local: bool) -> None:
        self._repository, self._request, self._local = repository, request, local
        self._site = read_site(repository / "slurm")
        self.logs = repository / self._site["LOG_DIR"]
        self._settings = self._site | {"LOG_DIR": str(self.logs)}

    def describe(self, specs: Sequence[JobSpec], name: str, after: Sequence[str] = ()) -> str:
        """The job exactly as `submit` would submit it; several specs form an array."""
        if self._local:
            ranks, minutes = self._local_size()
            order = ", in sequence" if len(specs) > 1 else ""
            lines = [f"on this machine, {ranks} processes, {minutes} minutes{order}:"]
            lines += [f"parallel-r1 {spec.kind} {shlex.join(spec.arguments)}" for spec in specs]
            return "\n".join(lines)
        executor = self._slurm_executor(specs[0].kind, name, after)
        if len(specs) > 1:
            executor.parameters["map_count"] = len(specs)
        text = executor._make_submission_file_text(executor._submitit_command_str, "")
        return "\n".join([text, *(f"# runs: bash {shlex.join(script_of(spec))}" for spec in specs)])

    def check(self, specs: Sequence[JobSpec], name: str) -> list[str]:
        """Returns notes on what would run, but badly.

        Raises:
            UserError: SLURM would reject the job, or a spec could not run in it.
        """
        if self._local:
            ranks, _ = self._local_size()
            for spec in specs:
                if spec.recipe is None:
                    continue
                check_world(spec.recipe.parallel, ranks)
                if gpus := visible_gpus():
                    spec.recipe.rollout.check_gpus(ranks, len(gpus))
            return []
        kind = specs[0].kind
        site = self._site if kind in SAMPLING_KINDS else self._site | {"ROLLOUT_NODES": "0"}
        header = self._header(kind)
        check_site(site, header)
        check_limit(60 * header.minutes, header.signal_s)
        server_nodes = int(site["ROLLOUT_NODES"])
        ranks = (header.nodes - server_nodes) * header.ranks_per_node
        for spec in specs:
            if spec.recipe is None:
                continue
            check_world(spec.recipe.parallel, ranks)
            if server_nodes:
                check_servers_fit(spec, site["ROLLOUT_ENGINE"])
            if header.gpus_per_node:
                spec.recipe.rollout.check_gpus(header.ranks_per_node, header.gpus_per_node)
        with tempfile.NamedTemporaryFile("w", suffix=".sh") as file:
            file.write(self.describe(specs, name))
            file.flush()
            sbatch = subprocess.run(["sbatch", "--test-only", file.name], capture_output=True, text=True)
        if sbatch.returncode:
            why = " ".join(sbatch.stderr.split())
            raise UserError(f"SLURM rejects the job: {why}; --local runs it on this machine")
        has_gpus = header.gpus_per_node > 0
        notes = (slow_step_note(spec, ranks, has_gpus, header.signal_s) for spec in specs)
        return [note for note in notes if note]

    def submit(self, specs: Sequence[JobSpec], name: str, after: Sequence[str] = ()) -> list[str]:
        """Returns the job ids: one per spec on SLURM; one for all on this machine, whose GPUs they share.

        Args:
            after: ids of the jobs that must succeed first; if one fails, SLURM cancels these jobs.
        """
        if self._local:
            return [self._submit_local(specs, name)]
        executor = self._slurm_executor(specs[0].kind, name, after)
        jobs = executor.submit_array(
            [ScriptJob(script_of(spec), self._repository, self._settings) for spec in specs]
        )
        return [str(job.job_id) for job in jobs]

    def _submit_local(self, specs: Sequence[JobSpec], name: str) -> str:
        ranks, minutes = self._local_size()
        needed = [spec.recipe.rollout.needed_gpus(ranks) if spec.recipe else ranks for spec in specs]
        executor = LocalExecutor(self.logs / "submitit/%j", max_num_timeout=LOCAL_REQUEUES)
        executor.update_parameters(
            timeout_min=minutes,
            tasks_per_node=1,
            gpus_per_node=max(needed) if shutil.which("nvidia-smi") else 0,
            signal_delay_s=min(LOCAL_SIGNAL_S, 30 * minutes),
            stderr_to_stdout=True,
        )
        job = LocalJob(tuple(specs), ranks, self._repository, self.logs, name)
        with redirect_output(self.logs / "submitit/controllers.log"):
            return str(executor.submit(job).job_id)

    def _local_size(self) -> tuple[int, int]:
        """Ranks and minutes of a local job."""
        if (self._request.nodes or 1) > 1:
            raise UserError(f"--nodes {self._request.nodes}: a local job has one node; submit it to SLURM")
        return self._request.ranks or 1, requested_minutes(self._request.time or "7-0")

    def _slurm_executor(self, kind: str, name: str, after: Sequence[str]) -> SlurmExecutor:
        header = self._header(kind)
        options: dict[str, Any] = header.more | {
            "signal": f"B:USR2@{header.signal_s}",
            "kill-on-invalid-dep": "yes",
        }
        if "no-requeue" not in options:
            options["requeue"] = True
        for key, value in (("partition", self._request.partition), ("account", self._request.account)):
            if value:
                options[key] = value
        if header.gpus_per_node:
            options["gpus-per-node"] = f"{header.gpu_type}{header.gpus_per_node}"
        if after:
            options["dependency"] = f"afterok:{':'.join(after)}"
        # exec: signals go to the batch shell, which becomes submitit's process and then the script.
        executor = SlurmExecutor(self.logs / "submitit/%j", python=f"exec {shlex.quote(sys.executable)}")
        executor.update_parameters(
            job_name=name,
            nodes=header.nodes,
            ntasks_per_node=header.ranks_per_node,
            cpus_per_task=header.cpus_per_rank,
            time=header.minutes,
            use_srun=False,
            stderr_to_stdout=True,
            additional_parameters=options,
        )
        return executor

    def _header(self, kind: str) -> SbatchHeader:
        header, request = read_header(self._repository / "slurm" / SCRIPTS[kind]), self._request
        return replace(
            header,
            nodes=header.nodes if request.nodes is None else request.nodes,
            ranks_per_node=header.ranks_per_node if request.ranks is None else request.ranks,
            gpus_per_node=header.gpus_per_node if request.gpus is None else request.gpus,
            cpus_per_rank=header.cpus_per_rank if request.cpus is None else request.cpus,
            minutes=header.minutes if request.time is None else requested_minutes(request.time),
        )


@contextmanager
def redirect_output(file: Path) -> Iterator[None]:
    """Redirects the output of processes started within: submitit's outlive this process and its terminal."""
    saved = os.dup(1), os.dup(2)
    with file.open("ab") as log:
        os.dup2(log.fileno(), 1)
        os.dup2(log.fileno(), 2)
    try:
        yield
    finally:
        os.dup2(saved[0], 1)
        os.dup2(saved[1], 2)
        for descriptor in saved:
            os.close(descriptor)


def requested_minutes(time: str) -> int:
    """
    Raises:
        UserError: not one of SLURM's time formats.
    """
    try:
        return parse_minutes(time)
    except ValueError:
        raise UserError(f"--time {time}: write minutes, H:M:S or D-H, such as 90 or 24:00:00") from None


def script_of(spec: JobSpec) -> tuple[str, ...]:
    """The script that a user would pass to sbatch, with its arguments."""
    return (f"slurm/{SCRIPTS[spec.kind]}", *spec.arguments)
