"""The jobs that launch.py has submitted, and how they are."""

from __future__ import annotations

import os
import subprocess
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

from megatron_parallel_r1.cluster.attempts import read_attempts
from megatron_parallel_r1.utils.jsonl import JsonlWriter, read_jsonl

FILE = "jobs.jsonl"
UNDER_WAY = ("PENDING", "CONFIGURING", "RUNNING", "COMPLETING", "SUSPENDED", "REQUEUED")


@dataclass(frozen=True, slots=True)
class Entry:
    """
    Attributes:
        what: it runs, in words.
        after: the job that it waits for.
        local: whether it runs on this machine, without SLURM.
    """

    id: str
    name: str
    what: str
    after: str | None
    local: bool


@dataclass(frozen=True, slots=True)
class Status:
    """
    Attributes:
        state: in SLURM's words.
        steps: that were written down.
        reason: why it failed or was never started; empty otherwise.
    """

    entry: Entry
    state: str
    steps: int
    reason: str


def note(logs: Path, entries: Sequence[Entry]) -> None:
    with JsonlWriter(logs / FILE) as file:
        for entry in entries:
            file.write(asdict(entry))


def noted(logs: Path) -> list[Entry]:
    """All that were submitted, the oldest first."""
    return [Entry(**record) for record in read_jsonl(logs / FILE, missing_ok=True)]


def statuses(logs: Path, entries: Sequence[Entry]) -> list[Status]:
    """In the order of the entries. A job that another's failure kept from starting says which."""
    states = slurm_states([entry.id for entry in entries if not entry.local])
    found: dict[str, Status] = {}
    for entry in entries:
        tried = read_attempts(logs / f"{entry.name}-{entry.id}")
        state = (
            local_state(entry, [one.outcome for one in tried])
            if entry.local
            else states.get(entry.id, "UNKNOWN")
        )
        steps = tried[-1].steps if tried else 0
        reason = tried[-1].why if tried and state == "FAILED" else ""
        before = found.get(entry.after or "")
        if before and not tried and before.state not in (*UNDER_WAY, "COMPLETED"):
            root = before.reason if before.state == "CANCELLED" and before.reason else ""
            reason = (
                root or f"{before.entry.name} (job {before.entry.id}), which it waits for, is {before.state}"
            )
        found[entry.id] = Status(entry, state, steps, reason)
    return list(found.values())


def slurm_states(ids: Sequence[str]) -> dict[str, str]:
    """From the controller, and from the accounts, which lag by seconds, for jobs that it has forgotten."""
    if not ids:
        return {}
    asked = ["squeue", "--array", "--states=all", "--noheader", "--format=%i|%T", f"--jobs={','.join(ids)}"]
    states = answered(asked)
    if forgotten := [id for id in ids if id not in states]:
        fields = ["--noheader", "--parsable2", "--format=JobID,State"]
        states |= answered(["sacct", "-X", *fields, f"--jobs={','.join(forgotten)}"])
    return states


def answered(asked: Sequence[str]) -> dict[str, str]:
    """A client of SLURM that prints `id|state` a line; what it knows of no job is not in there."""
    said = subprocess.run(asked, capture_output=True, text=True)
    pairs = (line.split("|") for line in said.stdout.splitlines() if "|" in line)
    return {id: state.split()[0] for id, state in pairs}  # `CANCELLED by 0`


def local_state(entry: Entry, outcomes: Sequence[str]) -> str:
    """A job of this machine by its process, or by how its last attempt ended."""
    if runs(entry):
        return "RUNNING"
    words = {"done": "COMPLETED", "failed": "FAILED"}
    return words.get(outcomes[-1], "CANCELLED") if outcomes else "CANCELLED"


def runs(entry: Entry) -> bool:
    """Whether the process that has a local job's number is still its own."""
    try:
        os.kill(int(entry.id), 0)
        words = subprocess.run(
            ["ps", "-o", "stat=,args=", "-p", entry.id], capture_output=True, text=True
        ).stdout.split(maxsplit=1)
    except (ProcessLookupError, PermissionError):
        return False
    return len(words) == 2 and "submitit.local" in words[1] and not words[0].startswith("Z")
