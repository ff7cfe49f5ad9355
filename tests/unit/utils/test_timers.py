from __future__ import annotations

import time

import pytest

from megatron_parallel_r1.utils.timers import Timers


def test_a_name_has_the_sum_of_its_blocks_and_begins_anew_once_taken() -> None:
    phases = Timers()
    for _ in range(2):
        with phases.of("draw"):
            time.sleep(0.02)
    with pytest.raises(RuntimeError), phases.of("update"):
        raise RuntimeError
    taken = phases.take()
    assert set(taken) == {"time_draw_s", "time_update_s"}
    assert taken["time_draw_s"] >= 0.04 > taken["time_update_s"] >= 0
    assert phases.take() == {}
