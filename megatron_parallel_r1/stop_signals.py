"""The signals by which a cluster asks a run to stop: before its time limit, or to preempt it.

They are blocked, not handled. Nothing interrupts a step, and between two steps the run looks whether one is
pending. Threads and child processes inherit the block, so a signal to the whole process tree ends no worker.
"""

from __future__ import annotations

import signal

STOP_SIGNALS = frozenset({signal.SIGUSR1, signal.SIGUSR2})


def hold_stop_signals() -> None:
    """Keeps them pending; to be called before anything starts a thread, as an import of torch may."""
    signal.pthread_sigmask(signal.SIG_BLOCK, STOP_SIGNALS)


def hear_stop_signals() -> None:
    """Undoes a block that this process was started with, as by a program that holds them itself."""
    signal.pthread_sigmask(signal.SIG_UNBLOCK, STOP_SIGNALS)


def stop_signal_came() -> bool:
    """Whether this process was sent one since `hold_stop_signals`."""
    return bool(STOP_SIGNALS & signal.sigpending())
