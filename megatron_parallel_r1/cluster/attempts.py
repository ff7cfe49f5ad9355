"""How often a job was started, how each attempt ended, and whether another one is worth it."""

from __future__ import annotations

import json
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Literal

from megatron_parallel_r1.evaluation.records import RECORDS
from megatron_parallel_r1.utils.files import write_atomically

Outcome = Literal["running", "done", "stopped", "failed"]
FILE = "attempts.json"


@dataclass(frozen=True, slots=True)
class Attempt:
    """
    Attributes:
        outcome: `running` until it has ended; so is that of one whose node was lost.
        why: in a line, if it failed.
        steps: that were written down when it ended.
    """

    outcome: Outcome
    why: str = ""
    steps: int = 0


def steps_written(folders: Iterable[Path]) -> int:
    """Of all stages in the folders. Their sum grows with each step of a run; going on cuts it back first.

    A step of an evaluation is a record.
    """
    names = ("metrics.jsonl", RECORDS)
    files = {file for folder in folders for name in names for file in folder.rglob(name)}
    return sum(file.read_bytes().count(b"\n") for file in files)


def read_attempts(job: Path) -> list[Attempt]:
    """Those of a job, the oldest first; `job` is its folder of logs."""
    file = job / FILE
    return [Attempt(**one) for one in json.loads(file.read_text())] if file.is_file() else []


def write_attempts(job: Path, attempts: Sequence[Attempt]) -> None:
    write_atomically(job / FILE, json.dumps([asdict(attempt) for attempt in attempts], indent=1) + "\n")


def begin(job: Path, steps: int) -> list[Attempt]:
    """Writes a further attempt down; one that still runs by the records was cut off, with its node."""
    attempts = read_attempts(job)
    if attempts and attempts[-1].outcome == "running":
        attempts[-1] = Attempt(
            "failed", "it ended without a word, as on a lost node or at a time limit", steps
        )
    attempts.append(Attempt("running", steps=steps))
    write_attempts(job, attempts)
    return attempts


def end(job: Path, ended: Attempt) -> list[Attempt]:
    """Writes down how the last attempt ended."""
    attempts = [*read_attempts(job)[:-1], ended]
    write_attempts(job, attempts)
    return attempts


def failures_in_vain(attempts: Iterable[Attempt]) -> int:
    """Failures since one last got further than all before it, that one included."""
    best, count = -1, 0
    for attempt in attempts:
        if attempt.outcome == "running":
            continue
        if attempt.steps > best:
            best, count = attempt.steps, 0
        count += attempt.outcome == "failed"
    return count
