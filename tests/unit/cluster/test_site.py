"""Parsing of site.env, #SBATCH lines, job arguments and sweeps."""

from __future__ import annotations

import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest

from megatron_parallel_r1.cluster.job_spec import (
    JobSpec,
    check_sweep,
    server_arguments,
    shared_start,
    sweep_overrides,
)
from megatron_parallel_r1.cluster.site import (
    SCRIPTS,
    check_site,
    parse_minutes,
    read_header,
    read_site,
)
from megatron_parallel_r1.cluster.submission import requested_minutes
from megatron_parallel_r1.errors import UserError
from tests.curriculum.test_run import RECIPE

SLURM = Path(__file__).resolve().parents[3] / "slurm"


@pytest.mark.parametrize("script", SCRIPTS.values())
def test_the_headers_of_the_scripts_are_read(script: str) -> None:
    header = read_header(SLURM / script)
    assert header.ranks_per_node == header.gpus_per_node == 8
    if script == "doctor.sh":
        assert header.more["no-requeue"] is True
    else:
        assert header.signal_s == 300 and header.more["requeue"] is True
    assert header.more["exclusive"] is True and header.more["mem"] == "0"
    assert "account" not in header.more  # a site takes its second # away


def write_script(folder: Path, *lines: str) -> Path:
    """A script with these #SBATCH lines, and one after the first command, which sbatch ignores."""
    script = folder / "job.sh"
    script.write_text(
        "#!/bin/bash\n" + "".join(f"#SBATCH {line}\n" for line in lines) + "exit\n#SBATCH --nodes=9\n"
    )
    return script


@pytest.mark.parametrize(
    "lines",
    [
        ("--nodes=4", "--cpus-per-task=6", "--time=90", "--account=acc", "--partition=gpu", "--job-name=x"),
        ("--nodes 4", "--cpus-per-task 6", "--time 1:30:00", "--account acc", "--partition gpu"),
        ("-N 4 # of the small ones", "-c 6", "-t 90", "-A acc", "-p gpu", "-J x", "-o %j.out"),
        ("-N4 -c6 -t90 -Aacc", "-p 'gpu'"),
    ],
)
def test_headers_are_read_as_sbatch_reads_them(lines: tuple[str, ...], tmp_path: Path) -> None:
    header = read_header(write_script(tmp_path, *lines, "--requeue --nice -5", "--exclusive"))
    assert (header.nodes, header.cpus_per_rank, header.minutes) == (4, 6, 90)
    more = {"account": "acc", "partition": "gpu", "requeue": True, "nice": "-5", "exclusive": True}
    assert header.more == more


def test_gpus_may_have_a_type(tmp_path: Path) -> None:
    header = read_header(write_script(tmp_path, "--gpus-per-node=h100:8"))
    assert (header.gpu_type, header.gpus_per_node) == ("h100:", 8)


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("nodes=4", "#SBATCH nodes=4: nodes=4 is not an option; write --name=value"),
        ("-n 8", "-n is not an option"),
        ("--nodes 4 5", "5 is not an option"),
        ("--comment='open", "#SBATCH --comment='open: No closing quotation"),
        ("--nodes=four", "lacks a number"),
        ("--nodes", "lacks a number"),
        ("--gpus-per-node=h100", "lacks a number (--gpus-per-node)"),
        ("--gpus-per-node=h100:4,a100:4", "lacks a number (--gpus-per-node)"),
    ],
)
def test_a_header_that_cannot_be_read_is_refused(line: str, message: str, tmp_path: Path) -> None:
    with pytest.raises(UserError) as refused:
        read_header(write_script(tmp_path, line))
    assert message in str(refused.value)


def test_invalid_site_settings_are_refused() -> None:
    site, header = read_site(SLURM) | {"PYTHON": "bash"}, read_header(SLURM / "rl_stage.sh")
    check_site(site, header)
    for wrong in (
        {"CONTAINER": "gone.sqsh"},
        {"ROLLOUT_NODES": "2"},
        {"GRACE_S": "300"},
        {"GRACE_S": "soon"},
        {"MAX_FAILURES": "0"},
        {"ROLLOUT_SERVERS": "none"},
        {"PYTHON": "no/such"},
    ):
        with pytest.raises(UserError, match=next(iter(wrong))):
            check_site(site | wrong, header)
    check_site(site | {"ROLLOUT_NODES": "2"}, replace(header, nodes=3))


def test_invalid_server_settings_are_refused() -> None:
    site, header = read_site(SLURM) | {"PYTHON": "bash"}, read_header(SLURM / "rl_stage.sh")
    for wrong in (
        {"ROLLOUT_ENGINE": "sglnag"},
        {"ROLLOUT_PYTHON": "no/such"},
        {"ROLLOUT_SERVERS": "4", "ROLLOUT_TENSOR": "3"},
        {"ROLLOUT_SERVERS": "1", "ROLLOUT_TENSOR": "12"},
        {"ROLLOUT_SERVERS": "1", "ROLLOUT_TENSOR": "16", "ROLLOUT_ENGINE": "vllm"},
    ):
        check_site(site | wrong, header)  # without servers they do not matter
        with pytest.raises(UserError, match=next(iter(wrong))):
            check_site(site | wrong | {"ROLLOUT_NODES": "1"}, header)
    for right in (
        {"ROLLOUT_PYTHON": "/on/nodes/alone"},
        {"ROLLOUT_PYTHON": "in/the/image", "CONTAINER": "registry/image"},
        {"ROLLOUT_SERVERS": "4", "ROLLOUT_TENSOR": "2"},
    ):
        check_site(site | right | {"ROLLOUT_NODES": "1"}, header)
    check_site(site | {"ROLLOUT_NODES": "1", "ROLLOUT_TENSOR": "3"}, replace(header, gpus_per_node=0))
    # One server over two nodes of eight GPUs.
    over, header = {"ROLLOUT_SERVERS": "1", "ROLLOUT_TENSOR": "16"}, replace(header, nodes=6)
    check_site(site | over | {"ROLLOUT_NODES": "4"}, header)
    with pytest.raises(UserError, match="ROLLOUT_NODES=3 is not a multiple of the 2 nodes that a server"):
        check_site(site | over | {"ROLLOUT_NODES": "3"}, header)


def test_the_environment_overrides_the_file(monkeypatch: pytest.MonkeyPatch) -> None:
    assert read_site(SLURM)["MAX_FAILURES"] == "3"
    monkeypatch.setenv("MAX_FAILURES", "7")
    assert read_site(SLURM)["MAX_FAILURES"] == "7"


@pytest.mark.parametrize(
    ("time", "minutes"),
    [("90", 90), ("90:30", 90), ("24:00:00", 1440), ("2-0", 2880), ("1-12:30", 2190), ("1-12:30:59", 2190)],
)
def test_times_are_read_as_slurm_writes_them(time: str, minutes: int) -> None:
    assert parse_minutes(time) == minutes


@pytest.mark.parametrize("time", ["soon", "1:2:3:4", "2-", "1h", ""])
def test_a_malformed_time_is_refused(time: str) -> None:
    with pytest.raises(UserError, match=f"--time {time}: write minutes"):
        requested_minutes(time)


def test_a_job_spec_knows_its_step_folders() -> None:
    assert JobSpec.read("rl", [str(RECIPE), "out=x", "name=y"]).folders == (Path("x/y/rl"),)
    assert JobSpec.read("curriculum", [str(RECIPE), "out=x", "seeds=[1,2]"]).folders == (
        Path("x/mini/seed1"),
        Path("x/mini/seed2"),
    )


@pytest.mark.parametrize(
    ("kind", "arguments", "message"),
    [
        ("rl", [str(RECIPE), "--stage", "cold_start"], "no rl stage is called cold_start; it has rl"),
        ("rl", [str(RECIPE), "--fresh"], "--fresh: a requeued job would start over"),
        ("rl", [str(RECIPE), "--gpus", "3"], "give RECIPE"),
        ("rl", [], "give RECIPE"),
    ],
)
def test_invalid_job_arguments_are_refused(kind: str, arguments: list[str], message: str) -> None:
    with pytest.raises(UserError, match=message):
        JobSpec.read(kind, arguments)


def test_torch_is_not_imported() -> None:
    """Neither the bookkeeping of a job nor its submission imports torch."""
    rooms = "job_spec, __main__, command, job_registry, submission"
    program = (
        f"import sys; from megatron_parallel_r1.cluster import {rooms}; sys.exit('torch' in sys.modules)"
    )
    assert subprocess.run([sys.executable, "-c", program], timeout=100).returncode == 0


def test_the_file_of_one_stage_selects_it(tmp_path: Path) -> None:
    (tmp_path / "whole.yaml").write_text(RECIPE.read_text())
    (tmp_path / "rl.yaml").write_text("recipe: whole.yaml\nstage: rl\n")
    stage_file = str(tmp_path / "rl.yaml")
    assert JobSpec.read("rl", [stage_file, "seed=4"]).stage == "rl"
    with pytest.raises(UserError, match="no sft stage is called rl; it has cold_start"):
        JobSpec.read("sft", [stage_file])
    with pytest.raises(UserError, match=r"the stage rl alone; .* or take .*whole\.yaml"):
        JobSpec.read("curriculum", [stage_file])
    (tmp_path / "rl.yaml").write_text("recipe: whole.yaml\n")
    with pytest.raises(UserError, match="or the keys that it changes"):
        JobSpec.read("rl", [stage_file])


def test_sweeps_span_their_product_under_names_of_their_own() -> None:
    assert sweep_overrides(RECIPE, (), ()) == [[]]
    assert sweep_overrides(RECIPE, ("name=base",), ("seed=1,2", "stages.rl.steps=5")) == [
        ["seed=1", "stages.rl.steps=5", "name=base_seed1_steps5"],
        ["seed=2", "stages.rl.steps=5", "name=base_seed2_steps5"],
    ]
    with pytest.raises(UserError, match="write KEY=A,B"):
        sweep_overrides(RECIPE, (), ("seed",))


@pytest.mark.parametrize(
    ("sweeps", "names"),
    [
        (("seed=1,1",), "mini_seed1 and mini_seed1"),
        (("stages.rl.optimizer.lr=1e-3,0.001",), "mini_lr1e-3 and mini_lr0.001"),
        (("stages.cold_start.steps=3,4",), "mini_steps3 and mini_steps4"),  # another stage's key
        (("name=a,b",), "mini_namea and mini_nameb"),
    ],
)
def test_members_that_would_train_the_same_are_refused(sweeps: tuple[str, ...], names: str) -> None:
    members = [JobSpec.read("rl", [str(RECIPE), *extra]) for extra in sweep_overrides(RECIPE, (), sweeps)]
    with pytest.raises(UserError, match=f"--sweep: {names} would train the same; .* stage rl depends on"):
        check_sweep(members)


def test_a_stage_is_swept_from_what_one_run_has_finished(tmp_path: Path) -> None:
    words = (str(RECIPE), f"out={tmp_path}")
    assert shared_start(JobSpec.read("sft", words)) == shared_start(JobSpec.read("curriculum", words)) == []
    rl = JobSpec.read("rl", words)
    with pytest.raises(UserError, match=r"starts from .*mini/cold_start, which is not finished; run that"):
        shared_start(rl)
    (tmp_path / "mini/cold_start/model").mkdir(parents=True)
    (start,) = shared_start(rl)
    assert start == f"start_run={tmp_path}/mini"
    member = JobSpec.read("rl", [*words, "name=mini_seed2", start])
    (tmp_path / "mini/cold_start/model/config.json").touch()
    model = str(tmp_path / "mini/cold_start/model")
    assert server_arguments(member, "sglang") == ["--checkpoint", model, "--isolated"]


def test_an_evaluation_without_its_options_is_refused() -> None:
    assert JobSpec.read("eval", ("--checkpoint=x", "--benchmarks", "aime25")).recipe is None
    for words in ((), ("--checkpoint", "x")):
        with pytest.raises(UserError, match="needs --checkpoint FOLDER and --benchmarks NAMES, after --"):
            JobSpec.read("eval", words)
