"""Crash loops, and the recorded attempts of a job."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from megatron_parallel_r1.cluster import __main__ as bookkeeping
from megatron_parallel_r1.cluster.attempts import (
    AttemptOutcome,
    JobAttempt,
    RankFailure,
    bad_nodes,
    begin_attempt,
    failures_without_progress,
    first_failure,
    read_attempts,
    steps_written,
    stops_without_progress,
)
from megatron_parallel_r1.cluster.job_spec import JobSpec
from megatron_parallel_r1.cluster.limits import slow_step_note
from megatron_parallel_r1.errors import UserError
from megatron_parallel_r1.evaluation.records import RecordFolder
from tests.curriculum.test_run import RECIPE
from tests.unit.evaluation.made import record

KILLED = """\
srun: error: n2: task 1: Killed
srun: launch/slurm: launch_p_step_launch: StepId=5.0 aborted before step completely launched.
srun: error: n1: task 0: Terminated
"""


@pytest.mark.parametrize(
    ("history", "count"),
    [
        ([], 0),
        ([("failed", 0)], 1),
        ([("failed", 4), ("failed", 4), ("failed", 3)], 3),
        ([("failed", 4), ("failed", 4), ("failed", 5)], 1),
        ([("failed", 4), ("stopped", 9), ("failed", 9)], 1),
        ([("failed", 4), ("stopped", 4), ("failed", 4), ("running", 4)], 2),
        ([("stopped", 3), ("stopped", 3), ("stopped", 3)], 0),
    ],
)
def test_failures_count_until_one_gets_further(history: list[tuple[AttemptOutcome, int]], count: int) -> None:
    assert failures_without_progress(JobAttempt(outcome, "", steps) for outcome, steps in history) == count


@pytest.mark.parametrize(
    ("stderr", "failure"),
    [
        ("", None),
        ("srun: Job 5 step creation temporarily disabled\n", None),
        (KILLED, RankFailure(1, None, "rank 1 on n2 was ended by a signal: Killed")),
        (
            "srun: error: n[1-2]: tasks 0-1: Exited with exit code 85\n",
            RankFailure(0, 85, "rank 0 on n[1-2] ended with exit code 85"),
        ),
        ("srun: error: Node failure on n2\n" + KILLED, RankFailure(None, None, "node n2 failed")),
    ],
)
def test_the_first_failure_is_the_cause(stderr: str, failure: RankFailure | None) -> None:
    assert first_failure(stderr) == failure


@pytest.mark.parametrize(
    ("reasons", "nodes"),
    [
        (["rank 3 on n1 ended with exit code 1: RuntimeError: CUDA error"] * 2, ["n1"]),
        (
            [
                "node n1 failed",
                "rank 0 on n2 ended with exit code 1",
                "rank 1 on n1 was ended by a signal: Killed",
            ],
            ["n1"],
        ),
        (["node n1 failed", "node n2 failed"], []),
        (["rank 0 on n1 ended with exit code 75: error: no rollout server usable"] * 2, []),
        (["rank 0 on n[1-2] ended with exit code 1", "the ranks ended with exit code 1"] * 2, []),
    ],
)
def test_a_node_is_bad_when_it_failed_first_in_two_attempts(reasons: list[str], nodes: list[str]) -> None:
    assert bad_nodes([JobAttempt("failed", why, 3) for why in reasons]) == nodes
    assert not bad_nodes([JobAttempt("stopped", why, 3) for why in reasons])


def test_an_attempt_that_never_ended_was_cut_off(tmp_path: Path) -> None:
    begin_attempt(tmp_path, steps=0)
    begin_attempt(tmp_path, steps=6)
    first, second = read_attempts(tmp_path)
    assert (first.outcome, first.steps) == ("failed", 6) and "lost node" in first.why
    assert second.outcome == "running"


def test_an_attempt_that_slurm_ended_was_stopped_unless_a_node_was_lost(tmp_path: Path) -> None:
    begin_attempt(tmp_path, steps=0)
    logs = tmp_path / "attempt0"
    logs.mkdir()
    (logs / "stopped").write_text("ended by SLURM: preempted\n")
    (logs / "srun_rank.log").write_text("srun: error: n1: task 0: Killed\n")
    before = (tmp_path / "attempts.json").read_text()
    assert begin_attempt(tmp_path, 3, logs)[0] == JobAttempt("stopped", "ended by SLURM: preempted", 3)
    (tmp_path / "attempts.json").write_text(before)
    (logs / "srun_rank.log").write_text("srun: error: Node failure on n2\n" + KILLED)
    assert begin_attempt(tmp_path, 3, logs)[0] == JobAttempt("failed", "node n2 failed", 3)


def test_stops_without_progress_are_bounded(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("PREEMPTED", "yes")
    arguments = [str(RECIPE), f"out={tmp_path}/runs"]
    for count, verdict in ((1, 85), (2, 2)):
        bookkeeping.begin(tmp_path, "curriculum", arguments, max_failures=1, max_stops=2)
        assert bookkeeping.end(tmp_path, tmp_path, "stop", 85, max_failures=1, max_stops=2) == verdict
        output = capsys.readouterr()
        if count == 1:
            assert "before the ranks started, stop 1 of 2 without progress; requeued" in output.out
    assert output.err.startswith("error: 2 stops (MAX_STOPS) without progress beyond 0 steps: ")


@pytest.mark.parametrize(
    ("limit_s", "preempted", "steps", "verdict"),
    [("350", "", 0, 2), ("350", "yes", 0, 85), ("350", "", 1, 85), ("900", "", 0, 85), ("", "", 0, 85)],
)
def test_a_time_limit_within_the_lead_of_the_signal_is_refused_by_its_first_stop(
    limit_s: str,
    preempted: str,
    steps: int,
    verdict: int,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.setenv("JOB_LIMIT_S", limit_s)
    monkeypatch.setenv("PREEMPTED", preempted)
    bookkeeping.begin(
        tmp_path, "curriculum", [str(RECIPE), f"out={tmp_path}/runs"], max_failures=3, max_stops=10
    )
    stage = tmp_path / "runs/mini/rl"
    stage.mkdir(parents=True)
    (stage / "metrics.jsonl").write_text("{}\n" * steps)
    assert bookkeeping.end(tmp_path, tmp_path, "rank", 85, max_failures=3, max_stops=10) == verdict
    message = "the time limit of 350 s leaves no time for a step: #SBATCH --signal stops the job 300 to 360 s"
    assert (f"error: {message}" in capsys.readouterr().err) == (verdict == 2)


def test_a_step_longer_than_the_lead_of_the_signal_is_said(tmp_path: Path) -> None:
    spec = JobSpec.read("rl", [str(RECIPE), f"out={tmp_path}"])
    assert slow_step_note(spec, 1, has_gpus=False, signal_s=300) is None
    (tmp_path / "mini/rl").mkdir(parents=True)
    records = (
        {"step": 1, "time_rollout_s": 250.0, "time_train_s": 207.0},
        {"step": 2, "time_rollout_s": 9.0},
    )
    (tmp_path / "mini/rl/metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in records))
    note = slow_step_note(spec, 1, has_gpus=False, signal_s=300) or ""
    assert note.startswith("note: a step takes up to 457 s (the last attempt)") and "USR1@685" in note
    assert slow_step_note(spec, 1, has_gpus=False, signal_s=600) is None


def test_the_plan_says_what_a_step_takes_on_gpus(tmp_path: Path) -> None:
    recipe = RECIPE.parents[2] / "recipes/qwen3_4b/curriculum.yaml"
    spec = JobSpec.read("rl", [str(recipe), "--stage", "rl_s1", f"out={tmp_path}"])
    assert "(`plan`)" in (slow_step_note(spec, 16, has_gpus=True, signal_s=30) or "")
    assert slow_step_note(spec, 16, has_gpus=False, signal_s=30) is None


def test_nodes_lost_repeatedly_without_progress_are_a_crash_loop(tmp_path: Path) -> None:
    arguments = [str(RECIPE), f"out={tmp_path}/runs"]
    for _ in range(2):
        bookkeeping.begin(tmp_path, "curriculum", arguments, max_failures=2, max_stops=10)
    with pytest.raises(UserError, match="crash loop: 2 failures without progress beyond 0 steps"):
        bookkeeping.begin(tmp_path, "curriculum", arguments, max_failures=2, max_stops=10)


@pytest.mark.parametrize(
    ("options", "out"),
    [((), "runs/eval"), (("--out", "own"), "own"), (("--mode", "majority@4", "--out=own"), "own")],
)
def test_an_evaluation_that_is_cut_off_goes_on_while_it_writes_records(
    options: tuple[str, ...], out: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    required = ["--checkpoint", "release", "--benchmarks", "embedded_hard"]
    for key in "abcd":
        bookkeeping.begin(tmp_path, "eval", [*required, *options], max_failures=2, max_stops=10)
        with RecordFolder(Path(out), ["weights"]).writer(0) as write:
            write(record(key))
    bookkeeping.begin(tmp_path, "eval", [*required, *options], max_failures=2, max_stops=10)
    with pytest.raises(UserError, match="crash loop: 2 failures without progress beyond 4 steps"):
        bookkeeping.begin(tmp_path, "eval", [*required, *options], max_failures=2, max_stops=10)


@pytest.mark.parametrize(
    ("code", "stderr", "verdict", "outcome"),
    [
        (0, "", 0, "done"),
        (85, "srun: error: n1: task 0: Exited with exit code 85\n", 85, "stopped"),
        (138, "srun: error: n1: task 0: User defined signal 1\n", 85, "stopped"),
        (138, "", 85, "stopped"),
        (140, "", 85, "stopped"),
        (137, KILLED, 75, "failed"),
        (137, "srun: error: n1: task 0: Exited with exit code 2\n" + KILLED, 2, "failed"),
        (1, "", 75, "failed"),
        (143, "srun: error: n1: task 0: Terminated\n", 85, "stopped"),  # an evaluation, preempted
    ],
)
def test_an_exit_code_decides_whether_a_job_is_requeued(
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    code: int,
    stderr: str,
    verdict: int,
    outcome: AttemptOutcome,
) -> None:
    logs = tmp_path / "attempt0"
    logs.mkdir()
    (logs / "srun_rank.log").write_text(stderr)
    (logs / "rank_1.log").write_text("one\ntwo\n")
    bookkeeping.begin(tmp_path, "eval", [], max_failures=3, max_stops=10)
    assert bookkeeping.end(tmp_path, logs, "rank", code, max_failures=3, max_stops=10) == verdict
    assert read_attempts(tmp_path)[-1].outcome == outcome
    assert ("    one\n    two" in capsys.readouterr().err) == (stderr == KILLED)


@pytest.mark.parametrize(
    ("history", "count"),
    [
        ([], 0),
        ([("stopped", 0), ("stopped", 0)], 2),
        ([("stopped", 5), ("stopped", 5), ("failed", 4), ("running", 5)], 1),
        ([("stopped", 5), ("stopped", 5), ("stopped", 6)], 0),
    ],
)
def test_stops_count_until_one_gets_further(history: list[tuple[AttemptOutcome, int]], count: int) -> None:
    assert stops_without_progress(JobAttempt(outcome, "", steps) for outcome, steps in history) == count


def test_steps_of_all_stages_are_counted(tmp_path: Path) -> None:
    for stage, count in (("cold_start", 3), ("rl", 2)):
        (tmp_path / stage).mkdir()
        (tmp_path / stage / "metrics.jsonl").write_text("{}\n" * count + '{"cut o')
    assert steps_written([tmp_path]) == 5
    assert steps_written([tmp_path / "rl"]) == 2
    assert steps_written([tmp_path, tmp_path / "rl"]) == 5
    assert steps_written([tmp_path / "absent"]) == 0
