"""The learning rate against a case worked out by hand."""

from __future__ import annotations

from megatron_parallel_r1.train.trainer import LrSchedule


def test_schedule_by_hand() -> None:
    schedule = LrSchedule(peak=1.0, warmup=2, final=0.5)
    assert [schedule.at(step, 6) for step in range(1, 7)] == [0.5, 1.0, 0.875, 0.75, 0.625, 0.5]
    assert LrSchedule(3.0).at(1, 10) == 3.0
