"""`eval/run.py` and `eval/compare.py` on a run of a model of nothing: cached, killed, shared, compared."""

from __future__ import annotations

import io
import json
import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from contextlib import redirect_stdout
from pathlib import Path

import pytest

from megatron_parallel_r1.config.reader import read_recipe
from megatron_parallel_r1.curriculum.run import run as run_curriculum
from megatron_parallel_r1.errors import UserError
from megatron_parallel_r1.evaluation.command import compare_command, evaluate_command

ROOT = Path(__file__).parents[2]
RECIPE = Path(__file__).parent / "mini.yaml"
ASKED = ("--benchmarks", "embedded_hard,embedded_easy", "--limit", "12", "--samples", "2")
# Runs a script with a limit on the size of each file, in bytes.
LIMITED = """
import resource, runpy, sys
size = int(sys.argv[1])
resource.setrlimit(resource.RLIMIT_FSIZE, (size, size))
sys.argv = sys.argv[2:]
runpy.run_path(sys.argv[0], run_name="__main__")
"""
SHORT = ("stages.cold_start.steps=12", "stages.rl.steps=1", "evaluation.problems=4")


def start(
    script: str, *words: object, launcher: tuple[str, ...] = (sys.executable,)
) -> subprocess.Popen[str]:
    command = [*launcher, str(ROOT / "eval" / script), *map(str, words)]
    return subprocess.Popen(
        command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, start_new_session=True
    )


def run(script: str, *words: object, launcher: tuple[str, ...] = ()) -> str:
    """Runs a script to its end and returns what it prints; without a launcher in this process."""
    if not launcher:
        command = {"run.py": evaluate_command, "compare.py": compare_command}[script]
        with redirect_stdout(io.StringIO()) as out:
            command(list(map(str, words)))
        return out.getvalue()
    process = start(script, *words, launcher=launcher)
    printed, error = process.communicate(timeout=300)
    assert process.returncode == 0, printed + error
    return printed


def records(out: Path) -> list[dict]:
    files = sorted(out.glob("records/*/*.jsonl"))
    return [json.loads(line) for file in files for line in file.read_text().splitlines()]


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of a finished run."""
    out = tmp_path_factory.mktemp("trained")
    (result,) = run_curriculum(read_recipe(RECIPE, [f"out={out}", *SHORT]))
    return result.folder


@pytest.fixture(scope="module")
def evaluated(trained: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What evaluating its release in parallel mode left."""
    out = tmp_path_factory.mktemp("evaluated")
    shown = run("run.py", "--checkpoint", trained / "release", *ASKED, "--out", out)
    assert "mini parallel  step 48/48" in shown and "Thinking in parallel" in shown
    return out


def test_it_leaves_a_record_of_each_response_and_a_table(evaluated: Path) -> None:
    drawn = records(evaluated)
    assert len({record["key"] for record in drawn}) == len(drawn) == 48
    assert {(record["benchmark"], record["sample"]) for record in drawn} == {
        (name, sample) for name in ("embedded_hard", "embedded_easy") for sample in (0, 1)
    }
    assert any(record["blocks"] for record in drawn)
    assert all(record["critical_tokens"] < record["tokens"] for record in drawn if record["paths"] > 1)
    summaries = json.loads((evaluated / "mini_parallel.json").read_text())
    assert [(s["benchmark"], s["problems"], s["samples"]) for s in summaries] == [
        ("embedded_hard", 12, 2),
        ("embedded_easy", 12, 2),
    ]
    hard = [record for record in drawn if record["benchmark"] == "embedded_hard"]
    assert summaries[0]["mean"]["value"] == pytest.approx(sum(r["correct"] for r in hard) / 24, abs=1e-12)
    setup = json.loads(next(evaluated.glob("records/*/setup.json")).read_text())
    assert (setup[1]["mode"], setup[1]["paths"], setup[1]["template"]) == ("isolated", 3, "{problem}")
    assert "| mini | embedded_hard | parallel | 12 × 2 |" in (evaluated / "mini_parallel.md").read_text()
    assert "<table>" in (evaluated / "mini_parallel.html").read_text()


def test_asked_again_it_draws_nothing(trained: Path, evaluated: Path) -> None:
    before = {file: file.read_bytes() for file in evaluated.rglob("*") if file.is_file()}
    # A stage's folder with the same weights finds them too.
    for checkpoint in (trained / "release", trained / "rl"):
        shown = run("run.py", "--checkpoint", checkpoint, *ASKED, "--out", evaluated)
        assert "48 of 48 responses are cached" in shown and "step" not in shown
    assert all(file.read_bytes() == content for file, content in before.items())


@pytest.mark.slow
def test_killed_it_goes_on_where_it_was(trained: Path, evaluated: Path, tmp_path: Path) -> None:
    words = ("--checkpoint", trained / "release", *ASKED, "--out", tmp_path, "--concurrent", 1)
    process = start("run.py", *words)
    deadline = time.monotonic() + 200
    while not any(file.stat().st_size > 2000 for file in tmp_path.glob("records/*/copy0.jsonl")):
        assert process.poll() is None and time.monotonic() < deadline
        time.sleep(0.002)
    os.killpg(process.pid, signal.SIGKILL)
    process.communicate()
    (file,) = tmp_path.glob("records/*/copy0.jsonl")
    with file.open("a") as lines:
        lines.write('{"key": "torn')
    kept = [json.loads(line) for line in file.read_text().splitlines()[:-1]]
    assert 0 < len(kept) < 48
    assert f"{len(kept)} of 48 responses are cached" in run("run.py", *words)
    now = records(tmp_path)
    assert now[: len(kept)] == kept
    assert len(now) == 48 and {r["key"] for r in now} == {r["key"] for r in records(evaluated)}


@pytest.mark.slow
def test_two_processes_share_the_work(trained: Path, evaluated: Path, tmp_path: Path) -> None:
    launcher = (sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2")
    words = ("--checkpoint", trained / "release", *ASKED, "--out", tmp_path)
    assert run("run.py", *words, launcher=launcher).count("Thinking in parallel") == 1
    shares = [len(file.read_text().splitlines()) for file in sorted(tmp_path.glob("records/*/copy*.jsonl"))]
    assert shares == [24, 24]
    alone = {record["key"]: record["response"] for record in records(evaluated)}
    shared = {record["key"]: record["response"] for record in records(tmp_path)}
    assert shared.keys() == alone.keys()
    # Another batch rounds otherwise, which may move a draw that lies on the edge; one in 48 is already much.
    assert sum(shared[key] != alone[key] for key in alone) <= 1


@pytest.mark.slow
def test_a_tensor_group_decodes_together(trained: Path, evaluated: Path, tmp_path: Path) -> None:
    launcher = (sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2")
    words = ("--checkpoint", trained / "release", *ASKED, "--out", tmp_path, "--tensor", 2)
    run("run.py", *words, launcher=launcher)
    assert {record["key"] for record in records(tmp_path)} == {record["key"] for record in records(evaluated)}
    assert len(records(tmp_path)) == 48 and not list(tmp_path.glob("records/*/copy1.jsonl"))


@pytest.mark.slow
def test_stages_in_several_modes_side_by_side(trained: Path, tmp_path: Path) -> None:
    words = ("--run", trained, "--modes", "parallel,sequential,majority@2", *ASKED, "--out", tmp_path)
    shown = run("compare.py", *words)
    assert "rl majority@2  48 of 48 responses are cached" in shown  # the sequential ones
    markdown = (tmp_path / "comparison.md").read_text()
    summaries = json.loads((tmp_path / "comparison.json").read_text())
    assert [(s["checkpoint"], s["step"], s["mode"]) for s in summaries[:6]] == [
        (stage, step, mode)
        for stage, step in (("cold_start", 12), ("rl", 13))
        for mode in ("parallel", "sequential", "majority@2")
    ]
    assert all(s["parallel_ratio"] == 0 for s in summaries if s["mode"] != "parallel")
    # Of each benchmark: two modes against parallel at both stages, and three modes over training.
    assert markdown.partition("## Paired tests")[2].count("\n| embedded_") == 2 * (2 * 2 + 3)
    assert "| embedded_easy | cold_start, parallel | rl, parallel | 12 |" in markdown
    assert (tmp_path / "comparison.png").read_bytes().startswith(b"\x89PNG")
    assert "data:image/svg+xml;base64," in (tmp_path / "comparison.html").read_text()
    release = run("run.py", "--checkpoint", trained, *ASKED, "--out", tmp_path)
    assert "48 of 48 responses are cached" in release


@pytest.mark.parametrize(
    ("command", "words", "what"),
    [
        (evaluate_command, ("--checkpoint", "nowhere"), "nowhere: no config.json"),
        (
            evaluate_command,
            ("--checkpoint", "{}", "--engine", "sglang"),
            "engine sglang: give --server URL of each",
        ),
        (
            evaluate_command,
            ("--checkpoint", "{}", "--set", "temperature=0"),
            "at temperature 0 all of them are the same",
        ),
        (
            evaluate_command,
            ("--checkpoint", "{}", "--mode", "majority@3"),
            "--samples 2: mode majority@3 needs a multiple",
        ),
        (evaluate_command, ("--checkpoint", "{}", "--server", "http://localhost:1"), "takes no --server"),
        (evaluate_command, ("--checkpoint", "{}", "--concurrent", "0"), "--concurrent 0"),
        (
            compare_command,
            ("--run", "{}", "--stages", "warm_start"),
            "no finished stage of --run; it has cold_start, rl",
        ),
        (compare_command, (), "nothing to compare"),
        (compare_command, ("--run", "."), "no run folder"),
    ],
)
def test_mistakes_are_named_before_anything_is_written(
    trained: Path, tmp_path: Path, command: Callable[[list[str]], None], words: tuple[str, ...], what: str
) -> None:
    filled = [word.replace("{}", str(trained)) for word in words]
    with pytest.raises(UserError, match=re.escape(what)):
        command([*filled, *ASKED, "--out", str(tmp_path / "out")])
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("command", [evaluate_command, compare_command])
@pytest.mark.parametrize("inside", [".", "runs/eval"])
def test_an_out_that_is_a_file_is_refused_before_anything_else(
    command: Callable[[list[str]], None], inside: str, tmp_path: Path
) -> None:
    (tmp_path / "file").write_text("mine")
    out = tmp_path / "file" / inside
    with pytest.raises(UserError) as error:
        command(["--checkpoint", "nowhere", *ASKED, "--out", str(out)])
    assert str(error.value) == f"--out {out}: {tmp_path / 'file'} is no folder; give another"
    assert (tmp_path / "file").read_text() == "mine"


def test_a_folder_that_may_not_be_written(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, "access", lambda place, how: place != tmp_path)  # root may write everywhere
    with pytest.raises(UserError, match=f"{tmp_path} may not be written"):
        evaluate_command(["--checkpoint", "nowhere", *ASKED, "--out", str(tmp_path / "out")])


@pytest.mark.slow
def test_a_full_disk_ends_in_one_line_and_what_was_drawn_is_kept(trained: Path, tmp_path: Path) -> None:
    words = ("run.py", "--checkpoint", trained, *ASKED, "--out", tmp_path)

    def cut_at(size: int) -> str:
        """What it says where no file may grow beyond that size."""
        process = start(*words, launcher=(sys.executable, "-c", LIMITED, str(size)))
        _, error = process.communicate(timeout=300)
        assert process.returncode == 2 and error.count("\n") == 1, error
        return error

    output = cut_at(10_000)
    assert re.match(rf"error: {tmp_path}/records/\S+/copy0.jsonl: .*; free some space", output)
    (file,) = tmp_path.glob("records/*/copy0.jsonl")
    kept = file.read_text().count("\n")
    assert 0 < kept < 48
    assert f"{kept} of 48 responses are cached" in run(*words)
    assert cut_at(500).startswith(f"error: {tmp_path}: File too large; free some space")


def test_a_mistake_ends_in_one_line_and_exit_code_2(tmp_path: Path) -> None:
    process = start("run.py", "--checkpoint", tmp_path, *ASKED)
    _, error = process.communicate(timeout=120)
    assert process.returncode == 2 and error.count("\n") == 1
    assert (
        error == f"error: {tmp_path}: no config.json; give the folder of a released or a Hugging Face model\n"
    )
