"""Findings of several ranks become one table and one verdict."""

from __future__ import annotations

import pytest

from megatron_parallel_r1.doctor.findings import Finding, examine, findings_table, merge, rank_text, verdict

SAME, SLOW = Finding("GPU", "H100"), Finding("disk rate", "90 MB/s", "note", "buy a faster one")
TAKEN = Finding("GPU memory", "70 of 80 GB of GPU 3 are in use", "fault", "end it")


def test_equal_findings_are_one_row_in_the_order_of_the_checks() -> None:
    rows = merge([[SAME, SLOW], [SAME], [SAME, TAKEN]])
    assert [(row.finding, row.ranks) for row in rows] == [(SAME, (0, 1, 2)), (SLOW, (0,)), (TAKEN, (2,))]
    assert findings_table(rows).rows[2] == (
        "GPU memory",
        "2",
        "FAULT",
        "70 of 80 GB of GPU 3 are in use; end it",
    )


@pytest.mark.parametrize(
    ("findings", "line"),
    [
        ([SAME], "ready"),
        ([SAME, SLOW], "ready, with notes on disk rate"),
        ([SAME, SLOW, TAKEN], "not ready: GPU memory"),
    ],
)
def test_a_fault_decides(findings: list[Finding], line: str) -> None:
    assert verdict(merge([findings])) == line


def test_ranks_in_a_row_are_a_span() -> None:
    assert rank_text([6, 0, 1, 2]) == "0-2, 6"


def test_an_error_of_a_check_is_a_fault_on_one_line() -> None:
    def broken() -> list[Finding]:
        raise RuntimeError("NCCL error:\n  unhandled system error")

    (found,) = examine("all-reduce", broken)
    assert found.level == "fault" and found.found.startswith("NCCL error: unhandled system error (after ")
