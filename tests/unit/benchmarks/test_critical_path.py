"""The benchmark of the critical path runs, tiny; it asserts itself that both ways write as many tokens."""

from benchmarks import critical_path
from benchmarks.paced import Pace


def test_its_row_is_full() -> None:
    table = critical_path.measure([1], [2], repeats=1, pace=Pace(main=3, path=4, summary=3))
    ((traces, paths, total, critical, ratio, *rest),) = table.rows
    assert (traces, paths, total, critical) == ("1", "2", "21", "16") and ratio == "1.31"
    assert len(rest) == len(table.columns) - 5 and float(rest[0].split()[0]) > 0
