"""A checkpoint made under one parallel layout goes on under another as if nothing had happened.

What is restored is compared bit for bit; what is trained from it, to the rounding of sums in another order.
No process restores what it saved itself; all that as many processes save is one launch, and all that they
restore another.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Iterable
from dataclasses import asdict, dataclass
from functools import cache
from pathlib import Path

import pytest
import torch

from tests.parallel.launch import torchrun
from tests.parallel.resume import Job

RELATIVE = 1e-5  # float32 sums in another order
PROCESSES = {
    "": 1,
    "tensor=2": 2,
    "pipeline=2": 2,
    "pipeline=2 virtual=2": 2,
    "pipeline=2 virtual=2 untied": 2,
    "sharded_optimizer": 2,
    "tensor=2 pipeline=2": 4,
    "tensor=2 sharded_optimizer": 4,
    "context=2 sharded_optimizer": 2,
    "experts": 1,
    "experts expert=2 sharded_optimizer": 2,
    "experts expert=4": 4,
    "experts expert=2 tensor=2 sequence": 4,
}


@dataclass(frozen=True)
class Run:
    """What a job left in `out`."""

    out: Path

    @property
    def found(self) -> int:
        return json.loads((self.out / "steps.json").read_text())["found"]

    @property
    def measured(self) -> torch.Tensor:
        measured = json.loads((self.out / "steps.json").read_text())["measured"]
        return torch.tensor(measured, dtype=torch.float64)

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


def launch(folder: Path, jobs: Iterable[Job]) -> None:
    """Does all jobs, those for as many processes in one launch."""
    by_size: dict[int, list[Job]] = {}
    for job in jobs:
        by_size.setdefault(PROCESSES[job.layout], []).append(job)
    for size, some in by_size.items():
        file = folder / f"jobs{size}.json"
        file.write_text(json.dumps([asdict(job) for job in some]))
        torchrun(size, "resume", file)


@pytest.fixture(scope="module")
def changed(
    selected: list[dict[str, str]], tmp_path_factory: pytest.TempPathFactory
) -> Callable[[str, str, str], tuple[Run, Run]]:
    """The run before a change (two steps, a checkpoint, two steps) and the run after it (those two again)."""
    cases = [(case["before"], case["after"], case["dtype"]) for case in selected]
    folder = tmp_path_factory.mktemp("changed")

    def place(*what: str) -> Path:
        return folder / "-".join(word.replace(" ", "+") or "one" for word in what)

    def checkpoints(*what: str) -> Path:
        return place(*what, "checkpoints")

    @cache
    def launched() -> None:
        starts = sorted({(before, dtype) for before, _, dtype in cases})
        launch(
            folder,
            [Job(str(place(*start)), str(checkpoints(*start)), *start, save_after=2) for start in starts],
        )
        for before, after, dtype in cases:
            shutil.copytree(checkpoints(before, dtype), checkpoints(before, after, dtype))
        launch(folder, [Job(str(place(*job)), str(checkpoints(*job)), job[1], job[2]) for job in cases])

    def get(before: str, after: str, dtype: str) -> tuple[Run, Run]:
        launched()
        first, second = Run(place(before, dtype)), Run(place(before, after, dtype))
        for run in (first, second):
            assert run.errors == [None] * len(run.errors) and run.measured.shape == (2, 2)
        assert (first.found, second.found) == (0, 2)
        return first, second

    return get


def assert_same_state(ours: Run, theirs: Run) -> None:
    a, b = ours.state(), theirs.state()
    assert a.keys() == b.keys() and int(a["steps"]) == 2
    assert [name for name in a if not torch.equal(a[name], b[name])] == []


slow = pytest.mark.slow


@pytest.mark.parametrize("dtype", ["float32"])
@pytest.mark.parametrize(
    ("before", "after"),
    [
        ("", "tensor=2"),
        pytest.param("sharded_optimizer", "", marks=slow),
        pytest.param("pipeline=2 virtual=2", "tensor=2", marks=slow),
        pytest.param("", "tensor=2 pipeline=2", marks=slow),
        pytest.param("", "sharded_optimizer", marks=slow),
        pytest.param("tensor=2", "pipeline=2", marks=slow),
        pytest.param("tensor=2 sharded_optimizer", "pipeline=2 virtual=2", marks=slow),
        pytest.param("tensor=2 sharded_optimizer", "context=2 sharded_optimizer", marks=slow),
        pytest.param("tensor=2 pipeline=2", "", marks=slow),
        pytest.param("experts expert=2 sharded_optimizer", "experts", marks=slow),
        pytest.param("experts expert=2 sharded_optimizer", "experts expert=4", marks=slow),
        pytest.param("experts expert=4", "experts expert=2 sharded_optimizer", marks=slow),
        pytest.param("experts expert=2 sharded_optimizer", "experts expert=2 tensor=2 sequence", marks=slow),
    ],
)
def test_another_layout_goes_on(changed, before: str, after: str, dtype: str) -> None:
    first, second = changed(before, after, dtype)
    assert_same_state(first, second)
    steps = ((second.measured - first.measured).abs() / first.measured).max().item()
    ours, theirs = second.weights, first.weights
    assert ours.keys() == theirs.keys()
    weights = max(((ours[n] - theirs[n]).norm() / theirs[n].norm()).item() for n in ours)
    print(f"{before or 'one process'} -> {after or 'one process'}: steps {steps:.1e}, weights {weights:.1e}")
    assert steps <= RELATIVE and weights <= RELATIVE


@pytest.mark.slow
@pytest.mark.parametrize(
    ("before", "after", "dtype"),
    [
        ("tensor=2 sharded_optimizer", "tensor=2 sharded_optimizer", "float32"),
        ("pipeline=2 virtual=2 untied", "pipeline=2 virtual=2 untied", "float32"),
        ("sharded_optimizer", "sharded_optimizer", "bfloat16"),
        ("experts expert=2 sharded_optimizer", "experts expert=2 sharded_optimizer", "float32"),
    ],
)
def test_the_same_layout_goes_on_bit_for_bit(changed, before: str, after: str, dtype: str) -> None:
    first, second = changed(before, after, dtype)
    assert_same_state(first, second)
    assert torch.equal(first.measured, second.measured)
    ours, theirs = second.weights, first.weights
    assert ours.keys() == theirs.keys()
    assert [name for name in theirs if not torch.equal(ours[name], theirs[name])] == []


@pytest.mark.slow
@pytest.mark.parametrize("dtype", ["bfloat16"])
@pytest.mark.parametrize(("before", "after"), [("sharded_optimizer", "tensor=2"), ("", "sharded_optimizer")])
def test_bf16_keeps_its_main_weights_under_another_layout(
    changed, before: str, after: str, dtype: str
) -> None:
    first, second = changed(before, after, dtype)
    assert_same_state(first, second)
    assert any(name.startswith("optimizer.state.fp32_param.") for name in second.state())


@pytest.mark.slow
def test_what_one_process_meets_all_are_told(tmp_path: Path) -> None:
    def job(name: str, checkpoints: Path, **more: int) -> Job:
        return Job(str(tmp_path / name), str(checkpoints), "sharded_optimizer", **more)

    whole = tmp_path / "checkpoints"
    launch(tmp_path, [job("first", whole, save_after=2, steps=0)])
    # Of a checkpoint that both wrote, the second process reads the file that is wrong.
    lost, cut = (shutil.copytree(whole, tmp_path / name) for name in ("lost", "cut"))
    shutil.copytree(whole / "step_000002", lost / "step_000003")
    (lost / "step_000003/__1_0.distcp").unlink()
    for shard in (cut / "step_000002").glob("__*.distcp"):
        shard.write_bytes(shard.read_bytes()[:100])
    launch(
        tmp_path,
        [
            job("full", whole, save_after=1, full_disk=1),
            job("again", whole, steps=0),
            job("without", lost, steps=0),
            job("damaged", cut),
        ],
    )
    full, again, without, damaged = (Run(tmp_path / name) for name in ("full", "again", "without", "damaged"))
    assert len(full.errors) == 2
    for error in full.errors:
        assert error and "step_000003 could not be written: File too large (process 1)" in error
    assert [path.name for path in whole.iterdir()] == ["step_000002"]
    assert again.found == 2 and again.errors == [None, None]

    assert without.found == 2 and without.errors == [None, None]
    assert sorted(path.name for path in lost.iterdir()) == ["damaged_step_000003", "step_000002"]

    assert damaged.errors[0] == damaged.errors[1]
    assert "__0_0.distcp is 100 bytes instead of" in damaged.errors[0] and "and 1 more" in damaged.errors[0]
