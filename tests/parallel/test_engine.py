"""The native engine shared by a team of processes against the one-process engine, by torchrun over gloo.

The model's vocabulary and feed-forward size divide by no team's size. Not covered here: bf16, nccl.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).resolve().parents[2]
TOLERANCE = 2e-5  # float32, logits of some units: a few hundred roundings of 6e-8


def launched(out: Path, processes: int, *arguments: str) -> list[dict[str, Any]]:
    """What each rank of `tests.parallel.engine` found."""
    torchrun = ("-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(processes))
    done = subprocess.run(
        [sys.executable, *torchrun, "-m", "tests.parallel.engine", str(out), *arguments],
        cwd=ROOT,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return json.loads(out.read_text())


@pytest.mark.parametrize(
    ("processes", "arguments"),
    [
        (2, "--team 2"),
        pytest.param(2, "--team 2 --tied", marks=pytest.mark.slow),
        pytest.param(4, "--team 4", marks=pytest.mark.slow),
        pytest.param(4, "--team 2", marks=pytest.mark.slow),
    ],
)
def test_a_team_decodes_what_one_process_does(tmp_path: Path, processes: int, arguments: str) -> None:
    size = int(arguments.split()[1])
    ranks = launched(tmp_path / "found.json", processes, *arguments.split())
    assert len(ranks) == processes
    for found in ranks:
        for mode, facts in found["modes"].items():
            assert facts["agrees"], mode
            assert facts["greedy"] <= TOLERANCE and facts["sampled"] <= TOLERANCE, (mode, facts)
            assert facts["rows"][0] == facts["rows"][1] > 0, mode
            # A tied model's tags are not made likely: its sampled traces seldom have blocks.
            if mode != "sequential" and "--tied" not in arguments:
                assert min(facts["blocks"]) >= 4, (mode, facts)
        assert found["refused"].endswith("does not divide the model's kv_heads 1; set parallel.tensor to 1")
    worst = max(facts[kind] for r in ranks for facts in r["modes"].values() for kind in ("greedy", "sampled"))
    print(f"{processes} processes {arguments}: largest difference of log-probs {worst:.1e}")
    counts = {"many": [4] * (size - 1) + [5], "other": [2] * size, "early": [1] * (size - 1) + [0]}
    counts["weights"] = [0] * size
    for found in ranks:
        for cause, requests in counts.items():
            said = f"parted ways (requests: {', '.join(map(str, requests))})"
            assert said in found["parted"][cause], (cause, found["parted"][cause])
