"""The errors that end a command with one line instead of a traceback."""

# EX_TEMPFAIL of sysexits.h: nothing is wrong with what was asked, the same command may be started again.
LOST_EXIT_CODE = 75
# Asked to stop, the work saved: whoever asked starts the same command again.
STOPPED_EXIT_CODE = 85


class UserError(Exception):
    """Something that the user gave cannot work: a file, a setting, a checkpoint.

    The message says what is wrong, where, and what to do. The command line prints it without a traceback
    and exits with code 2.
    """


class ServersLost(UserError):
    """No rollout server is left.

    Within a job that started them itself, the exit code is LOST_EXIT_CODE: started again, it has fresh ones.
    """


class PeerLost(RuntimeError):
    """Another rank is gone, so that no collective can complete any more.

    The message names this rank, the missing one, and the place of both. Whoever catches it ends the process
    by `os._exit(LOST_EXIT_CODE)`: a usual exit takes the process groups down, which may wait for it.
    """


class Stopped(Exception):
    """A signal asked the run to stop, and it did, between two steps; all processes raise it together.

    The message says after which step, and whether that is saved. The command line prints it and exits with
    STOPPED_EXIT_CODE.
    """
