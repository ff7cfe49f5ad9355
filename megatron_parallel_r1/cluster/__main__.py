"""Bookkeeping of a job, called by its script: `python -m megatron_parallel_r1.cluster begin | servers | end`.

begin JOB_LOGS KIND ARGUMENTS...     validates the job and records a new attempt; exit code 2 rejects it
servers KIND ARGUMENTS...            prints the arguments of the rollout servers, one per line
end JOB_LOGS ATTEMPT_LOGS STEP CODE  records how the attempt ended
                                     STEP is rank or server, or stop if a signal came before either

Exit codes of `end`: 0 done; 85 stopped on request, requeue; 75 failed, requeue; others failed for good.
"""

from __future__ import annotations

import json
import os
import signal
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from megatron_parallel_r1.cluster.attempts import (
    BAD_NODES_FILE,
    SPEC_FILE,
    JobAttempt,
    RankFailure,
    bad_nodes,
    begin_attempt,
    end_attempt,
    failures_without_progress,
    first_failure,
    last_lines,
    read_attempts,
    steps_written,
    stops_without_progress,
)
from megatron_parallel_r1.cluster.job_progress import last_error
from megatron_parallel_r1.cluster.limits import check_limit
from megatron_parallel_r1.cluster.site import SCRIPTS, read_header
from megatron_parallel_r1.errors import LOST_EXIT_CODE, STOPPED_EXIT_CODE, UserError
from megatron_parallel_r1.utils.exit import STOP_SIGNALS, one_line_exit

STOP_CAUSES = ("Terminated", "User defined signal 1", "User defined signal 2")
STOP_CODES = (STOPPED_EXIT_CODE, *(128 + number for number in (*STOP_SIGNALS, signal.SIGTERM)))


def begin(logs: Path, kind: str, arguments: Sequence[str], max_failures: int, max_stops: int) -> None:
    """
    Args:
        logs: the job's log folder.
        max_failures: consecutive ones without progress before the job is given up; `max_stops` likewise.

    Raises:
        UserError: the job cannot run, or attempt follows attempt without progress.
    """
    from megatron_parallel_r1.cluster.job_spec import JobSpec, evaluation_records

    # An evaluation validates its own arguments.
    spec = None if kind == "eval" else JobSpec.read(kind, arguments)
    folders = (evaluation_records(arguments),) if spec is None else spec.folders
    names = [str(folder.resolve()) for folder in folders]
    written = {"kind": kind, "arguments": list(arguments), "folders": names}
    (logs / SPEC_FILE).write_text(json.dumps(written, indent=1) + "\n")
    previous = logs / f"attempt{int(os.environ.get('SLURM_RESTART_COUNT', 0)) - 1}"
    attempts = begin_attempt(logs, steps_written(folders), previous)
    if why := endless(attempts, max_failures, max_stops):
        end_attempt(logs, JobAttempt("failed", why, attempts[-1].steps))
        raise UserError(why)
    if len(attempts) > 1 and attempts[-2].outcome == "stopped":
        print(f"attempt {len(attempts)}: the one before was stopped ({attempts[-2].why or 'saved'})")
    if spec and "JOB_RANKS" in os.environ:
        from megatron_parallel_r1.cluster.limits import slow_step_note

        gpus = os.environ.get("SLURM_GPUS_ON_NODE", "0") != "0"
        signal_s = read_header(_scripts() / SCRIPTS[kind]).signal_s
        if note := slow_step_note(spec, int(os.environ["JOB_RANKS"]), gpus, signal_s):
            print(note)


def end(logs: Path, attempt_logs: Path, step: str, code: int, max_failures: int, max_stops: int) -> int:
    """Records and prints how an attempt ended; returns this program's exit code.

    Args:
        step: the srun step that ended, `rank` or `server`; its log files start with this name. `stop` if a
            signal came before there was one.
        code: the step's exit code.
    """
    file = logs / SPEC_FILE  # absent if the attempt was stopped before it began
    job: dict[str, Any] = json.loads(file.read_text()) if file.is_file() else {"kind": "", "folders": []}
    steps = steps_written(Path(folder) for folder in job["folders"])
    if code == 0:
        end_attempt(logs, JobAttempt("done", steps=steps))
        return 0
    file = attempt_logs / f"srun_{step}.log"
    failure = first_failure(file.read_text(errors="replace") if file.is_file() else "")
    failure = failure or RankFailure(None, code, f"the {step}s ended with exit code {code}")
    if is_stop(failure):
        begun = read_attempts(logs)
        why = "" if step == "rank" else "before the ranks started"
        attempts = end_attempt(logs, JobAttempt("stopped", why, steps))
        hopeless = endless(attempts, max_failures, max_stops)
        if not hopeless and begun and begun[-1].steps == steps:
            hopeless = limit_without_step(job["kind"])
        if hopeless:
            end_attempt(logs, JobAttempt("failed", hopeless, steps))
            print(f"error: {hopeless}", file=sys.stderr)
            return 2
        remark = why or "saved"
        if count := stops_without_progress(attempts):
            remark += f", stop {count} of {max_stops} without progress"
        print(f"stopped after {steps} steps, {remark}; requeued")
        return STOPPED_EXIT_CODE
    print(f"error: {failure.what}; its last lines ({attempt_logs}):", file=sys.stderr)
    log = attempt_logs / f"{step}_{failure.rank or 0}.log"
    print(last_lines(log), file=sys.stderr)
    why = ": ".join(filter(None, (failure.what, last_error(log))))
    attempts = end_attempt(logs, JobAttempt("failed", why, steps))
    if failure.code == 2:  # an error that the user can fix
        return 2
    if failures_without_progress(attempts) < max_failures:
        (logs / BAD_NODES_FILE).write_text(",".join(bad_nodes(attempts)))
        print(f"failed after {steps} steps; requeued", file=sys.stderr)
        return LOST_EXIT_CODE
    print(f"error: {endless(attempts, max_failures, max_stops)}", file=sys.stderr)
    return failure.code if failure.code not in (None, 0, LOST_EXIT_CODE) else 1


def is_stop(failure: RankFailure) -> bool:
    """Returns whether the ranks ended because of a stop signal.

    An evaluation saves each record, so it simply dies of the signal; so does srun before it starts a rank.
    SIGTERM goes to the ranks alone when a job is preempted with a grace time.
    """
    return failure.code in STOP_CODES or failure.what.endswith(STOP_CAUSES)


def endless(attempts: Sequence[JobAttempt], max_failures: int, max_stops: int) -> str | None:
    """Returns why a job is given up, in one line: attempts follow each other without progress."""
    steps = attempts[-1].steps
    if (count := failures_without_progress(attempts)) >= max_failures:
        why = [attempt.why for attempt in attempts if attempt.outcome == "failed"][-1]
        return f"crash loop: {count} failures without progress beyond {steps} steps; last failure: {why}"
    if (count := stops_without_progress(attempts)) >= max_stops:
        return (
            f"{count} stops (MAX_STOPS) without progress beyond {steps} steps: the time limit less --signal "
            "is too short for start and step, or the job is preempted too often; lengthen --time, or lower "
            "save_every_minutes"
        )
    return None


def _scripts() -> Path:
    return Path(os.environ.get("REPOSITORY", ".")) / "slurm"


def limit_without_step(kind: str) -> str | None:
    """Returns why the stop signal of a job's own time limit comes before any step, or None."""
    limit_s = os.environ.get("JOB_LIMIT_S")
    if not limit_s or os.environ.get("PREEMPTED") or kind not in SCRIPTS:
        return None
    try:
        check_limit(int(limit_s), read_header(_scripts() / SCRIPTS[kind]).signal_s)
    except UserError as error:
        return str(error)
    return None


def main(arguments: Sequence[str]) -> int:
    # Set and validated by slurm/site.env and common.sh.
    max_failures, max_stops = (int(os.environ[name]) for name in ("MAX_FAILURES", "MAX_STOPS"))
    verb, *rest = arguments
    if verb == "begin":
        begin(Path(rest[0]), rest[1], rest[2:], max_failures, max_stops)
        return 0
    if verb == "servers":
        from megatron_parallel_r1.cluster.job_spec import JobSpec, server_arguments

        print("\n".join(server_arguments(JobSpec.read(rest[0], rest[1:]), os.environ["ROLLOUT_ENGINE"])))
        return 0
    return end(Path(rest[0]), Path(rest[1]), rest[2], int(rest[3]), max_failures, max_stops)


if __name__ == "__main__":
    with one_line_exit():
        sys.exit(main(sys.argv[1:]))
