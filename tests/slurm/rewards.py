"""Rewards that hold or fail a run in its third step, for tests that disturb it; steps count from 0.

The environment variable HOLD says what the first attempt waits for: `stop`, a stop signal; `end`, its own
end. So a test disturbs a run at the same step on any machine, fast or slow.
"""

from __future__ import annotations

import os
import sys
import time

from megatron_parallel_r1.rewards.base import Judged
from megatron_parallel_r1.utils.exit import stop_signal_pending

PATIENCE_S = 600.0


def shorter(judged: Judged, step: int) -> float:
    """Rewards short traces, so that wrong traces differ too; may hold the third step."""
    hold = os.environ.get("HOLD")
    if step == 2 and hold and os.environ.get("SLURM_RESTART_COUNT", "0") == "0":
        give_up = time.monotonic() + PATIENCE_S
        while hold == "end" or not stop_signal_pending():
            if time.monotonic() > give_up:
                raise RuntimeError(f"HOLD={hold}: no signal within {PATIENCE_S:.0f} s")
            time.sleep(0.05)
    return -judged.length / 80


def third_step(judged: Judged, step: int) -> float:
    """Ends the process in the third step, as a crash does: an exception would be an error of the user's."""
    if step == 2:
        print("deliberate failure in the third step", file=sys.stderr, flush=True)
        os._exit(1)
    return shorter(judged, step)
