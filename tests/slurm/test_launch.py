"""`slurm/launch.py` with the SLURM executor of submitit."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys

import pytest

from tests.curriculum.test_run import steps_of
from tests.slurm.jobs import (
    FAILING,
    LAUNCH_ONE_NODE,
    LAUNCH_TWO_NODES,
    RECIPE,
    REPOSITORY,
    RUN,
    SHORT,
    Site,
    branched_recipe,
    ids_of,
    launch,
    launch_environment,
)

pytestmark = [pytest.mark.slow, pytest.mark.slurm]


def test_a_failed_stage_ends_what_depends_on_it_with_its_reason(site: Site) -> None:
    words = (FAILING, f"out={site.folder}/runs")
    recipe = str(branched_recipe(site.folder))
    output = launch(site, "curriculum", recipe, *SHORT, *words, *LAUNCH_ONE_NODE, MAX_FAILURES="1")
    jobs = ids_of(output)
    assert site.wait(jobs[2]) == "COMPLETED"
    assert site.wait(jobs[3]) == "CANCELLED"
    first, second, third, fourth = launch(site, "status").splitlines()
    assert "COMPLETED" in first and "FAILED" in second and "COMPLETED" in third and "CANCELLED" in fourth
    assert re.search(r"rank 0 on n\d ended with exit code 1", second)
    assert f"depends on mini-rl (job {jobs[1]}), which is FAILED" in fourth
    assert steps_of(site.folder / "runs/mini/rl_again") == [1, 2]
    assert "deliberate failure in the third step" in launch(site, "logs", jobs[1])
    assert not (site.folder / "runs/mini/release").exists()
    expected = ("COMPLETED", "FAILED", "COMPLETED", "CANCELLED")
    site.slurm.wait_for(lambda: states_from_accounting(site, len(jobs)) == expected, "accounting")


def states_from_accounting(site: Site, jobs: int) -> tuple[str, ...]:
    """The states that `status` shows once the controller has forgotten the jobs."""
    forgetful = site.folder / "forgetful"
    forgetful.mkdir(exist_ok=True)
    (forgetful / "squeue").write_text("#!/bin/sh\nexit 1\n")
    (forgetful / "squeue").chmod(0o755)
    lines = launch(site, "status", PATH=f"{forgetful}:{os.environ['PATH']}").splitlines()
    assert len(lines) == jobs
    return tuple(line.split()[2] for line in lines)


def test_a_sweep_is_an_array_whose_members_share_a_finished_stage(site: Site) -> None:
    words = (str(RECIPE), *SHORT, "stages.rl.steps=4", f"out={site.folder}/runs", *LAUNCH_ONE_NODE)
    (base,) = ids_of(launch(site, "submit", "sft", *words))
    assert site.wait(base) == "COMPLETED"
    output = launch(site, "submit", "rl", *words, "--sweep", "seed=1,2", HOLD="stop")
    first, second = ids_of(output)
    assert first.endswith("_0") and second == first.replace("_0", "_1")
    runs = {job: site.folder / f"runs/mini_seed{seed}" for seed, job in enumerate((first, second), 1)}
    for job, run in runs.items():
        site.wait(job, lambda run=run: steps_of(run / "rl") == [1, 2])
    # The last task, whose SLURM_JOB_ID is that of the array: the requeue is its own.
    for stopped, other in ((second, ["running"]), (first, ["stopped", "done"])):
        site.slurm.client("scancel", "--signal=USR2", "--batch", stopped)
        site.finish(stopped)
        assert outcomes(site, stopped) == ["stopped", "done"]
        assert outcomes(site, first if stopped == second else second) == other
    for run in runs.values():
        assert steps_of(run / "rl") == [1, 2, 3, 4] and not (run / "cold_start").exists()


def outcomes(site: Site, job: str) -> list[str]:
    return [attempt["outcome"] for attempt in json.loads((site.logs(job) / "attempts.json").read_text())]


def test_cancelled_jobs_end(site: Site) -> None:
    jobs = ids_of(launch(site, "curriculum", *RUN, f"out={site.folder}/runs", *LAUNCH_TWO_NODES))
    site.wait(jobs[0], lambda: site.state(jobs[0]) == "RUNNING")
    assert len(launch(site, "cancel").splitlines()) == 3
    assert [site.wait(job) for job in jobs] == ["CANCELLED"] * 3
    site.assert_no_process_left()


def test_a_dry_run_prints_the_job_and_submits_nothing(site: Site) -> None:
    done = subprocess.run(
        [sys.executable, "slurm/launch.py", "submit", "rl", *RUN, *LAUNCH_TWO_NODES, "--dry-run"],
        cwd=REPOSITORY,
        env={**os.environ, **launch_environment(site)},
        capture_output=True,
        text=True,
        timeout=500,
    )
    assert done.returncode == 0, done.stderr
    for line in ("--nodes=2", "--ntasks-per-node=1", "--signal=B:USR2@300", "--time=60", "--requeue"):
        assert f"#SBATCH {line}\n" in done.stdout
    assert f"# runs: bash slurm/rl_stage.sh {RECIPE}" in done.stdout
    assert site.slurm.client("squeue", "--noheader") == ""


@pytest.mark.parametrize(
    ("words", "settings", "message"),
    [
        (("submit", "rl", "nowhere.yaml"), {}, "nowhere.yaml: No such file or directory"),
        (("submit", "rl", str(RECIPE), "stages.rl.prompts_per_step=0"), {}, "prompts"),
        (("submit", "rl", str(RECIPE), "--partition", "gold"), {}, "SLURM rejects the job: "),
        (("submit", "rl", str(RECIPE), "--nodes", "9"), {}, "SLURM rejects the job: "),
        (("submit", "rl", str(RECIPE)), {"CONTAINER": "gone.sif"}, "CONTAINER=gone.sif: no such file"),
        (
            ("submit", "rl", str(RECIPE)),
            {"ROLLOUT_NODES": "2"},
            "ROLLOUT_NODES=2 of 2 nodes leaves none for training",
        ),
        (("submit", "rl", str(RECIPE)), {"PYTHON": "no/python"}, "PYTHON=no/python: no such program"),
        (("submit", "rl", str(RECIPE)), {"MAX_FAILURES": "few"}, "MAX_FAILURES=few is not an integer"),
        (("submit", "rl", str(RECIPE), "--time", "soon"), {}, "--time soon: write minutes, H:M:S or D-H"),
        (("submit", "serve", str(RECIPE)), {}, "unknown kind of job serve"),
        (
            ("submit", "rl", str(RECIPE), "--sweep", "seed=1,1"),
            {},
            "mini_seed1 and mini_seed1 would train",
        ),
        (
            ("submit", "rl", str(RECIPE), "out=nowhere", "--sweep", "seed=1,2"),
            {},
            "which is not finished; run",
        ),
        (
            ("submit", "rl", str(RECIPE), "--time", "5"),
            {},
            "the time limit of 300 s leaves no time for",
        ),
        (("cancel", "12345"), {}, "unknown job 12345"),
    ],
)
def test_invalid_jobs_are_refused_before_submission(
    site: Site, words: tuple[str, ...], settings: dict[str, str], message: str
) -> None:
    size = LAUNCH_TWO_NODES if words[0] == "submit" else ()
    # Of repeated options the last one counts.
    output = launch(site, *words[:1], *size, *words[1:], code=2, **settings)
    assert message in output and len(output.splitlines()) == 1, output
    assert site.slurm.client("squeue", "--noheader") == ""
