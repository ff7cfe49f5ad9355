"""The five scripts on two nodes of a real SLURM."""

from __future__ import annotations

import os
import sys

import pytest

from tests.curriculum.test_run import steps_of
from tests.slurm.jobs import (
    HEADER,
    LAUNCH_TWO_NODES,
    ONE_NODE,
    RECIPE,
    REPOSITORY,
    RUN,
    SHORT,
    Site,
    ids_of,
    launch,
)

pytestmark = [pytest.mark.slow, pytest.mark.slurm]


def test_stages_one_by_one_and_an_evaluation(site: Site) -> None:
    words = (str(RECIPE), *SHORT, "stages.rl.steps=2", f"out={site.folder}/runs")
    # From another folder, without the environment: PYTHON and LOG_DIR are those of site.env.
    (site.folder / "logs").mkdir()
    script, header = str(REPOSITORY / "slurm/sft_stage.sh"), (*HEADER, "--export=NONE")
    site.finish(site.submit(script, *words, header=header, cwd=site.folder))
    site.finish(site.submit("rl_stage.sh", *words, "parallel.tensor=2"))  # a run may change its layout
    run = site.folder / "runs/mini"
    assert steps_of(run / "cold_start") == [1, 2, 3, 4] and steps_of(run / "rl") == [1, 2]
    evaluated = ("--checkpoint", str(run / "rl"), "--benchmarks", "embedded_hard", "--limit", "8")
    job = site.submit("eval.sh", *evaluated, "--out", str(site.folder / "evaluated"))
    site.finish(job)
    assert list((site.folder / "evaluated").rglob("*.md"))


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
    shell = f"{entered} bash {REPOSITORY}/slurm/rank.sh"
    assert rank.startswith(f"{shell} {sys.executable} -m megatron_parallel_r1.cli sft")
    assert end.startswith(f"{entered} {sys.executable} -m megatron_parallel_r1.cluster end")


def test_the_doctor_examines_all_nodes(site: Site) -> None:
    words = ("submit", "doctor", *LAUNCH_TWO_NODES, "--", "--engine", "native", "--out")
    (job,) = ids_of(launch(site, *words, str(site.folder / "runs")))
    site.finish(job)
    output = (site.folder / f"logs/submitit/{job}/{job}_0_log.out").read_text()
    assert "2 ranks on" in output and output.splitlines()[-1].startswith("ready"), output
    file = site.folder / "file"
    file.touch()
    job = site.submit("doctor.sh", "--engine", "native", "--out", str(file / "runs"))
    assert site.wait(job) == "FAILED"
    assert f"error: {file / 'runs'}: {file} is not a folder" in site.output(job)


def test_a_cancelled_job_leaves_no_process(site: Site) -> None:
    job = site.submit("curriculum.sh", *RUN, f"out={site.folder}/runs")
    site.wait(job, lambda: max(steps_of(site.folder / "runs/mini/cold_start"), default=0) >= 1)
    assert site.slurm.processes_of("n1") and site.slurm.processes_of("n2")
    site.slurm.client("scancel", job)
    assert site.wait(job) == "CANCELLED"
    site.assert_no_process_left()


SHAPES = (
    (
        ("--ntasks-per-node=2", "--ntasks=3"),
        "--ntasks=3, but 2 nodes of --ntasks-per-node=2 have 4 tasks; give --nodes and",
    ),
    ((":", *ONE_NODE), "a heterogeneous job has 2 parts, this script runs in one; drop the :"),
)
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
    header = (*HEADER, "--oversubscribe")  # side by side
    jobs = [site.submit(script, *words, header=header, **settings) for script, words, settings, _ in REFUSED]
    jobs += [site.submit("rl_stage.sh", str(RECIPE), header=(*header, *shape)) for shape, _ in SHAPES]
    for job, (*_, message) in zip(jobs, (*REFUSED, *SHAPES), strict=True):
        assert site.wait(job) == "FAILED"
        (line,) = site.output(job).splitlines()
        assert line.startswith("error: ") and message in line
        assert "ExitCode=2:0" in site.slurm.client("scontrol", "show", "job", job)
