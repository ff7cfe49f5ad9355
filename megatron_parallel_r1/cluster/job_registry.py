"""The registry of submitted jobs (`jobs.jsonl` in the log folder), their states, and their cancellation."""

from __future__ import annotations

import os
import subprocess
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import asdict, dataclass
from pathlib import Path

import psutil

from megatron_parallel_r1.cluster.attempts import read_attempts, steps_written
from megatron_parallel_r1.cluster.job_progress import job_progress, run_folders
from megatron_parallel_r1.errors import UserError
from megatron_parallel_r1.utils.jsonl import JsonlWriter, read_jsonl

FILE = "jobs.jsonl"
ACTIVE_STATES = ("PENDING", "CONFIGURING", "RUNNING", "COMPLETING", "SUSPENDED", "REQUEUED")


@dataclass(frozen=True, slots=True)
class RegisteredJob:
    """
    Attributes:
        what: the command that the job runs.
        after: the ids of the jobs that it depends on.
        local: runs on this machine, without SLURM; the id is a process id.
    """

    id: str
    name: str
    what: str
    after: tuple[str, ...]
    local: bool


@dataclass(frozen=True, slots=True)
class JobStatus:
    """
    Attributes:
        state: SLURM's name of the state.
        steps: training steps on disk.
        progress: the stage, step and tokens per second of the last step; empty before the first.
        reason: why the job failed last, or what it waits for; else empty.
    """

    job: RegisteredJob
    state: str
    steps: int
    progress: str
    reason: str


def register_jobs(logs: Path, jobs: Sequence[RegisteredJob]) -> None:
    with JsonlWriter(logs / FILE) as file:
        for job in jobs:
            file.write(asdict(job))


def registered_jobs(logs: Path) -> list[RegisteredJob]:
    """All submitted jobs, oldest first."""
    return [
        RegisteredJob(**record | {"after": tuple(record["after"] or ())})
        for record in read_jsonl(logs / FILE, missing_ok=True)
    ]


def select_jobs(jobs: Sequence[RegisteredJob], ids: Sequence[str] | None) -> list[RegisteredJob]:
    """The jobs with the given ids; all if none are given.

    Raises:
        UserError: no job has one of the ids.
    """
    by_id = {job.id: job for job in jobs}
    if unknown := [id for id in ids or () if id not in by_id]:
        raise UserError(f"unknown job {unknown[0]}; choose from: {', '.join(by_id) or 'there are no jobs'}")
    return [by_id[id] for id in ids] if ids else list(by_id.values())


def job_statuses(logs: Path, jobs: Sequence[RegisteredJob]) -> list[JobStatus]:
    """In the order of the jobs. One that waits for another, or never started as that failed, names it."""
    slurm = slurm_states([job.id for job in jobs if not job.local])
    statuses: dict[str, JobStatus] = {}
    for job in jobs:
        attempts, waits = read_attempts(logs / f"{job.name}-{job.id}"), ""
        if job.local:
            state = local_state(job, [attempt.outcome for attempt in attempts])
        else:
            state, waits = slurm.get(job.id, ("UNKNOWN", ""))
        is_active, is_done = state in ACTIVE_STATES, state == "COMPLETED"
        folders = [] if is_done else run_folders(logs / f"{job.name}-{job.id}")
        steps = steps_written(folders) if is_active else attempts[-1].steps if attempts else 0
        failed = [attempt.why for attempt in attempts if attempt.outcome == "failed"]
        reason = failed[-1] if failed and not is_done else ""
        if reason and is_active:
            reason = f"last failure: {reason}"
        before = [statuses[id] for id in job.after if id in statuses]
        if state == "PENDING":
            awaited = [f"{s.job.name} (job {s.job.id}, {s.state})" for s in before if s.state != "COMPLETED"]
            pending = f"waits for {', '.join(awaited)}" if awaited else f"pending: {waits}"
            reason = "; ".join(filter(None, (pending, reason)))
        lost = [status for status in before if status.state not in (*ACTIVE_STATES, "COMPLETED")]
        if lost and not attempts:
            name, id = lost[0].job.name, lost[0].job.id
            reason = lost[0].reason if lost[0].state == "CANCELLED" else ""
            reason = reason or f"depends on {name} (job {id}), which is {lost[0].state}"
        statuses[job.id] = JobStatus(job, state, steps, job_progress(folders), reason)
    return list(statuses.values())


def slurm_states(ids: Sequence[str]) -> dict[str, tuple[str, str]]:
    """States and their reasons by id, from the controller, else from accounting.

    Accounting keeps old jobs, but lags by seconds and has no reasons.
    """
    if not ids:
        return {}
    options = ["--array", "--states=all", "--noheader", "--format=%i|%T|%r"]
    states = query_states(["squeue", *options, f"--jobs={','.join(ids)}"])
    if forgotten := [id for id in ids if id not in states]:
        options = ["-X", "--noheader", "--parsable2", "--format=JobID,State"]
        states |= query_states(["sacct", *options, f"--jobs={','.join(forgotten)}"])
    return states


def query_states(command: Sequence[str]) -> dict[str, tuple[str, str]]:
    """Runs a SLURM client that prints lines `id|state|reason` or `id|state`; unknown jobs are absent."""
    output = subprocess.run(command, capture_output=True, text=True).stdout
    lines = (line.split("|", 2) for line in output.splitlines() if "|" in line)
    # `CANCELLED by 0`
    return {id: (state.split()[0], reason[0] if reason else "") for id, state, *reason in lines}


def local_state(job: RegisteredJob, outcomes: Sequence[str]) -> str:
    """State of a job on this machine: from its process, else from the outcome of its last attempt."""
    if is_running(job):
        return "RUNNING"
    states = {"done": "COMPLETED", "failed": "FAILED"}
    return states.get(outcomes[-1], "CANCELLED") if outcomes else "CANCELLED"


def is_running(job: RegisteredJob) -> bool:
    """Returns whether the process with a local job's id exists and is still that job's."""
    try:
        os.kill(int(job.id), 0)
        fields = subprocess.run(
            ["ps", "-o", "stat=,args=", "-p", job.id], capture_output=True, text=True
        ).stdout.split(maxsplit=1)
    except (ProcessLookupError, PermissionError):
        return False
    return len(fields) == 2 and "submitit.local" in fields[1] and not fields[0].startswith("Z")


def cancel_job(job: RegisteredJob) -> None:
    """Ends a job; a local one by killing its process tree. A run resumes from its last checkpoint."""
    if not job.local:
        subprocess.run(["scancel", job.id], check=True)
        return
    root = psutil.Process(int(job.id))
    for process in [*root.children(recursive=True), root]:
        with suppress(psutil.NoSuchProcess):
            process.kill()
