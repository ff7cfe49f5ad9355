"""Bookkeeping of a job, called by its script: `python -m megatron_parallel_r1.cluster begin | servers | end`.

begin JOB_LOGS KIND ARGUMENTS...     validates the job and records a new attempt; exit code 2 rejects it
servers KIND ARGUMENTS...            prints the arguments of the rollout servers, one per line
end JOB_LOGS ATTEMPT_LOGS STEP CODE  records how the attempt ended

Exit codes of `end`: 0 done; 85 stopped on request, requeue; 75 failed, requeue; others failed for good.
"""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Sequence
from pathlib import Path

from megatron_parallel_r1.cluster.attempts import (
    JobAttempt,
    RankFailure,
    begin_attempt,
    end_attempt,
    failures_without_progress,
    first_failure,
    last_lines,
    steps_written,
)
from megatron_parallel_r1.errors import LOST_EXIT_CODE, STOPPED_EXIT_CODE, UserError
from megatron_parallel_r1.utils.exit import STOP_SIGNALS, one_line_exit

SPEC_FILE = "job.json"
STOP_CODES = (STOPPED_EXIT_CODE, *(128 + number for number in STOP_SIGNALS))


def begin(logs: Path, kind: str, arguments: Sequence[str], max_failures: int) -> None:
    """
    Args:
        logs: the job's log folder.

    Raises:
        UserError: the job cannot run, or is in a crash loop.
    """
    from megatron_parallel_r1.cluster.job_spec import JobSpec, evaluation_records

    # An evaluation validates its own arguments.
    is_evaluation = kind == "eval"
    folders = (evaluation_records(arguments),) if is_evaluation else JobSpec.read(kind, arguments).folders
    spec = {"kind": kind, "arguments": list(arguments), "folders": [str(folder) for folder in folders]}
    (logs / SPEC_FILE).write_text(json.dumps(spec, indent=1) + "\n")
    attempts = begin_attempt(logs, steps_written(folders))
    if failures_without_progress(attempts) >= max_failures:
        why = attempts[-2].why
        end_attempt(logs, JobAttempt("failed", why, attempts[-1].steps))
        raise UserError(crash_loop(attempts, why))


def end(logs: Path, attempt_logs: Path, step: str, code: int, max_failures: int) -> int:
    """Records and prints how an attempt ended; returns this program's exit code.

    Args:
        step: the srun step that ended, `rank` or `server`; its log files start with this name.
        code: the step's exit code.
    """
    folders = [Path(folder) for folder in json.loads((logs / SPEC_FILE).read_text())["folders"]]
    steps = steps_written(folders)
    if code == 0:
        end_attempt(logs, JobAttempt("done", steps=steps))
        return 0
    file = attempt_logs / f"srun_{step}.log"
    failure = first_failure(file.read_text(errors="replace") if file.is_file() else "")
    failure = failure or RankFailure(None, code, f"the {step}s ended with exit code {code}")
    if is_stop(failure):
        end_attempt(logs, JobAttempt("stopped", steps=steps))
        print(f"stopped after {steps} steps, saved; requeued")
        return STOPPED_EXIT_CODE
    print(f"error: {failure.what}; its last lines ({attempt_logs}):", file=sys.stderr)
    print(last_lines(attempt_logs / f"{step}_{failure.rank or 0}.log"), file=sys.stderr)
    attempts = end_attempt(logs, JobAttempt("failed", failure.what, steps))
    if failure.code == 2:  # an error that the user can fix
        return 2
    if failures_without_progress(attempts) < max_failures:
        print(f"failed after {steps} steps; requeued", file=sys.stderr)
        return LOST_EXIT_CODE
    print(f"error: {crash_loop(attempts, failure.what)}", file=sys.stderr)
    return failure.code if failure.code not in (None, 0, LOST_EXIT_CODE) else 1


def is_stop(failure: RankFailure) -> bool:
    """Returns whether the ranks ended because of a stop signal.

    An evaluation saves each record, so it simply dies of the signal; so does srun before it starts a rank.
    """
    return failure.code in STOP_CODES or "User defined signal" in failure.what


def crash_loop(attempts: Sequence[JobAttempt], why: str) -> str:
    count, steps = failures_without_progress(attempts), attempts[-1].steps
    return f"crash loop: {count} failures without progress beyond {steps} steps; last failure: {why}"


def main(arguments: Sequence[str]) -> int:
    max_failures = int(os.environ.get("MAX_FAILURES", "3"))  # validated by slurm/common.sh
    verb, *rest = arguments
    if verb == "begin":
        begin(Path(rest[0]), rest[1], rest[2:], max_failures)
        return 0
    if verb == "servers":
        from megatron_parallel_r1.cluster.job_spec import JobSpec, server_arguments

        print("\n".join(server_arguments(JobSpec.read(rest[0], rest[1:]), os.environ["ROLLOUT_ENGINE"])))
        return 0
    return end(Path(rest[0]), Path(rest[1]), rest[2], int(rest[3]), max_failures)


if __name__ == "__main__":
    with one_line_exit():
        sys.exit(main(sys.argv[1:]))
