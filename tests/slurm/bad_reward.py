"""Rewards that disturb a run at one step, each time that step is tried; steps count from 0."""

from __future__ import annotations

import time

from megatron_parallel_r1.rewards.base import Judged


def third_step(judged: Judged, step: int) -> float:
    """Raises in the third step."""
    if step == 2:
        raise RuntimeError("the third step went wrong on purpose")
    return float(judged.correct)


def slow_third_step(judged: Judged, step: int) -> float:
    """Takes two seconds a trace in the third step."""
    if step == 2:
        time.sleep(2)
    return float(judged.correct)
