"""The job that launch.py would submit, made from a site's scripts; nothing is submitted."""

from __future__ import annotations

import os
import re
import shlex
import shutil
from pathlib import Path

import pytest
from typer.testing import CliRunner

from megatron_parallel_r1.cluster import command
from megatron_parallel_r1.cluster.job_spec import JobSpec
from megatron_parallel_r1.cluster.site import SCRIPTS
from megatron_parallel_r1.cluster.submission import JobLauncher, ResourceRequest
from megatron_parallel_r1.errors import UserError
from tests.curriculum.test_run import RECIPE
from tests.slurm.jobs import branched_recipe

SLURM = Path(__file__).resolve().parents[3] / "slurm"


@pytest.fixture
def repository(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A copy whose #SBATCH lines a test may edit; submitit only checks that `srun` exists."""
    shutil.copytree(SLURM, tmp_path / "slurm")
    (tmp_path / "srun").write_text("#!/bin/sh\n")
    (tmp_path / "srun").chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}:{os.environ['PATH']}")
    monkeypatch.setenv("PYTHON", "bash")
    return tmp_path


def edit(repository: Path, line: str, replacement: str) -> None:
    script = repository / "slurm/rl_stage.sh"
    text = script.read_text()
    assert text.count(line) == 1
    script.write_text(text.replace(line, replacement))


def described(repository: Path, *overrides: str, **resources: int) -> list[str]:
    """Lines of the submission file."""
    spec = JobSpec.read("rl", [str(RECIPE), *overrides])
    launcher = JobLauncher(repository, ResourceRequest(**resources), local=False)
    return launcher.describe([spec], "rl").splitlines()


def test_a_site_may_write_its_lines_as_sbatch_takes_them(repository: Path) -> None:
    edit(repository, "#SBATCH --gpus-per-node=8\n", "#SBATCH --gpus-per-node h100:8\n")
    edit(repository, "#SBATCH --nodes=2\n", "#SBATCH -N 4\n")
    edit(repository, "##SBATCH --account=yours\n", "#SBATCH -A physics\n")
    job = described(repository)
    for line in ("--gpus-per-node=h100:8", "--nodes=4", "--account=physics", "--exclusive", "--mem=0"):
        assert f"#SBATCH {line}" in job
    assert "#SBATCH --gpus-per-node=h100:2" in described(repository, gpus=2)


@pytest.mark.parametrize(
    ("overrides", "settings", "message"),
    [
        (("parallel.tensor=3",), {}, "= 3 does not divide the 16 processes; start a multiple of 3"),
        (("parallel.pipeline=16",), {"ROLLOUT_NODES": "1"}, "= 16 does not divide the 8 processes"),
        ((), {"ROLLOUT_NODES": "1", "ROLLOUT_ENGINE": "vllm"}, "vllm takes new weights from disk only; "),
        (("rollout.engine=sglang", "rollout.servers=8"), {"ROLLOUT_NODES": "1"}, "set ROLLOUT_NODES=0"),
        (("seeds=[1,2]",), {"ROLLOUT_NODES": "1"}, "set seed, not seeds"),
        (("rollout.engine=sglang", "rollout.servers=1"), {}, "beside the 8 of the ranks on the first node, "),
        ((), {"ROLLOUT_NODES": "1", "ROLLOUT_TENSOR": "2"}, "need 16, a node has 8; lower one of the two"),
    ],
)
def test_what_ranks_would_refuse_is_refused_at_submission(
    overrides: tuple[str, ...],
    settings: dict[str, str],
    message: str,
    repository: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    for name, value in settings.items():
        monkeypatch.setenv(name, value)
    with pytest.raises(UserError, match=re.escape(message)):
        JobLauncher(repository, ResourceRequest(), local=False).check(
            [JobSpec.read("rl", [str(RECIPE), *overrides])], "rl"
        )


def dry_run(repository: Path, monkeypatch: pytest.MonkeyPatch, *words: str) -> str:
    """What launch.py would submit, with a fake `sbatch` that accepts everything."""
    monkeypatch.setattr(command, "REPOSITORY", repository)
    (repository / "sbatch").write_text("#!/bin/sh\n")
    (repository / "sbatch").chmod(0o755)
    done = CliRunner().invoke(command.app, [*words[:1], "--dry-run", *words[1:]], catch_exceptions=False)
    assert done.exit_code == 0
    return done.stdout


def test_a_stage_waits_for_the_one_that_it_starts_from(
    repository: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    output = dry_run(repository, monkeypatch, "curriculum", str(branched_recipe(repository)))
    names = re.findall(r"^#SBATCH --job-name=(.*)$", output, re.M)
    assert names == ["mini-cold_start", "mini-rl", "mini-rl_again", "mini-release"]
    assert re.findall(r"^#SBATCH --dependency='(.*)'$", output, re.M) == [
        *["afterok:JOB OF mini-cold_start"] * 2,
        "afterok:JOB OF mini-rl:JOB OF mini-rl_again",
    ]


def test_a_stage_waits_for_the_one_that_samples_its_data(
    repository: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    recipe = Path(__file__).parents[2] / "curriculum/distill.yaml"
    output = dry_run(repository, monkeypatch, "curriculum", str(recipe))
    assert re.findall(r"^#SBATCH --dependency='(.*)'$", output, re.M) == [
        "afterok:JOB OF distill-cold_start",
        "afterok:JOB OF distill-cold_start:JOB OF distill-own_traces",
        "afterok:JOB OF distill-distilled",
    ]
    assert "parallel-r1 distill" in output or "launch distill" in output or "distill_stage.sh" in output


def test_a_chain_may_end_with_an_evaluation_of_its_release(
    repository: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    recipe, words = str(branched_recipe(repository)), ("--evaluate", "--benchmarks embedded_hard --samples 2")
    for kind in (("curriculum", recipe), ("submit", "curriculum", recipe, "--chain")):
        output = dry_run(repository, monkeypatch, *kind, *words)
        names = re.findall(r"^#SBATCH --job-name=(.*)$", output, re.M)
        assert names[-2:] == ["mini-release", "mini-evaluation"]
        after = re.findall(r"^#SBATCH --dependency='(.*)'$", output, re.M)
        assert after[-1] == "afterok:JOB OF mini-release"
        options = r"--checkpoint \S+/mini/release --benchmarks embedded_hard --samples 2"
        assert re.search(f"# runs: bash slurm/eval.sh {options}", output)
    for wrong, message in (
        (("curriculum", recipe, *words, "seeds=[1,2]"), "a release for each of its seeds"),
        (("submit", "curriculum", recipe, *words), "add --chain"),
        (("curriculum", recipe, "--evaluate", "--samples 2"), "an evaluation needs --checkpoint"),
    ):
        with pytest.raises(UserError, match=message):
            dry_run(repository, monkeypatch, *wrong)


def test_evaluations_and_the_doctor_are_jobs_too(repository: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    words = ("--checkpoint", "runs/mini/rl", "--benchmarks", "embedded_hard")
    output = dry_run(repository, monkeypatch, "submit", "eval", "--", *words)
    assert f"# runs: bash slurm/eval.sh {' '.join(words)}" in output and "#SBATCH --requeue\n" in output
    output = dry_run(repository, monkeypatch, "submit", "doctor", "--", "--out", "runs")
    assert "# runs: bash slurm/doctor.sh --out runs" in output
    assert "#SBATCH --no-requeue\n" in output and "#SBATCH --requeue\n" not in output


def commands_of_docs() -> list[list[str]]:
    """The commands of docs/cluster.md that submit jobs."""
    text = (SLURM.parent / "docs/cluster.md").read_text()
    lines = re.findall(r"^(?:sbatch|python slurm/launch\.py) .+$", text, re.M)
    return [shlex.split(line, comments=True) for line in lines]


@pytest.mark.parametrize("words", commands_of_docs(), ids=" ".join)
def test_every_job_of_the_docs_is_valid(
    words: list[str], repository: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(repository)
    shutil.copytree(SLURM.parent / "recipes", repository / "recipes")
    (repository / "runs/qwen3_4b/rl_easy/model").mkdir(parents=True)
    if words[0] == "sbatch":
        (kind,) = (kind for kind, script in SCRIPTS.items() if words[1] == f"slurm/{script}")
        spec = JobSpec.read(kind, words[2:])
        assert JobLauncher(repository, ResourceRequest(), local=False).describe([spec], kind)
    elif "|" not in words:  # the other verbs look at jobs that exist
        assert "#SBATCH" in dry_run(
            repository, monkeypatch, *(word for word in words[2:] if word != "--dry-run")
        )


def test_a_time_limit_within_the_lead_of_the_signal_is_refused(repository: Path) -> None:
    with pytest.raises(UserError, match="the time limit of 300 s leaves no time for a step"):
        JobLauncher(repository, ResourceRequest(time="5"), local=False).check(
            [JobSpec.read("rl", [str(RECIPE)])], "rl"
        )
