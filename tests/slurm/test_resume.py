"""Runs that are disturbed and resume, compared with an undisturbed run, which these tests share."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from tests.parallel.launch import ENVIRONMENT
from tests.slurm.jobs import (
    LAUNCH_TWO_NODES,
    PATIENCE_S,
    RECIPE,
    REPOSITORY,
    RUN,
    SHORT,
    Site,
    assert_equal,
    ids_of,
    launch,
)

pytestmark = [pytest.mark.slow, pytest.mark.slurm]


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


def test_a_curriculum_is_a_chain_of_jobs_that_survive_preemption(undisturbed: Path, site: Site) -> None:
    jobs = ids_of(
        launch(
            site, "curriculum", *RUN, f"out={site.folder}/runs", *LAUNCH_TWO_NODES, HOLD="stop", GRACE_S="2"
        )
    )
    assert len(jobs) == 3
    run = site.folder / "runs/mini"
    site.wait_for_steps(jobs[1], [1, 2])
    # The controller is away when the job asks to be requeued: srun waits for it, too, so the grace ends.
    site.slurm.stop_controller()
    back = time.monotonic() + 60
    site.batch_shell(jobs[1]).send_signal(signal.SIGUSR2)
    log = site.folder / f"logs/submitit/{jobs[1]}/{jobs[1]}_0_log.out"
    site.slurm.wait_for(lambda: "the controller does not answer" in log.read_text(), "a requeue", PATIENCE_S)
    saved = run / "rl/checkpoints/step_000003"
    site.slurm.wait_for(saved.is_dir, "the step under way", PATIENCE_S)
    time.sleep(max(0, back - time.monotonic()))  # a minute: the job asks again until then
    site.slurm.start_controller()
    site.wait(jobs[2])
    output = launch(site, "status")
    assert [line.split()[:3] for line in output.splitlines()] == [
        [job, f"mini-{name}", "COMPLETED"]
        for job, name in zip(jobs, ("cold_start", "rl", "release"), strict=True)
    ]
    attempts = json.loads((site.logs(jobs[1]) / "attempts.json").read_text())
    assert [attempt["outcome"] for attempt in attempts] == ["stopped", "done"]
    assert_equal(run, undisturbed)
    assert "rl  step 6/6" in launch(site, "logs", jobs[1])


def test_a_job_stopped_by_its_time_limit_resumes_beside_a_drained_node(undisturbed: Path, site: Site) -> None:
    job = site.submit("curriculum.sh", *RUN, f"out={site.folder}/runs", HOLD="stop")
    run = site.folder / "runs/mini"
    site.wait_for_steps(job, [1, 2])
    site.slurm.client("scontrol", "update", "nodename=n2", "state=drain", "reason=test")
    site.slurm.client("scontrol", "update", f"jobid={job}", "timelimit=6")  # less --signal: now
    site.wait(job, lambda: "stopped after 7 steps, saved; requeued" in site.output(job))  # 4 of them of SFT
    site.slurm.client("scontrol", "update", f"jobid={job}", "timelimit=60")
    assert (run / "rl/checkpoints/step_000003").is_dir()
    site.finish(job)
    assert (site.logs(job) / "attempt1/rank_0.log").is_file()
    assert site.node_of(job) == "n[1,3]"
    site.slurm.client("scontrol", "update", "nodename=n2", "state=resume")
    assert_equal(run, undisturbed)


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


def records(stage: Path) -> list[dict[str, float]]:
    return [json.loads(line) for line in (stage / "metrics.jsonl").read_text().splitlines()]
