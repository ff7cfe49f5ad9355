"""Ctrl-C and SIGTERM while steps run: the first one is recorded, a second one ends the process at once."""

from __future__ import annotations

import os
import signal
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from types import FrameType

from megatron_parallel_r1.utils.rank import is_rank_zero

INTERRUPTS = frozenset({signal.SIGINT, signal.SIGTERM})
# Which then come from torchrun or SLURM: it ends what remains 30 s (KillWait) or a preemption's grace later.
UNDER_LAUNCHER = "TORCHELASTIC_RUN_ID" in os.environ or {"RANK", "SLURM_STEP_ID"} <= os.environ.keys()

# Those since the last `interrupts_recorded` began.
_recorded: list[int] = []


def interrupt_recorded() -> bool:
    return bool(_recorded)


@contextmanager
def interrupts_recorded() -> Iterator[None]:
    """Records SIGINT, and in a run of one process SIGTERM, in the block; the second one ends the process.

    A thread counts them, because a signal handler waits for the main thread to leave C code, such as a
    collective. With several ranks SIGTERM keeps its handler: their launcher sends it when one has failed.
    Does nothing under torchrun and srun, or in another thread than the main one, which cannot set handlers.
    """
    _recorded.clear()
    if UNDER_LAUNCHER or threading.current_thread() is not threading.main_thread():
        yield
        return
    reader, writer = os.pipe()
    os.set_blocking(writer, False)
    thread = threading.Thread(target=_count, args=(reader,), name="interrupts", daemon=True)
    thread.start()
    fd_before = signal.set_wakeup_fd(writer, warn_on_full_buffer=False)
    handled = INTERRUPTS - ({signal.SIGTERM} if "RANK" in os.environ else set())
    before = {number: signal.signal(number, _ignore) for number in handled}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
        signal.set_wakeup_fd(fd_before)
        os.close(writer)
        thread.join()
        os.close(reader)


def _ignore(number: int, frame: FrameType | None) -> None:
    """A handler, so that Python writes the signal's number to the wake-up descriptor."""


def _count(reader: int) -> None:
    while numbers := os.read(reader, 64):
        for number in numbers:
            if number not in INTERRUPTS:
                continue
            if _recorded:
                os._exit(128 + number)
            _recorded.append(number)
            if is_rank_zero():
                name = signal.Signals(number).name
                line = f"{name}: the run saves after this step and stops; a second one ends it at once"
                print(line, file=sys.stderr, flush=True)


def _reset_in_child() -> None:
    """A forked child has the handlers and the descriptor of its parent, to which it must not write."""
    with suppress(ValueError):
        if signal.getsignal(signal.SIGINT) is _ignore:
            signal.set_wakeup_fd(-1)
            signal.signal(signal.SIGINT, signal.default_int_handler)
            if signal.getsignal(signal.SIGTERM) is _ignore:
                signal.signal(signal.SIGTERM, signal.SIG_DFL)


os.register_at_fork(after_in_child=_reset_in_child)
