"""The books of a job, kept by its script: `python -m megatron_parallel_r1.cluster begin | servers | end`.

begin JOB_LOGS KIND WORDS...     checks what is to run, counts this attempt; exit code 2 refuses it
servers KIND WORDS...            prints the words for its rollout servers, one a line
end JOB_LOGS ATTEMPT_LOGS STEP CODE   says how it went, by its exit code

0: done. 85: stopped as it was asked to, requeue it. 75: failed, requeue it. Else: failed, do not.
"""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Sequence
from pathlib import Path

from megatron_parallel_r1.cluster import attempts
from megatron_parallel_r1.cluster.attempts import Attempt, failures_in_vain, steps_written
from megatron_parallel_r1.cluster.failure import Failure, first_failure, last_lines
from megatron_parallel_r1.distributed.stop_signals import STOP_SIGNALS
from megatron_parallel_r1.errors import LOST_EXIT_CODE, STOPPED_EXIT_CODE, UserError

ORDER = "order.json"
STOPS = (STOPPED_EXIT_CODE, *(128 + stop for stop in STOP_SIGNALS))


def begin(job: Path, kind: str, words: Sequence[str], most: int) -> None:
    """
    Raises:
        UserError: it cannot run, or it fails at one place again and again.
    """
    from megatron_parallel_r1.cluster.job_spec import Order, records_of

    # An evaluation checks its own words.
    folders = (records_of(words),) if kind == "eval" else Order.read(kind, words).folders
    order = {"kind": kind, "words": list(words), "folders": [str(folder) for folder in folders]}
    (job / ORDER).write_text(json.dumps(order, indent=1) + "\n")
    tried = attempts.begin(job, steps_written(folders))
    if failures_in_vain(tried) >= most:
        why = tried[-2].why
        attempts.end(job, Attempt("failed", why, tried[-1].steps))
        raise UserError(loop(tried, why))


def end(job: Path, logs: Path, step: str, code: int, most: int) -> int:
    """Writes down how an attempt ended and says it; the exit code of this program.

    Args:
        step: the part of it that ended, `rank` or `server`: its logs bear that name.
    """
    folders = [Path(folder) for folder in json.loads((job / ORDER).read_text())["folders"]]
    steps = steps_written(folders)
    if code == 0:
        attempts.end(job, Attempt("done", steps=steps))
        return 0
    file = logs / f"srun_{step}.log"
    failed = first_failure(file.read_text(errors="replace") if file.is_file() else "")
    failed = failed or Failure(None, code, f"the {step}s ended with exit code {code}")
    if is_stop(failed):
        attempts.end(job, Attempt("stopped", steps=steps))
        print(f"stopped after {steps} steps, saved; requeued")
        return STOPPED_EXIT_CODE
    print(f"error: {failed.what}; its last lines ({logs}):", file=sys.stderr)
    print(last_lines(logs / f"{step}_{failed.rank or 0}.log"), file=sys.stderr)
    tried = attempts.end(job, Attempt("failed", failed.what, steps))
    if failed.code == 2:  # what a user can mend
        return 2
    if failures_in_vain(tried) < most:
        print(f"failed after {steps} steps; requeued", file=sys.stderr)
        return LOST_EXIT_CODE
    print(f"error: {loop(tried, failed.what)}", file=sys.stderr)
    return failed.code if failed.code not in (None, 0, LOST_EXIT_CODE) else 1


def is_stop(failed: Failure) -> bool:
    """Whether ranks ended because they were asked to.

    An evaluation saves as it goes and just dies of the signal, as does srun before it has started a rank.
    """
    return failed.code in STOPS or "User defined signal" in failed.what


def loop(tried: Sequence[Attempt], why: str) -> str:
    count = failures_in_vain(tried)
    return (
        f"crash loop: {count} failures without a step beyond {tried[-1].steps}, the last one: {why}; given up"
    )


def main(words: Sequence[str]) -> int:
    most = int(os.environ.get("MAX_FAILURES", "3"))  # the script has checked it
    verb, job, *rest = words  # `job` is the KIND of servers
    try:
        if verb == "begin":
            begin(Path(job), rest[0], rest[1:], most)
            return 0
        if verb == "servers":
            from megatron_parallel_r1.cluster.job_spec import Order
            from megatron_parallel_r1.cluster.servers import server_words

            print("\n".join(server_words(Order.read(job, rest), os.environ["ROLLOUT_ENGINE"])))
            return 0
        return end(Path(job), Path(rest[0]), rest[1], int(rest[2]), most)
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
