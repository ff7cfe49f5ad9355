"""Signals by which a cluster asks a run to stop: before its time limit, or to preempt it.

SIGTERM is among them under torchrun, which sends it to all processes when one has failed or torchrun itself
is stopped, and kills what remains 30 s later. That leaves time to name the lost rank, or to save.

The signals are blocked, not handled: nothing interrupts a step, and the run checks between steps whether one
is pending. Threads and child processes inherit the block, so a signal to the whole process tree ends no
worker.
"""

from __future__ import annotations

import os
import signal

STOP_SIGNALS = frozenset({signal.SIGUSR1, signal.SIGUSR2})
_BLOCKED = STOP_SIGNALS | ({signal.SIGTERM} if "TORCHELASTIC_RUN_ID" in os.environ else frozenset())


def block_stop_signals() -> None:
    """Keeps them pending. Call it before anything starts a thread, as importing torch may."""
    signal.pthread_sigmask(signal.SIG_BLOCK, _BLOCKED)


def unblock_stop_signals() -> None:
    """Undoes a block inherited from a parent process, such as a program that blocks them itself."""
    signal.pthread_sigmask(signal.SIG_UNBLOCK, _BLOCKED)


def stop_signal_pending() -> bool:
    """Returns whether this process has received one since `block_stop_signals`."""
    return bool(_BLOCKED & signal.sigpending())
