"""Which rank of a step failed first, and what it said last."""

from __future__ import annotations

import re
from dataclasses import dataclass
from pathlib import Path

LINES = 15
# srun reports tasks that end badly in their order; those that --kill-on-bad-exit ended come after the first.
_TASK = re.compile(r"^srun: error: (\S+): tasks? (\d+)[\d,-]*: (?:Exited with exit code (\d+)|(.+))$", re.M)
_NODE = re.compile(r"^srun: error: Node failure on (\S+)", re.M)


@dataclass(frozen=True, slots=True)
class Failure:
    """
    Attributes:
        rank: None if it was none, but a whole node.
        code: of its exit; None if a signal ended it.
        what: in a line.
    """

    rank: int | None
    code: int | None
    what: str


def first_failure(srun_said: str) -> Failure | None:
    """From srun's standard error; None if no task failed."""
    if lost := _NODE.search(srun_said):
        return Failure(None, None, f"node {lost[1]} failed")
    if not (task := _TASK.search(srun_said)):
        return None
    host, rank, code, by = task[1], int(task[2]), task[3], task[4]
    if code is not None:
        return Failure(rank, int(code), f"rank {rank} on {host} ended with exit code {code}")
    return Failure(rank, None, f"rank {rank} on {host} was ended by a signal: {by}")


def last_lines(log: Path, count: int = LINES) -> str:
    """The end of a log, each line indented."""
    lines = log.read_text(errors="replace").splitlines() if log.is_file() else ["(no log)"]
    return "\n".join(f"    {line}" for line in lines[-count:])
