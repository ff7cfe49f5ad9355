"""A stage that samples its own traces, and the one that is trained on them."""

from __future__ import annotations

import json
import shutil
import signal
import subprocess
import time
from pathlib import Path

import pytest
from pyarrow import parquet

from megatron_parallel_r1.config.reader import read_recipe
from megatron_parallel_r1.data.trace_text import WrittenTrace
from megatron_parallel_r1.errors import UserError
from tests.curriculum.test_many_processes import run as run_processes
from tests.curriculum.test_run import command, documented, run, steps_of

RECIPE = Path(__file__).parent / "distill.yaml"


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of a run that nobody disturbed."""
    out = tmp_path_factory.mktemp("whole")
    run(out, "curriculum", str(RECIPE))
    return out / "distill"


def sampled(stage: Path) -> list[dict[str, object]]:
    return [json.loads(line) for line in (stage / "sampled.jsonl").read_text().splitlines()]


def test_it_keeps_what_is_right_and_well_formed_one_a_problem(whole: Path) -> None:
    stage = whole / "own_traces"
    rows, traces = sampled(stage), parquet.read_table(stage / "traces.parquet").to_pylist()
    assert len(rows) == 6 * 8 * 8 and steps_of(stage) == [1, 2, 3, 4, 5, 6]
    assert 0 < len(traces) < len(rows) and len({row["question"] for row in traces}) == len(traces)
    for row in traces:
        main = WrittenTrace.of(row["response"]).main
        assert main.split()[-1] == row["answer"], main  # of one root, as all easy problems have
    report = json.loads((stage / "report.json").read_text())["counts"]
    assert report["traces written"] == len(traces) and report["traces sampled"] == len(rows)
    passed = [row for row in rows if row["rejection"] is None]
    metrics = [json.loads(line) for line in (stage / "metrics.jsonl").read_text().splitlines()]
    assert sum(record["kept"] for record in metrics) * 64 == pytest.approx(len(passed))
    assert set(metrics[0]) == {"stage", "kind", "step", "steps"} | documented("`distill`")
    assert "Yield" in (whole / "report.html").read_text()
    assert "wrong answer" in (stage / "report.md").read_text()
    assert not (stage / "model").exists() and (whole / "distilled/model").is_dir()
    card = (whole / "release/README.md").read_text()
    assert "| distilled | sft | traces of own_traces | 3 |" in card
    assert "traces that stage `own_traces` sampled from the model itself, of `embedded`" in card


def test_a_kill_in_the_middle_changes_nothing(whole: Path, tmp_path: Path) -> None:
    words = ("curriculum", str(RECIPE))
    stage = tmp_path / "distill/own_traces"
    process = subprocess.Popen(
        command(tmp_path, *words), stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL
    )
    try:
        while len(steps_of(stage)) < 2:
            assert process.poll() is None
            time.sleep(0.002)
    finally:
        process.send_signal(signal.SIGKILL)
        process.wait()
    assert not (stage / "traces.parquet").exists()
    # A step that was being written.
    with (stage / "sampled.jsonl").open("a") as file:
        file.write(json.dumps({"step": steps_of(stage)[-1] + 1, "question": "?"}) + '\n{"step": 9')
    again = run(tmp_path, *words)
    assert "cold_start  already done" in again.stdout
    for name in (
        "own_traces/sampled.jsonl",
        "own_traces/traces.parquet",
        "distilled/model/model.safetensors",
    ):
        assert (tmp_path / "distill" / name).read_bytes() == (whole / name).read_bytes(), name


@pytest.mark.parametrize(
    ("words", "fault"),
    [
        ("stages.distilled.data.stage=cold_start", "stage distilled: data: cold_start is no distill stage"),
        ("stages.distilled.start_from=own_traces", "stage distilled: starts from own_traces, which is no"),
        ("stages.own_traces.thinking={temperature: 0}", "stage own_traces: at temperature 0 all traces"),
        ("stages.own_traces.optimizer={lr: 1.0}", "optimizer"),
        ("stages.own_traces.check.paralel=true", "did you mean"),
    ],
)
def test_settings_that_cannot_be(words: str, fault: str) -> None:
    with pytest.raises(UserError, match=fault):
        read_recipe(RECIPE, [words])


def test_a_stage_alone(whole: Path, tmp_path: Path) -> None:
    early = subprocess.run(
        command(tmp_path, "sft", str(RECIPE), "--stage", "distilled"), capture_output=True, text=True
    )
    assert early.returncode == 2
    assert "stage distilled starts from cold_start, which is not done" in early.stderr
    done = run(whole.parent, "distill", str(RECIPE))
    assert "own_traces  already done" in done.stdout


@pytest.mark.slow
@pytest.mark.parametrize("layout", ["parallel.tensor=2", "parallel.tensor=1"])
def test_two_processes_sample_what_one_does(whole: Path, tmp_path: Path, layout: str) -> None:
    shutil.copytree(whole, tmp_path / "distill")
    for name in ("own_traces", "distilled", "release"):
        shutil.rmtree(tmp_path / "distill" / name)
    done = run_processes(tmp_path, 2, "distill", str(RECIPE), layout)
    assert done.returncode == 0, done.stdout + done.stderr
    for name in ("sampled.jsonl", "traces.parquet"):
        ours, theirs = (folder / "own_traces" / name for folder in (tmp_path / "distill", whole))
        assert ours.read_bytes() == theirs.read_bytes(), name
