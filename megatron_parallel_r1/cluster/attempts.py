"""Attempts of a job: how each one ended, which rank failed first, and when failures form a crash loop."""

from __future__ import annotations

import json
import re
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Literal

from megatron_parallel_r1.evaluation.output import RECORDS
from megatron_parallel_r1.utils.files import write_atomically

AttemptOutcome = Literal["running", "done", "stopped", "failed"]
FILE = "attempts.json"
SPEC_FILE = "job.json"
# Nodes that a requeued job leaves out, comma-separated; slurm/common.sh reads it.
BAD_NODES_FILE = "bad_nodes"
# In an attempt's log folder: why slurm/common.sh was stopped, if that was no failure.
STOP_REASON = "stopped"
LAST_LINES = 15
# srun reports failed tasks in the order of their ends; those killed by --kill-on-bad-exit follow the first.
_TASK = re.compile(r"^srun: error: (\S+): tasks? (\d+)[\d,-]*: (?:Exited with exit code (\d+)|(.+))$", re.M)
# In the reason of a failed attempt: the one node to blame. Exit code 75 blames the rollout servers.
_BLAMED = re.compile(r"^(?:rank \d+ on|node) ([^\s\[,]+) (?!ended with exit code 75\b)")
_NODE = re.compile(r"^srun: error: Node failure on (\S+)", re.M)


@dataclass(frozen=True, slots=True)
class JobAttempt:
    """
    Attributes:
        outcome: `running` until the attempt ends; stays so if its node is lost.
        why: the reason of a failure or a stop, in one line; may be empty for a stop.
        steps: training steps on disk when the attempt ended.
    """

    outcome: AttemptOutcome
    why: str = ""
    steps: int = 0


@dataclass(frozen=True, slots=True)
class RankFailure:
    """
    Attributes:
        rank: None if a whole node failed.
        code: exit code; None if a signal ended the rank.
        what: a description in one line.
    """

    rank: int | None
    code: int | None
    what: str


def steps_written(folders: Iterable[Path]) -> int:
    """Counts the steps on disk of all stages in the folders; an evaluation's step is one record.

    The sum grows with each step of a run. Resuming first truncates it to the checkpoint.
    """
    names = ("metrics.jsonl", RECORDS)
    files = {file for folder in folders for name in names for file in folder.rglob(name)}
    return sum(file.read_bytes().count(b"\n") for file in files)


def read_attempts(logs: Path) -> list[JobAttempt]:
    """Reads the attempts of a job, oldest first, from its log folder."""
    file = logs / FILE
    return [JobAttempt(**fields) for fields in json.loads(file.read_text())] if file.is_file() else []


def write_attempts(logs: Path, attempts: Sequence[JobAttempt]) -> None:
    write_atomically(logs / FILE, json.dumps([asdict(attempt) for attempt in attempts], indent=1) + "\n")


def begin_attempt(logs: Path, steps: int, previous_logs: Path | None = None) -> list[JobAttempt]:
    """Appends a running attempt. One that is still recorded as running was cut off.

    Args:
        previous_logs: the log folder of the attempt before, which may say why.
    """
    attempts = read_attempts(logs)
    if attempts and attempts[-1].outcome == "running":
        attempts[-1] = _cut_off(previous_logs, steps)
    attempts.append(JobAttempt("running", steps=steps))
    write_attempts(logs, attempts)
    return attempts


def _cut_off(attempt_logs: Path | None, steps: int) -> JobAttempt:
    """A stop if slurm/common.sh has left a reason, unless a node was lost; otherwise a failure."""
    lost = JobAttempt("failed", "ended without a report: lost node or time limit", steps)
    if attempt_logs is None or not (reason := attempt_logs / STOP_REASON).is_file():
        return lost
    srun = attempt_logs / "srun_rank.log"
    node = _NODE.search(srun.read_text(errors="replace")) if srun.is_file() else None
    if node:
        return JobAttempt("failed", f"node {node[1]} failed", steps)
    return JobAttempt("stopped", reason.read_text().strip(), steps)


def end_attempt(logs: Path, attempt: JobAttempt) -> list[JobAttempt]:
    """Records how the running attempt ended, or one that ended before it was recorded as running."""
    attempts = read_attempts(logs)
    if attempts and attempts[-1].outcome == "running":
        attempts.pop()
    attempts.append(attempt)
    write_attempts(logs, attempts)
    return attempts


def failures_without_progress(attempts: Iterable[JobAttempt]) -> int:
    """Counts failures since an attempt last got further than all before it, including that attempt."""
    best, count = -1, 0
    for attempt in attempts:
        if attempt.outcome == "running":
            continue
        if attempt.steps > best:
            best, count = attempt.steps, 0
        count += attempt.outcome == "failed"
    return count


def stops_without_progress(attempts: Iterable[JobAttempt]) -> int:
    """Counts stops since an attempt last got further than all before it, excluding that attempt."""
    best = count = 0
    for attempt in attempts:
        if attempt.steps > best:
            best, count = attempt.steps, 0
        else:
            count += attempt.outcome == "stopped"
    return count


def bad_nodes(attempts: Iterable[JobAttempt]) -> list[str]:
    """Nodes that were the first to fail in two or more attempts."""
    blamed = (_BLAMED.match(attempt.why) for attempt in attempts if attempt.outcome == "failed")
    return sorted(node for node, count in Counter(match[1] for match in blamed if match).items() if count > 1)


def first_failure(srun_stderr: str) -> RankFailure | None:
    """Finds the first failed rank or node in srun's standard error; None if no task failed."""
    if node := _NODE.search(srun_stderr):
        return RankFailure(None, None, f"node {node[1]} failed")
    if not (task := _TASK.search(srun_stderr)):
        return None
    host, rank, code, cause = task[1], int(task[2]), task[3], task[4]
    if code is not None:
        return RankFailure(rank, int(code), f"rank {rank} on {host} ended with exit code {code}")
    return RankFailure(rank, None, f"rank {rank} on {host} was ended by a signal: {cause}")


def last_lines(log: Path, count: int = LAST_LINES) -> str:
    """The last lines of a log, indented."""
    lines = log.read_text(errors="replace").splitlines() if log.is_file() else ["(no log)"]
    return "\n".join(f"    {line}" for line in lines[-count:])
