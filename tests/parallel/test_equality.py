"""A parallel layout changes nothing but speed: three GRPO updates against one process, by torchrun over gloo.

Not covered yet: interleaved pipeline stages, bf16, SFT's loss (a simpler one through the same step).
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
RELATIVE = 1e-5  # float32 sums in another order


def steps(out: Path, processes: int, *layout: str) -> dict[str, list[float]]:
    done = subprocess.run(
        [
            *(
                sys.executable,
                "-m",
                "torch.distributed.run",
                "--standalone",
                "--nproc-per-node",
                str(processes),
            ),
            *("-m", "tests.parallel.steps", str(out), *layout),
        ],
        cwd=ROOT,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return json.loads(out.read_text())


@pytest.fixture(scope="module")
def alone(tmp_path_factory: pytest.TempPathFactory) -> dict[str, dict[str, list[float]]]:
    folder = tmp_path_factory.mktemp("alone")
    return {
        "tied": steps(folder / "tied.json", 1),
        "untied": steps(folder / "untied.json", 1, "--untied"),
    }


@pytest.mark.parametrize(
    ("processes", "layout"),
    [
        (2, "--tensor 2"),
        (2, "--tensor 2 --sequence --untied"),
        (2, "--pipeline 2"),
        (2, ""),
        (1, "--recompute full"),
        (2, "--context 2"),
        pytest.param(4, "--context 2 --tensor 2 --sequence", marks=pytest.mark.slow),
        pytest.param(4, "--context 2", marks=pytest.mark.slow),
        pytest.param(8, "--context 2 --pipeline 2 --tensor 2 --recompute full", marks=pytest.mark.slow),
        pytest.param(1, "--recompute selective", marks=pytest.mark.slow),
        pytest.param(2, "--pipeline 2 --untied", marks=pytest.mark.slow),
        pytest.param(2, "--pipeline 2 --recompute selective", marks=pytest.mark.slow),
        pytest.param(2, "--sharded", marks=pytest.mark.slow),
        pytest.param(4, "--tensor 2 --sharded", marks=pytest.mark.slow),
        pytest.param(4, "--tensor 2 --pipeline 2 --sequence --recompute full", marks=pytest.mark.slow),
        pytest.param(4, "--tensor 2 --pipeline 2 --sequence", marks=pytest.mark.slow),
        pytest.param(4, "--tensor 2", marks=pytest.mark.slow),
        pytest.param(4, "--pipeline 2", marks=pytest.mark.slow),
        pytest.param(8, "--tensor 2 --pipeline 2", marks=pytest.mark.slow),
    ],
)
def test_equals_one_process(alone, tmp_path: Path, processes: int, layout: str) -> None:
    expected = alone["untied" if "untied" in layout else "tied"]
    found = steps(tmp_path / "found.json", processes, *layout.split())
    assert expected["targets"] == found["targets"] and expected["rows"][0] >= 4
    worst = max(
        abs(a - b) / max(abs(a), 1e-3)
        for name in ("loss", "entropy", "grad_norm", "clipped", "weights")
        for a, b in zip(expected[name], found[name], strict=True)
    )
    print(f"{processes} processes {layout}: largest relative difference {worst:.1e}")
    assert worst <= RELATIVE
