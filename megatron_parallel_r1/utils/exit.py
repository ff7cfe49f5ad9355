"""How a command ends: stop signals between steps, one line and an exit code."""

from __future__ import annotations

import errno
import os
import signal
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import NoReturn

from megatron_parallel_r1.errors import (
    LOST_EXIT_CODE,
    STOPPED_EXIT_CODE,
    PeerLost,
    ServersLost,
    Stopped,
    UserError,
)
from megatron_parallel_r1.utils.imports import prepare_imports
from megatron_parallel_r1.utils.interrupts import INTERRUPTS, UNDER_LAUNCHER, interrupt_recorded

USER_ERROR_EXIT_CODE = 2
INTERRUPTED_EXIT_CODE = 130
_NOT_WRITTEN = {
    **dict.fromkeys((errno.ENOSPC, errno.EDQUOT, errno.EFBIG), "make room"),
    errno.EROFS: "choose a place that this user can write",
}
_NO_ACCESS = (errno.EACCES, errno.EPERM)
# Rank 0 reports for all ranks; when it ends, the launcher ends the others within this time.
_OTHERS_WAIT_S = 3.0
# The same for an error that every rank meets by itself: on a busy machine rank 0 may meet it seconds later.
_OTHERS_REPORT_S = 10.0


class ReportedExit(SystemExit):
    """An exit whose line is printed: an outer `one_line_exit` adds none."""


@contextmanager
def one_line_exit(resume: str = "the same command continues where it was") -> Iterator[None]:
    """Turns expected errors of the block into one line and `ReportedExit`; also quiets warnings at import.

    | error | exit code |
    |---|---|
    | `UserError`, a full disk, a file that this user may not read or write | 2 |
    | `ServersLost` of servers that the run or job started, `PeerLost` | LOST_EXIT_CODE |
    | `Stopped` | STOPPED_EXIT_CODE |
    | Ctrl-C | 130 |

    Args:
        resume: what the same command does after Ctrl-C, for the message.
    """
    prepare_imports()
    try:
        yield
    except PeerLost as error:
        print(f"error: {error}", file=sys.stderr)
        sys.stdout.flush()
        sys.stderr.flush()
        # A normal exit destroys the process groups, which may wait for the lost rank.
        os._exit(LOST_EXIT_CODE)
    except Stopped as error:
        if _rank() == "0":
            _report(f"{error}; the same command continues it")
        else:
            time.sleep(_OTHERS_WAIT_S)
        raise ReportedExit(STOPPED_EXIT_CODE) from None
    except UserError as error:
        _report_error(str(error))
        is_lost = isinstance(error, ServersLost) and (error.own or "SERVERS_OF_JOB" in os.environ)
        code = LOST_EXIT_CODE if is_lost else USER_ERROR_EXIT_CODE
        if is_lost and stop_signal_pending():  # servers may end with the job before the ranks do
            code = STOPPED_EXIT_CODE
        raise ReportedExit(code) from None
    except OSError as error:
        if error.errno in _NO_ACCESS and error.filename is not None:  # not those of a signal or a socket
            advice = "change its permissions or choose another place"
            _report_error(f"{error.filename} cannot be accessed: {error.strerror}; {advice}")
        elif error.errno in _NOT_WRITTEN:
            file, advice = error.filename or "a file", _NOT_WRITTEN[error.errno]
            _report_error(f"{file} could not be written: {error.strerror}; {advice}")
        else:
            raise
        raise ReportedExit(USER_ERROR_EXIT_CODE) from None
    except ReportedExit:
        raise
    except (KeyboardInterrupt, SystemExit) as ended:
        # Typer turns a KeyboardInterrupt into its exit code in silence.
        if isinstance(ended, SystemExit) and ended.code != INTERRUPTED_EXIT_CODE:
            raise
        _report(f"stopped; {resume}")
        raise ReportedExit(INTERRUPTED_EXIT_CODE) from None


def run_and_exit(command: Callable[[], int | None], resume: str) -> NoReturn:
    """Runs the command of a script under `one_line_exit` and exits with the code that it returns."""
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    with one_line_exit(resume):
        raise SystemExit(command())


def _report_error(message: str) -> None:
    """Prints one line for all ranks of a launch: a user error occurs on every one of them.

    Another rank prints too if rank 0 did not fail with it; otherwise the launcher ends it before.
    """
    rank = _rank()
    if rank != "0":
        signal.pthread_sigmask(signal.SIG_UNBLOCK, {signal.SIGTERM})  # which torchrun sends
        time.sleep(_OTHERS_REPORT_S)
    prefix = "" if rank == "0" else f"rank {rank}: "
    _report(f"{prefix}error: {' '.join(message.split())}")


def _rank() -> str:
    return os.environ.get("RANK", "0")


def _report(line: str) -> None:
    print(line, file=sys.stderr, flush=True)


# Signals by which a cluster asks a run to stop: before its time limit, or to preempt it. Under torchrun and
# srun SIGINT and SIGTERM are too: all processes get them when one has failed, the launcher is stopped, or the
# job is preempted. What remains is killed 30 s later, which leaves time to name the lost rank, or to save.
# They are blocked, not handled: nothing interrupts a step, and the run checks between steps whether one is
# pending. Threads and child processes inherit the block, so a signal to the whole tree ends no worker.
STOP_SIGNALS = frozenset({signal.SIGUSR1, signal.SIGUSR2})
_BLOCKED = STOP_SIGNALS | (INTERRUPTS if UNDER_LAUNCHER else frozenset())


def block_stop_signals() -> None:
    """Keeps them pending. Call it before anything starts a thread, as importing torch may."""
    signal.pthread_sigmask(signal.SIG_BLOCK, _BLOCKED)


def unblock_stop_signals() -> None:
    """Undoes a block inherited from a parent process, such as a program that blocks them itself."""
    signal.pthread_sigmask(signal.SIG_UNBLOCK, _BLOCKED)


def stop_signal_pending() -> bool:
    """Returns whether this process has received one since `block_stop_signals`, or has recorded Ctrl-C."""
    return interrupt_recorded() or bool(_BLOCKED & signal.sigpending())
