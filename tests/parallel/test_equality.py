"""A parallel layout changes nothing but speed: three optimizer steps against one process, by torchrun.

Each layout is started once and goes through SFT and GRPO with recompute off, full and selective, the sharded
optimizer, and bfloat16, on packed `isolated` and `replay` rows of different lengths; and through whole steps
of the `Learner`, with old and reference log-probs, mini-batches, a KL penalty, masks and per-path credit.
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
# bfloat16 rounds at 2^-9, and a split model rounds partial sums that one process never sees: four such units
# for the first step. Updated weights, rounded in turn, feed them back, and Adam turns a small difference of a
# small gradient into a step. A loss of advantages of both signs nearly cancels: relative to 1 at least.
RELATIVE_BFLOAT16 = (2**-7, 2**-6, 2**-5)

Figures = dict[str, list[float]]


def steps(out: Path, processes: int, *layout: str) -> dict[str, Figures]:
    torchrun = (sys.executable, "-m", "torch.distributed.run", "--standalone")
    done = subprocess.run(
        [*torchrun, "--nproc-per-node", str(processes), "-m", "tests.parallel.steps", str(out), *layout],
        cwd=ROOT,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        timeout=600,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return json.loads(out.read_text())


@pytest.fixture(scope="module")
def alone(tmp_path_factory: pytest.TempPathFactory) -> dict[str, dict[str, Figures]]:
    folder = tmp_path_factory.mktemp("alone")
    return {
        "tied": steps(folder / "tied.json", 1),
        "untied": steps(folder / "untied.json", 1, "--untied"),
    }


def differences(expected: Figures, found: Figures, floor: float) -> list[float]:
    """The largest relative difference of each step; that of the weights counts with the last."""
    assert expected.keys() == found.keys()
    worst = [
        max(
            abs(expected[name][step] - found[name][step]) / max(abs(expected[name][step]), floor)
            for name in expected.keys() - {"weights"}
        )
        for step in range(3)
    ]
    pairs = zip(expected["weights"], found["weights"], strict=True)
    return [*worst[:2], max(worst[2], *(abs(a - b) / abs(a) for a, b in pairs))]


def test_the_lessons_meet_bounds_masks_and_the_reference(alone) -> None:
    for figures in alone.values():
        lesson = figures["kl in the reward, recompute none"]
        assert min(lesson["masked"]) > 0 and max(lesson["clip_fraction"]) > 0
        assert min(figures["path credit, recompute none"]["kl"]) > 0


@pytest.mark.parametrize(
    ("processes", "layout"),
    [
        (1, ""),
        (2, "--tensor 2 --sequence --untied"),
        (2, "--pipeline 2 --interleaved 2"),
        (2, "--context 2"),
        (2, ""),
        pytest.param(2, "--tensor 2", marks=pytest.mark.slow),
        pytest.param(2, "--pipeline 2", marks=pytest.mark.slow),
        pytest.param(2, "--pipeline 2 --untied", marks=pytest.mark.slow),
        pytest.param(4, "--tensor 2 --pipeline 2", marks=pytest.mark.slow),
        pytest.param(4, "--tensor 2 --pipeline 2 --interleaved 2 --sequence", marks=pytest.mark.slow),
        pytest.param(4, "--tensor 2", marks=pytest.mark.slow),
        pytest.param(4, "--pipeline 2", marks=pytest.mark.slow),
        pytest.param(4, "--context 2", marks=pytest.mark.slow),
        pytest.param(4, "--tensor 2 --context 2 --sequence", marks=pytest.mark.slow),
        pytest.param(4, "--pipeline 4 --untied", marks=pytest.mark.slow),
        pytest.param(8, "--tensor 2 --pipeline 2", marks=pytest.mark.slow),
        pytest.param(8, "--tensor 2 --pipeline 2 --interleaved 2 --context 2", marks=pytest.mark.slow),
    ],
)
def test_equals_one_process(alone, tmp_path: Path, processes: int, layout: str) -> None:
    expected = alone["untied" if "untied" in layout else "tied"]
    found = steps(tmp_path / "found.json", processes, *layout.split())
    for variant, figures in found.items():
        loss = variant.split(",")[0]
        if "bfloat16" in variant:
            reference, allowed, floor = expected[variant], RELATIVE_BFLOAT16, 1.0
        else:
            reference, allowed, floor = expected[f"{loss}, recompute none"], (RELATIVE,) * 3, 1e-3
        assert reference.get("targets") == figures.get("targets")
        worst = differences(reference, figures, floor)
        shown = " ".join(f"{value:.1e}" for value in worst)
        print(f"{processes} processes {layout or 'data parallel'} | {variant} | {shown}")
        assert all(value <= bound for value, bound in zip(worst, allowed, strict=True)), (variant, worst)
