"""Rewards by which a test holds a run in its third step, or ends it there; steps count from 0.

HOLD of the environment says what a first attempt waits for there: `stop`, a signal that asks it to stop;
or `end`, its own. So a test disturbs a run at one place, however fast or slow the machine is.
"""

from __future__ import annotations

import os
import time

from megatron_parallel_r1.distributed.stop_signals import stop_signal_pending
from megatron_parallel_r1.rewards.base import Judged

PATIENCE_S = 600.0


def shorter(judged: Judged, step: int) -> float:
    """The fewer tokens the better, also among traces that are all wrong; the third step may be held."""
    hold = os.environ.get("HOLD")
    if step == 2 and hold and os.environ.get("SLURM_RESTART_COUNT", "0") == "0":
        give_up = time.monotonic() + PATIENCE_S
        while hold == "end" or not stop_signal_pending():
            if time.monotonic() > give_up:
                raise RuntimeError(f"nothing came of HOLD={hold}")
            time.sleep(0.05)
    return -judged.length / 80


def third_step(judged: Judged, step: int) -> float:
    """Raises in the third step."""
    if step == 2:
        raise RuntimeError("the third step went wrong on purpose")
    return shorter(judged, step)
