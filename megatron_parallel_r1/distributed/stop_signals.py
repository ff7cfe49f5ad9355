"""The signals by which a cluster asks a run to stop: before its time limit, or to preempt it.

Under torchrun SIGTERM is one of them: torchrun sends it to all processes when one has failed or it is itself
told to end, and kills what is left half a minute later. That is time to say who is gone, or to save.

They are blocked, not handled. Nothing interrupts a step, and between two steps the run looks whether one is
pending. Threads and child processes inherit the block, so a signal to the whole process tree ends no worker.
"""

from __future__ import annotations

import os
import signal

STOP_SIGNALS = frozenset({signal.SIGUSR1, signal.SIGUSR2})
_HELD = STOP_SIGNALS | ({signal.SIGTERM} if "TORCHELASTIC_RUN_ID" in os.environ else frozenset())


def hold_stop_signals() -> None:
    """Keeps them pending; to be called before anything starts a thread, as an import of torch may."""
    signal.pthread_sigmask(signal.SIG_BLOCK, _HELD)


def hear_stop_signals() -> None:
    """Undoes a block that this process was started with, as by a program that holds them itself."""
    signal.pthread_sigmask(signal.SIG_UNBLOCK, _HELD)


def stop_signal_came() -> bool:
    """Whether this process was sent one since `hold_stop_signals`."""
    return bool(_HELD & signal.sigpending())
