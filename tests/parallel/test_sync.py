"""A split model's weights come together bucket by bucket, bit for bit; no process ever has all of them."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
# `torch.equal` may hold one byte for each number that it compares.
COMPARED = 0.25


@pytest.mark.parametrize(
    ("processes", "layout"),
    [
        (1, ""),
        (2, "--tensor 2"),
        (2, "--pipeline 2 --interleaved 2"),
        (4, "--tensor 2 --pipeline 2"),
        pytest.param(2, "--pipeline 2", marks=pytest.mark.slow),
        pytest.param(4, "--tensor 2", marks=pytest.mark.slow),
        pytest.param(4, "--context 2 --pipeline 2", marks=pytest.mark.slow),
    ],
)
def test_buckets_hold_all_weights_once(tmp_path: Path, processes: int, layout: str) -> None:
    torchrun = (sys.executable, "-m", "torch.distributed.run", "--standalone")
    out = tmp_path / "found.json"
    done = subprocess.run(
        [
            *torchrun,
            "--nproc-per-node",
            str(processes),
            "-m",
            "tests.parallel.gathering",
            str(out),
            *layout.split(),
        ],
        cwd=ROOT,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        timeout=600,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    for case, found in json.loads(out.read_text()).items():
        sender, *others = found["ranks"]
        assert sender["names"] and not sender["differing"], case
        assert sum(sender["sizes"]) == found["all"]
        assert sender["lasts"] == [False] * (len(sender["lasts"]) - 1) + [True]
        assert max(sender["sizes"]) <= max(found["bucket"], found["largest"])
        if found["bucket"] >= found["all"]:
            # One from each stage, none from the same one twice.
            assert len(sender["sizes"]) <= (2 if "--pipeline 2" in layout else 1)
        assert not any(other["sent"] for other in others), "only the sender has buckets"
        # A bucket, the parts of one parameter, and what came of them before they are let go.
        bound = min(max(found["bucket"], found["largest"]), found["all"]) + 2 * found["largest"]
        for rank, one in enumerate(found["ranks"]):
            assert one["peak"] <= bound + COMPARED * found["largest"], (case, rank, one["peak"], bound)
        if found["bucket"] == 20_000:
            # That this bound says something: a whole copy would break it.
            assert max(one["peak"] for one in found["ranks"]) < found["all"], case
