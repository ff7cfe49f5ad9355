"""What is read of a site's files, of a job's words, and of a sweep."""

from __future__ import annotations

import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest

from megatron_parallel_r1.cluster.command import swept
from megatron_parallel_r1.cluster.job_spec import Order
from megatron_parallel_r1.cluster.site import (
    SCRIPTS,
    check_site,
    minutes_of,
    read_header,
    read_site,
)
from megatron_parallel_r1.cluster.submission import wished_minutes
from megatron_parallel_r1.errors import UserError
from tests.curriculum.test_run import RECIPE

SLURM = Path(__file__).resolve().parents[3] / "slurm"


@pytest.mark.parametrize("script", SCRIPTS.values())
def test_the_headers_of_the_scripts_are_read(script: str) -> None:
    header = read_header(SLURM / script)
    assert header.ranks_per_node == header.gpus_per_node == 8
    assert header.signal_s == 300 and header.more["requeue"] is True
    assert "account" not in header.more  # a site takes its second # away


def lines(folder: Path, *said: str) -> Path:
    """A script with these #SBATCH lines, and one behind its first command, where none counts."""
    script = folder / "job.sh"
    script.write_text(
        "#!/bin/bash\n" + "".join(f"#SBATCH {line}\n" for line in said) + "exit\n#SBATCH --nodes=9\n"
    )
    return script


@pytest.mark.parametrize(
    "said",
    [
        ("--nodes=4", "--cpus-per-task=6", "--time=90", "--account=acc", "--partition=gpu", "--job-name=x"),
        ("--nodes 4", "--cpus-per-task 6", "--time 1:30:00", "--account acc", "--partition gpu"),
        ("-N 4 # of the small ones", "-c 6", "-t 90", "-A acc", "-p gpu", "-J x", "-o %j.out"),
        ("-N4 -c6 -t90 -Aacc", "-p 'gpu'"),
    ],
)
def test_headers_are_read_as_sbatch_reads_them(said: tuple[str, ...], tmp_path: Path) -> None:
    header = read_header(lines(tmp_path, *said, "--requeue --nice -5", "--exclusive"))
    assert (header.nodes, header.cpus_per_rank, header.minutes) == (4, 6, 90)
    more = {"account": "acc", "partition": "gpu", "requeue": True, "nice": "-5", "exclusive": True}
    assert header.more == more


def test_gpus_may_be_of_a_type(tmp_path: Path) -> None:
    header = read_header(lines(tmp_path, "--gpus-per-node=h100:8"))
    assert (header.gpu_type, header.gpus_per_node) == ("h100:", 8)


@pytest.mark.parametrize(
    ("line", "named"),
    [
        ("nodes=4", "#SBATCH nodes=4: nodes=4 is no option; write --name=value"),
        ("-n 8", "-n is no option"),
        ("--nodes 4 5", "5 is no option"),
        ("--comment='open", "#SBATCH --comment='open: No closing quotation"),
        ("--nodes=four", "no number where one belongs"),
        ("--nodes", "no number where one belongs"),
        ("--gpus-per-node=h100", "no number where one belongs (--gpus-per-node)"),
        ("--gpus-per-node=h100:4,a100:4", "no number where one belongs (--gpus-per-node)"),
    ],
)
def test_a_header_that_cannot_be_read_is_refused(line: str, named: str, tmp_path: Path) -> None:
    with pytest.raises(UserError) as refused:
        read_header(lines(tmp_path, line))
    assert named in str(refused.value)


def test_a_site_that_is_not_as_it_says_is_refused() -> None:
    site, header = read_site(SLURM) | {"PYTHON": "bash"}, read_header(SLURM / "rl_stage.sh")
    check_site(site, header)
    for wrong in (
        {"CONTAINER": "gone.sqsh"},
        {"ROLLOUT_NODES": "2"},
        {"GRACE_S": "300"},
        {"GRACE_S": "soon"},
        {"MAX_FAILURES": "0"},
        {"ROLLOUT_SERVERS": "none"},
        {"PYTHON": "no/one"},
    ):
        with pytest.raises(UserError, match=next(iter(wrong))):
            check_site(site | wrong, header)
    check_site(site | {"ROLLOUT_NODES": "2"}, replace(header, nodes=3))


def test_servers_that_could_not_start_are_refused() -> None:
    site, header = read_site(SLURM) | {"PYTHON": "bash"}, read_header(SLURM / "rl_stage.sh")
    for wrong in (
        {"ROLLOUT_ENGINE": "sglnag"},
        {"ROLLOUT_PYTHON": "no/one"},
        {"ROLLOUT_SERVERS": "4", "ROLLOUT_TENSOR": "3"},
    ):
        check_site(site | wrong, header)  # no one asks for them
        with pytest.raises(UserError, match=next(iter(wrong))):
            check_site(site | wrong | {"ROLLOUT_NODES": "1"}, header)
    for right in (
        {"ROLLOUT_PYTHON": "/on/nodes/alone"},
        {"ROLLOUT_PYTHON": "in/the/image", "CONTAINER": "registry/image"},
        {"ROLLOUT_SERVERS": "4", "ROLLOUT_TENSOR": "2"},
    ):
        check_site(site | right | {"ROLLOUT_NODES": "1"}, header)
    check_site(site | {"ROLLOUT_NODES": "1", "ROLLOUT_TENSOR": "3"}, replace(header, gpus_per_node=0))


def test_the_environment_goes_before_the_file(monkeypatch: pytest.MonkeyPatch) -> None:
    assert read_site(SLURM)["MAX_FAILURES"] == "3"
    monkeypatch.setenv("MAX_FAILURES", "7")
    assert read_site(SLURM)["MAX_FAILURES"] == "7"


@pytest.mark.parametrize(
    ("time", "minutes"),
    [("90", 90), ("90:30", 90), ("24:00:00", 1440), ("2-0", 2880), ("1-12:30", 2190), ("1-12:30:59", 2190)],
)
def test_times_are_read_as_slurm_writes_them(time: str, minutes: int) -> None:
    assert minutes_of(time) == minutes


@pytest.mark.parametrize("time", ["soon", "1:2:3:4", "2-", "1h", ""])
def test_what_is_no_time_is_refused(time: str) -> None:
    with pytest.raises(UserError, match=f"--time {time}: write minutes"):
        wished_minutes(time)


def test_an_order_knows_where_its_steps_are_written() -> None:
    assert Order.read("rl", [str(RECIPE), "out=x", "name=y"]).folders == (Path("x/y/rl"),)
    assert Order.read("curriculum", [str(RECIPE), "out=x", "seeds=[1,2]"]).folders == (
        Path("x/mini/seed1"),
        Path("x/mini/seed2"),
    )


@pytest.mark.parametrize(
    ("kind", "words", "message"),
    [
        ("rl", [str(RECIPE), "--stage", "cold_start"], "no rl stage is called cold_start; it has rl"),
        ("rl", [str(RECIPE), "--fresh"], "--fresh: a requeued job would begin anew"),
        ("rl", [str(RECIPE), "--gpus", "3"], "give RECIPE"),
        ("rl", [], "give RECIPE"),
    ],
)
def test_an_order_that_cannot_run_is_refused(kind: str, words: list[str], message: str) -> None:
    with pytest.raises(UserError, match=message):
        Order.read(kind, words)


def test_a_job_begins_without_waiting_for_torch() -> None:
    """Its script reads the recipe before it starts a rank; torch takes most of what Python needs to start."""
    program = "import sys, megatron_parallel_r1.cluster.job_spec; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", program], timeout=100).returncode == 0


def test_the_file_of_one_stage_stands_for_it(tmp_path: Path) -> None:
    (tmp_path / "whole.yaml").write_text(RECIPE.read_text())
    (tmp_path / "rl.yaml").write_text("recipe: whole.yaml\nstage: rl\n")
    one = str(tmp_path / "rl.yaml")
    assert Order.read("rl", [one, "seed=4"]).stage == "rl"
    with pytest.raises(UserError, match="no sft stage is called rl; it has cold_start"):
        Order.read("sft", [one])
    with pytest.raises(UserError, match=r"the stage rl alone; .* or take .*whole\.yaml"):
        Order.read("curriculum", [one])
    (tmp_path / "rl.yaml").write_text("recipe: whole.yaml\n")
    with pytest.raises(UserError, match="has two keys"):
        Order.read("rl", [one])


def test_a_sweep_takes_all_pairs_each_under_a_name_of_its_own() -> None:
    assert swept(str(RECIPE), (), ()) == [[]]
    assert swept(str(RECIPE), ("name=base",), ("seed=1,2", "stages.rl.steps=5")) == [
        ["seed=1", "stages.rl.steps=5", "name=base_seed1_steps5"],
        ["seed=2", "stages.rl.steps=5", "name=base_seed2_steps5"],
    ]
    with pytest.raises(UserError, match="write KEY=A,B"):
        swept(str(RECIPE), (), ("seed",))
