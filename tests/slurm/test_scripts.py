"""The four scripts on two nodes of a real SLURM, undisturbed and disturbed."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from tests.curriculum.test_run import steps_of
from tests.parallel.launch import ENVIRONMENT
from tests.slurm.jobs import (
    FAILING,
    ONE_NODE,
    RECIPE,
    REPOSITORY,
    RUN,
    SHARES_UNDISTURBED,
    SHORT,
    Site,
    assert_equal,
)

pytestmark = [pytest.mark.slow, pytest.mark.slurm]


@SHARES_UNDISTURBED
def test_two_nodes_train_what_one_process_does(undisturbed: Path, tmp_path: Path) -> None:
    words = ("sft", str(RECIPE), *SHORT, "stages.cold_start.evaluate=false", f"out={tmp_path}")
    alone = subprocess.run(
        [sys.executable, "-m", "megatron_parallel_r1.cli", *words],
        cwd=REPOSITORY,
        env={**os.environ, **ENVIRONMENT},
        capture_output=True,
        timeout=500,
    )
    assert alone.returncode == 0, alone.stderr
    for name in ("loss", "grad_norm"):
        ours, theirs = (
            [record[name] for record in records(run / "cold_start")]
            for run in (undisturbed, tmp_path / "mini")
        )
        assert ours == pytest.approx(theirs, rel=1e-5)  # float32, summed in another order


def test_stages_one_by_one_and_an_evaluation(site: Site) -> None:
    words = (str(RECIPE), *SHORT, "stages.rl.steps=2", f"out={site.folder}/runs")
    site.finish(site.submit("sft_stage.sh", *words))
    site.finish(site.submit("rl_stage.sh", *words, "parallel.tensor=2"))  # a run may change its layout
    run = site.folder / "runs/mini"
    assert steps_of(run / "cold_start") == [1, 2, 3, 4] and steps_of(run / "rl") == [1, 2]
    evaluated = ("--checkpoint", str(run / "rl"), "--benchmarks", "embedded_hard", "--limit", "8")
    job = site.submit("eval.sh", *evaluated, "--out", str(site.folder / "evaluated"))
    site.finish(job)
    assert list((site.folder / "evaluated").rglob("*.md"))


@SHARES_UNDISTURBED
def test_a_stopped_job_saves_and_resumes(undisturbed: Path, site: Site) -> None:
    job = site.submit("curriculum.sh", *RUN, f"out={site.folder}/runs", HOLD="stop")
    run = site.folder / "runs/mini"
    site.wait_for_steps(job, [1, 2])
    # As the controller does --signal seconds before the time limit.
    site.slurm.client("scancel", "--signal=USR1", "--batch", job)
    site.wait(job, lambda: "stopped after 7 steps, saved; requeued" in site.output(job))  # 4 of them of SFT
    assert (run / "rl/checkpoints/step_000003").is_dir()
    site.finish(job)
    assert (site.logs(job) / "attempt1/rank_0.log").is_file()
    assert_equal(run, undisturbed)


@SHARES_UNDISTURBED
def test_a_job_resumes_elsewhere_when_its_node_crashes(undisturbed: Path, site: Site) -> None:
    job = site.submit("curriculum.sh", *RUN, "stages.rl.save_every=1", f"out={site.folder}/runs", HOLD="end")
    run = site.folder / "runs/mini"
    site.wait_for_steps(job, [1, 2])
    site.wait(job, lambda: (run / "rl/checkpoints/step_000001").is_dir())
    site.slurm.kill_node("n2")
    site.finish(job)
    attempts = json.loads((site.logs(job) / "attempts.json").read_text())
    assert [attempt["outcome"] for attempt in attempts] == ["failed", "done"]
    site.slurm.revive_node("n2")
    assert_equal(run, undisturbed)


def test_a_dead_rank_ends_the_job_and_its_last_lines_are_shown(site: Site) -> None:
    job = site.submit("curriculum.sh", *RUN, f"out={site.folder}/runs", MAX_FAILURES="1", HOLD="end")
    site.wait_for_steps(job, [1, 2])
    site.kill_rank(job, 1)
    assert site.wait(job) == "FAILED"
    output = site.output(job)
    assert "rank 1 on n2 was ended by a signal: Killed; its last lines" in output
    assert "crash loop: 1 failures" in output
    site.assert_no_process_left()


def test_a_crash_loop_is_given_up(site: Site) -> None:
    words = (str(RECIPE), *SHORT, FAILING, f"out={site.folder}/runs")
    job = site.submit("curriculum.sh", *words, header=ONE_NODE, MAX_FAILURES="2")
    assert site.wait(job) == "FAILED"
    output = site.output(job)
    assert "failed after 6 steps; requeued" in output
    assert "deliberate failure in the third step" in output  # the last lines of the rank's log
    assert "crash loop: 2 failures without progress beyond" in output


def test_a_step_longer_than_the_grace_time_is_cut_off(site: Site) -> None:
    words = (str(RECIPE), *SHORT, "stages.rl.steps=4", "stages.rl.save_every=1", f"out={site.folder}/runs")
    job = site.submit("curriculum.sh", *words, header=ONE_NODE, GRACE_S="2", HOLD="end")
    rl = site.folder / "runs/mini/rl"
    site.wait_for_steps(job, [1, 2])
    site.wait(job, lambda: (rl / "checkpoints/step_000001").is_dir())
    site.slurm.client("scancel", "--signal=USR1", "--batch", job)
    site.finish(job)
    assert "not saved within 2 s; requeued unsaved" in site.output(job)
    assert steps_of(rl) == [1, 2, 3, 4]


@SHARES_UNDISTURBED
def test_servers_that_do_not_come_up_end_the_job(undisturbed: Path, site: Site) -> None:
    shutil.copytree(undisturbed / "cold_start", site.folder / "runs/mini/cold_start")
    words = (str(RECIPE), *SHORT, f"out={site.folder}/runs")
    job = site.submit("rl_stage.sh", *words, ROLLOUT_NODES="1", ROLLOUT_PYTHON="no/python")
    assert site.wait(job) == "FAILED"
    output = site.output(job)
    assert "error: the rollout servers ended before they were ready" in output
    assert "rank 0 on n2 ended with exit code 2; its last lines" in output and "no/python" in output
    assert "ExitCode=2:0" in site.slurm.client("scontrol", "show", "job", job)
    site.assert_no_process_left()


@SHARES_UNDISTURBED
def test_lost_servers_are_started_anew(undisturbed: Path, site: Site) -> None:
    shutil.copytree(undisturbed / "cold_start", site.folder / "runs/mini/cold_start")
    words = (str(RECIPE), *SHORT, f"out={site.folder}/runs", "thinking.mode=replay", "rollout.patience_s=1")
    engine = {"ROLLOUT_PYTHON": "tests/slurm/standins/engine", "ROLLOUT_SERVERS": "1"}
    job = site.submit("rl_stage.sh", *words, ROLLOUT_NODES="1", MAX_FAILURES="2", **engine)
    assert site.wait(job) == "FAILED"
    output = site.output(job)
    assert "failed after 0 steps; requeued" in output and "crash loop: 2 failures" in output
    assert output.count("error: no rollout server can be asked since") == 2
    assert (site.logs(job) / "attempt1/urls").is_file()
    site.assert_no_process_left()


def test_a_container_is_entered_for_bookkeeping_and_ranks(site: Site) -> None:
    image, calls = site.folder / "image.sif", site.folder / "calls"
    image.touch()
    fake = {
        "PATH": f"{REPOSITORY}/tests/slurm/standins:{os.environ['PATH']}",
        "APPTAINER_CALLS": str(calls),
    }
    words = (str(RECIPE), "stages.cold_start.steps=1", "stages.cold_start.evaluate=false")
    job = site.submit(
        "sft_stage.sh", *words, f"out={site.folder}/runs", header=ONE_NODE, CONTAINER=str(image), **fake
    )
    site.finish(job)
    entered = f"exec --nv --bind {REPOSITORY}:{REPOSITORY} --pwd {REPOSITORY} {image}"
    begin, rank, end = calls.read_text().splitlines()
    assert begin.startswith(f"{entered} {sys.executable} -m megatron_parallel_r1.cluster begin")
    assert rank.startswith(f"{entered} bash slurm/rank.sh {sys.executable} -m megatron_parallel_r1.cli sft")
    assert end.startswith(f"{entered} {sys.executable} -m megatron_parallel_r1.cluster end")


def test_a_cancelled_job_leaves_no_process(site: Site) -> None:
    job = site.submit("curriculum.sh", *RUN, f"out={site.folder}/runs")
    site.wait(job, lambda: max(steps_of(site.folder / "runs/mini/cold_start"), default=0) >= 1)
    assert site.slurm.processes_of("n1") and site.slurm.processes_of("n2")
    site.slurm.client("scancel", job)
    assert site.wait(job) == "CANCELLED"
    site.assert_no_process_left()


REFUSED = (
    ("rl_stage.sh", ("nowhere.yaml",), {}, "nowhere.yaml: No such file or directory; give the path"),
    ("rl_stage.sh", (str(RECIPE), "--stage", "sft"), {}, "no rl stage is called sft; it has rl"),
    ("curriculum.sh", (str(RECIPE), "--fresh"), {}, "--fresh: a requeued job would start over"),
    ("sft_stage.sh", (str(RECIPE),), {"CONTAINER": "gone.sif"}, "CONTAINER=gone.sif: no such file"),
    (
        "rl_stage.sh",
        (str(RECIPE),),
        {"ROLLOUT_NODES": "2"},
        "ROLLOUT_NODES=2 of 2 nodes leaves none for training",
    ),
)


def test_invalid_jobs_are_refused_in_one_line(site: Site) -> None:
    jobs = [site.submit(script, *words, **settings) for script, words, settings, _ in REFUSED]
    for job, (*_, message) in zip(jobs, REFUSED, strict=True):
        assert site.wait(job) == "FAILED"
        (line,) = site.output(job).splitlines()
        assert line.startswith("error: ") and message in line
        assert "ExitCode=2:0" in site.slurm.client("scontrol", "show", "job", job)


def records(stage: Path) -> list[dict[str, float]]:
    return [json.loads(line) for line in (stage / "metrics.jsonl").read_text().splitlines()]
