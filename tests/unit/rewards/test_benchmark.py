"""The benchmark runs where there are no data; its figures are not looked at."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[3]


@pytest.mark.slow
def test_it_prints_a_row_for_each_kind_of_pairs(tmp_path: Path) -> None:
    command = [sys.executable, "-m", "benchmarks.verifier", "--pairs", "4", "--repeats", "2"]
    environment = {**os.environ, "MPR1_SHARED": str(tmp_path)}
    shown = subprocess.run(
        command, cwd=ROOT, env=environment, capture_output=True, text=True, check=True
    ).stdout
    rows = [line.split(" | ") for line in shown.splitlines() if line.startswith("| ") and " of " in line]
    assert [row[0] for row in rows] == [
        "| integers",
        "| plain fractions",
        "| boxed answers, re-spelled",
        "| boxed answers, wrong",
    ]
    assert all(row[-1] == "8 of 8 |" for row in rows)
    assert "20 synthetic answers" in shown and shown.endswith("No verdict differs.\n")
