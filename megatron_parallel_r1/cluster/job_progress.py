"""How far a job is, from the records that its run leaves, and what ended it, in the error's own words."""

from __future__ import annotations

import json
import re
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from megatron_parallel_r1.cluster.attempts import SPEC_FILE
from megatron_parallel_r1.utils.timers import throughput

TAIL_BYTES = 1 << 16
# A line of this package's, or the last of a traceback, which torch prefixes with its rank.
_ERROR = re.compile(
    r"^(?:\[rank\d+\]: *)?(error: .+|(?:[a-z_]\w*\.)*[A-Z]\w*(?:Error|Exception|Interrupt)(?:: .*)?)$", re.M
)


def job_progress(folders: Iterable[Path]) -> str:
    """Stage, step and tokens per second of the step that was written last; empty before the first."""
    files = [file for folder in folders for file in folder.rglob("metrics.jsonl")]
    record = _last_record(max(files, key=lambda file: file.stat().st_mtime)) if files else None
    if record is None:
        return ""
    rates = [
        f"{rate:,.0f} tokens/s {name.removesuffix('_tokens_per_second')}"
        for name, rate in throughput(record).items()
    ]
    return ", ".join([f"{record['stage']} {record['step']}/{record['steps']}", *rates])


def run_folders(job_logs: Path) -> list[Path]:
    """The folders that a job writes its records to; none before it has begun."""
    file = job_logs / SPEC_FILE
    return [Path(folder) for folder in json.loads(file.read_text())["folders"]] if file.is_file() else []


def last_error(log: Path) -> str:
    """The last line of a log that states an error; empty if none does."""
    found = _ERROR.findall(_tail(log)) if log.is_file() else []
    return found[-1] if found else ""


def _last_record(file: Path) -> dict[str, Any] | None:
    """The last whole record; one that is being written is not."""
    for line in reversed(_tail(file).splitlines()):
        try:
            record = json.loads(line)
        except ValueError:
            continue
        if isinstance(record, dict) and {"stage", "step", "steps"} <= record.keys():
            return record
    return None


def _tail(file: Path) -> str:
    with file.open("rb") as opened:
        opened.seek(max(0, opened.seek(0, 2) - TAIL_BYTES))
        return opened.read().decode(errors="replace")
