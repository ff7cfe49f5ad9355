"""Errors that end a command with one line instead of a traceback, and the exit codes."""

# EX_TEMPFAIL of sysexits.h: the settings are right, and the same command may be started again.
LOST_EXIT_CODE = 75
# Stopped by a signal, with the work saved: the same command continues it.
STOPPED_EXIT_CODE = 85


class UserError(Exception):
    """An input of the user cannot work: a file, a setting, a checkpoint.

    The message says what is wrong, where, and what to do. The command line prints it without a traceback
    and exits with code 2.

    Attributes:
        on_all_ranks: whether every rank raises it at the same point, so that collectives still work.
    """

    on_all_ranks = False


def one_line(error: BaseException, limit: int = 200) -> str:
    """The message of another library's error on one line of at most `limit` characters, or its type."""
    return " ".join(str(error).split())[:limit] or type(error).__name__


class ServersLost(UserError):
    """No rollout server is left.

    If the run or its job started them, the exit code is LOST_EXIT_CODE: started again, it has fresh servers.

    Attributes:
        own: whether the run started them.
    """

    own = False


class PeerLost(RuntimeError):
    """Another rank is lost, so no collective can complete any more.

    The message names this rank, the missing one, and the location of both. The command ends the process by
    `os._exit(LOST_EXIT_CODE)`: a normal exit destroys the process groups, which may wait for the lost rank.
    """


class Stopped(Exception):
    """A signal asked the run to stop, and it did, between two steps; all ranks raise it together.

    The message says after which step, and whether its work is saved. The command line prints it and exits
    with STOPPED_EXIT_CODE.
    """
