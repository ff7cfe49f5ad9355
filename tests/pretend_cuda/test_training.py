"""The curriculum under pretend CUDA: nothing mixes devices, and training waits no more than the table allows.

What waits, and why, is written in docs/kernels.md ("Where the host waits").
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections import Counter
from pathlib import Path
from typing import Any

import pytest

from tests.pretend_cuda.device_guard import missing

ROOT = Path(__file__).resolve().parents[2]
MINI = ROOT / "tests/curriculum/mini.yaml"
STEPS = {"cold_start": 3, "rl": 2}
UPDATES = 3 + 2 * 2 * 2  # SFT's, and RL's epochs x mini-batches a step
SETTINGS = ["model.dtype=bfloat16", "evaluation.problems=8"]
WAITING = ("wait", "copy to host", "copy to device")
# Done once for each model: building it, wrapping it, loading and saving its weights.
SETUP = (
    "megatron optimizer/__init__.py",
    "megatron optimizer/optimizer.py",
    "model/weights.py",
    "checkpoint_formats/",
)

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(missing() is not None and "CI" not in os.environ, reason=missing() or ""),
]


def under_pretend_cuda(folder: Path, processes: int, *program: str) -> list[dict[str, Any]]:
    """Runs a module with its arguments; returns the ledger of each rank."""
    launcher = ["-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={processes}"]
    done = subprocess.run(
        [
            *(sys.executable, *(launcher if processes > 1 else [])),
            *("-m", "tests.pretend_cuda", str(folder), *program),
        ],
        cwd=folder,
        env={**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return [json.loads((folder / f"ledger.{rank}.json").read_text()) for rank in range(processes)]


def curriculum(folder: Path, processes: int, *settings: str) -> list[dict[str, Any]]:
    steps = [f"stages.{name}.steps={count}" for name, count in STEPS.items()]
    command = ("megatron_parallel_r1.cli", "curriculum", str(MINI))
    return under_pretend_cuda(folder, processes, *command, *steps, *SETTINGS, *settings)


def waits(ledger: dict[str, Any]) -> Counter[str]:
    """How often each file of ours made the host wait."""
    counts: Counter[str] = Counter()
    for kind, _, place, count in ledger["events"]:
        if kind in WAITING and not place.startswith(SETUP):
            counts[place.split(" < ")[0].rpartition(":")[0]] += count
    return counts


@pytest.fixture(scope="module")
def alone(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    (ledger,) = curriculum(tmp_path_factory.mktemp("alone"), 1)
    return ledger


def test_nothing_mixes_devices(alone: dict[str, Any]) -> None:
    assert alone["faults"] == []


def test_the_host_waits_as_often_as_the_table_says(alone: dict[str, Any]) -> None:
    counts = waits(alone)
    engine = {place: counts.pop(place) for place in list(counts) if place.startswith("rollout/native/")}
    # One copy to the host a draw: its tokens. The graphs' event is reached by then.
    assert set(engine) <= {"rollout/native/sampler.py", "rollout/native/graphs.py", "rollout/native/model.py"}
    assert engine["rollout/native/graphs.py"] <= engine["rollout/native/sampler.py"]
    # `tiled`, which stands in for the kernels, reads its tiles; a model's rotary frequencies are sent once.
    del counts["model/attention/tiles.py"]
    assert counts.pop("model/transformer.py") <= len(STEPS)
    # An update: its sums and its gradient norm. A step of RL: the largest mismatch, its maximum over ranks.
    # The held-out examples, at the end of SFT: their sums.
    assert counts.pop("megatron optimizer/clip_grads.py") == UPDATES
    assert counts.pop("distributed/collectives.py") <= UPDATES + 3 * STEPS["rl"] + 1
    assert counts.pop("rl/objective/mismatch.py") == STEPS["rl"]
    assert not counts


def test_a_split_model_mixes_no_devices(tmp_path: Path) -> None:
    split = ["tensor=2", "sequence=true", "sharded_optimizer=true", "recompute=full"]
    for ledger in curriculum(tmp_path, 2, *(f"parallel.{setting}" for setting in split)):
        assert ledger["faults"] == []


@pytest.mark.parametrize(
    ("processes", "layout"), [(2, "pipeline=2 virtual=2"), (2, "context=2"), (2, "experts expert=2")]
)
def test_steps_mix_no_devices(tmp_path: Path, processes: int, layout: str) -> None:
    program = ("tests.pretend_cuda.steps", layout, str(tmp_path / "out"))
    for ledger in under_pretend_cuda(tmp_path, processes, *program):
        assert ledger["faults"] == []


def test_gradients_and_optimizer_leave_the_device_and_come_back(tmp_path: Path) -> None:
    (ledger,) = under_pretend_cuda(tmp_path, 1, "tests.pretend_cuda.turns")
    assert ledger["faults"] == []
