"""A checkpoint made under one parallel layout goes on under another as if nothing had happened.

What is restored is compared bit for bit; what is trained from it, to the rounding of sums in another order.
"""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch

ROOT = Path(__file__).resolve().parents[2]
RELATIVE = 1e-5  # float32 sums in another order
PROCESSES = {
    "": 1,
    "--tensor 2": 2,
    "--pipeline 2": 2,
    "--pipeline 2 --interleaved 2": 2,
    "--sharded": 2,
    "--tensor 2 --pipeline 2": 4,
    "--tensor 2 --sharded": 4,
    "--context 2 --sharded": 2,
}


@dataclass(frozen=True)
class Run:
    """What a run of resume.py left in `out`, its checkpoints in `checkpoints`."""

    out: Path
    checkpoints: Path

    @property
    def found(self) -> int:
        return json.loads((self.out / "steps.json").read_text())["found"]

    @property
    def measured(self) -> torch.Tensor:
        return torch.tensor(
            json.loads((self.out / "steps.json").read_text())["measured"], dtype=torch.float64
        )

    @property
    def weights(self) -> dict[str, torch.Tensor]:
        return torch.load(self.out / "weights.pt")

    @property
    def errors(self) -> list[str | None]:
        return [json.loads(file.read_text()) for file in sorted(self.out.glob("error*.json"))]

    def state(self) -> dict[str, torch.Tensor]:
        """Whole tensors put together from what each process had; what two have is the same on both."""
        whole: dict[str, torch.Tensor] = {}
        for file in sorted(self.out.glob("state*.pt")):
            count, parts = torch.load(file)
            whole["steps"] = torch.maximum(whole.get("steps", torch.tensor(0)), torch.tensor(count))
            for key, offset, shape, data in parts:
                into = whole.setdefault(key, torch.full(shape, torch.nan, dtype=data.dtype))
                into = into[tuple(slice(o, o + s) for o, s in zip(offset, data.shape, strict=True))]
                assert torch.equal(into, data) or bool(into.isnan().all())
                into.copy_(data)
        assert not any(tensor.isnan().any() for tensor in whole.values())
        return whole


def run(out: Path, checkpoints: Path, layout: str, *words: str) -> Run:
    torchrun = (sys.executable, "-m", "torch.distributed.run", "--standalone")
    script = ("--nproc-per-node", str(PROCESSES[layout]), "-m", "tests.parallel.resume")
    done = subprocess.run(
        [*torchrun, *script, str(out), str(checkpoints), *layout.split(), *words],
        cwd=ROOT,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return Run(out, checkpoints)


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> Callable[..., Run]:
    """Two steps, a checkpoint, and two further steps in the same run; once for each layout."""
    known: dict[tuple[str, ...], Run] = {}

    def get(layout: str, *words: str) -> Run:
        asked = (layout, *words)
        if asked not in known:
            folder = tmp_path_factory.mktemp("saved")
            known[asked] = run(folder / "out", folder / "checkpoints", layout, "--save-after", "2", *words)
        return known[asked]

    return get


def assert_same_state(ours: Run, theirs: Run) -> None:
    a, b = ours.state(), theirs.state()
    assert a.keys() == b.keys() and int(a["steps"]) == 2
    assert [name for name in a if not torch.equal(a[name], b[name])] == []


slow = pytest.mark.slow


@pytest.mark.parametrize(
    ("before", "after"),
    [
        ("", "--tensor 2"),
        ("--sharded", ""),
        pytest.param("--pipeline 2 --interleaved 2", "--tensor 2", marks=slow),
        pytest.param("", "--tensor 2 --pipeline 2", marks=slow),
        pytest.param("", "--sharded", marks=slow),
        pytest.param("--tensor 2", "--pipeline 2", marks=slow),
        pytest.param("--tensor 2 --sharded", "--pipeline 2 --interleaved 2", marks=slow),
        pytest.param("--tensor 2 --sharded", "--context 2 --sharded", marks=slow),
        pytest.param("--tensor 2 --pipeline 2", "", marks=slow),
    ],
)
def test_another_layout_goes_on(saved, tmp_path: Path, before: str, after: str) -> None:
    first = saved(before)
    second = run(tmp_path / "out", shutil.copytree(first.checkpoints, tmp_path / "copy"), after)
    assert second.found == 2 and first.measured.shape == second.measured.shape == (2, 2)
    assert_same_state(first, second)
    steps = ((second.measured - first.measured).abs() / first.measured).max().item()
    ours, theirs = second.weights, first.weights
    assert ours.keys() == theirs.keys()
    weights = max(((ours[n] - theirs[n]).norm() / theirs[n].norm()).item() for n in ours)
    print(f"{before or 'one process'} -> {after or 'one process'}: steps {steps:.1e}, weights {weights:.1e}")
    assert steps <= RELATIVE and weights <= RELATIVE


@pytest.mark.parametrize(
    ("layout", "words"),
    [
        pytest.param("--tensor 2 --sharded", (), marks=slow),
        pytest.param("--pipeline 2 --interleaved 2", ("--untied",), marks=slow),
        pytest.param("--sharded", ("--dtype", "bfloat16"), marks=slow),
    ],
)
def test_the_same_layout_goes_on_bit_for_bit(
    saved, tmp_path: Path, layout: str, words: tuple[str, ...]
) -> None:
    first = saved(layout, *words)
    second = run(tmp_path / "out", shutil.copytree(first.checkpoints, tmp_path / "copy"), layout, *words)
    assert second.found == 2
    assert_same_state(first, second)
    assert torch.equal(first.measured, second.measured)
    ours, theirs = second.weights, first.weights
    assert [name for name in theirs if not torch.equal(ours[name], theirs[name])] == []


@pytest.mark.slow
@pytest.mark.parametrize(("before", "after"), [("--sharded", "--tensor 2"), ("", "--sharded")])
def test_bf16_keeps_its_main_weights_under_another_layout(
    saved, tmp_path: Path, before: str, after: str
) -> None:
    words = ("--dtype", "bfloat16")
    first = saved(before, *words)
    copy = shutil.copytree(first.checkpoints, tmp_path / "copy")
    second = run(tmp_path / "out", copy, after, "--steps", "0", *words)
    assert_same_state(first, second)
    assert any(name.startswith("optimizer.state.fp32_param.") for name in second.state())


@pytest.mark.slow
def test_what_one_process_meets_all_are_told(saved, tmp_path: Path) -> None:
    copy = shutil.copytree(saved("--sharded").checkpoints, tmp_path / "copy")
    failed = run(tmp_path / "failed", copy, "--sharded", "--save-after", "1", "--full-disk", "1")
    assert len(failed.errors) == 2
    for error in failed.errors:
        assert error and "step_000003 could not be written: File too large (process 1)" in error
    assert [path.name for path in copy.iterdir()] == ["step_000002"]
    assert run(tmp_path / "again", copy, "--sharded", "--steps", "0").found == 2

    for shard in (copy / "step_000002").glob("__*.distcp"):
        shard.write_bytes(shard.read_bytes()[:100])
    damaged = run(tmp_path / "damaged", copy, "--sharded")
    assert damaged.errors[0] == damaged.errors[1]
    assert "__0_0.distcp is 100 bytes instead of" in damaged.errors[0] and "and 1 more" in damaged.errors[0]
