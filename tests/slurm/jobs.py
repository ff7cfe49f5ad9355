"""Submits jobs as a user does, by the scripts of `slurm/` or by launch.py, and observes them."""

from __future__ import annotations

import re
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from traceback import format_exception

import psutil
import torch
from safetensors.torch import load_file
from typer.testing import CliRunner

from megatron_parallel_r1.cluster.command import app
from megatron_parallel_r1.errors import UserError
from tests.curriculum.test_run import steps_of
from tests.parallel.launch import ENVIRONMENT
from tests.slurm.daemons import Daemons

REPOSITORY = Path(__file__).resolve().parents[2]
RECIPE = REPOSITORY / "tests/curriculum/mini.yaml"
ENDED = ("COMPLETED", "FAILED", "CANCELLED", "TIMEOUT", "NODE_FAIL")
# Resources in place of the scripts' headers: one process per node, no GPU.
HEADER = ("--nodes=2", "--ntasks-per-node=1", "--cpus-per-task=1", "--gpus-per-node=0", "--time=60")
ONE_NODE = ("--nodes=1", *HEADER[1:])
PATIENCE_S = 600.0
# No periodic checkpoints: a stopped run resumes from the one that the signal caused.
SHORT = (
    *("stages.cold_start.steps=4", "stages.cold_start.evaluate=false", "evaluation.problems=4"),
    *(
        "stages.rl.steps=6",
        "stages.rl.save_every=100",
        "stages.rl.reward={name: 'tests.slurm.rewards:shorter'}",
    ),
)
# The same for launch.py.
LAUNCH_TWO_NODES = ("--nodes", "2", "--ranks", "1", "--gpus", "0", "--cpus", "1", "--time", "60")
LAUNCH_ONE_NODE = ("--nodes", "1", *LAUNCH_TWO_NODES[2:])
FAILING = "stages.rl.reward={name: 'tests.slurm.rewards:third_step'}"
RUN = (str(RECIPE), *SHORT, "parallel.sharded_optimizer=true")
BRANCH = """\
  - name: rl_again
    kind: rl
    start_from: cold_start
    data: {source: embedded, kind: easy}
    steps: 2
    prompts_per_step: 3
    samples_per_prompt: 4
    reward: {name: accuracy}
    optimizer: {lr: 1.0e-3}
"""


@dataclass(frozen=True, slots=True)
class Site:
    """A cluster and a folder for its jobs' files: `logs`, `runs`, and one output file per job."""

    slurm: Daemons
    folder: Path

    def submit(
        self,
        script: str,
        *arguments: str,
        header: tuple[str, ...] = HEADER,
        cwd: Path = REPOSITORY,
        **settings: str,
    ) -> str:
        """Submits a script of `slurm/`, or by its path, with settings of site.env; returns the job id."""
        return self.slurm.client(
            *(
                "sbatch",
                "--parsable",
                f"--output={self.folder}/%j.out",
                *header,
                script if "/" in script else f"slurm/{script}",
                *arguments,
            ),
            cwd=cwd,
            PYTHON=sys.executable,
            LOG_DIR=str(self.folder / "logs"),
            **(ENVIRONMENT | settings),
        ).strip()

    def state(self, job: str) -> str:
        output = self.slurm.client("scontrol", "show", "job", "--oneliner", job)
        return re.search(r"JobState=(\S+)", output)[1]

    def node_of(self, job: str) -> str:
        output = self.slurm.client("scontrol", "show", "job", "--oneliner", job)
        return re.search(r" NodeList=(\S+)", output)[1]

    def output(self, job: str) -> str:
        file = self.folder / f"{job}.out"
        return file.read_text(errors="replace") if file.is_file() else ""

    def logs(self, job: str) -> Path:
        (folder,) = (self.folder / "logs").glob(f"*-{job}")
        return folder

    def wait(self, job: str, condition: Callable[[], bool] | None = None) -> str:
        """Waits for the condition, by default the end of the job; returns the job's state."""
        try:
            self.slurm.wait_for(condition or (lambda: self.state(job) in ENDED), f"job {job}", PATIENCE_S)
        except TimeoutError as error:
            raise AssertionError(
                f"{error}: {self.state(job)}\n{self.output(job)}\n{self.rank_logs(job)}"
            ) from None
        return self.state(job)

    def finish(self, job: str) -> None:
        """Waits for a job and asserts that it completed."""
        state = self.wait(job)
        assert state == "COMPLETED", f"{state}\n{self.output(job)}\n{self.rank_logs(job)}"

    def wait_for_steps(self, job: str, steps: list[int]) -> None:
        """Waits until the RL stage has recorded exactly these steps."""
        self.wait(job, lambda: steps_of(self.folder / "runs/mini/rl") == steps)

    def rank(self, job: str, rank: int) -> psutil.Process:
        """The process of one rank of a job, whichever node it is on."""
        variables = {"SLURM_JOB_ID": job, "SLURM_PROCID": str(rank)}
        (process,) = (
            process
            for process in psutil.process_iter(["cmdline", "environ"])
            if "megatron_parallel_r1.cli" in (process.info["cmdline"] or ())
            and "SLURM_STEP_ID" in (process.info["environ"] or {})  # not srun
            and variables.items() <= (process.info["environ"] or {}).items()
        )
        return process

    def batch_shell(self, job: str) -> psutil.Process:
        """The shell that runs a job's script."""
        (process,) = (
            process
            for process in psutil.process_iter(["cmdline", "environ"])
            if (process.info["cmdline"] or ("",))[0].endswith("bash")
            and (process.info["environ"] or {}).get("SLURM_JOB_ID") == job
            and "SLURM_STEP_ID" not in process.info["environ"]
            and not [child for child in (process.parent(),) if child and child.name() == "bash"]
        )
        return process

    def rank_logs(self, job: str) -> str:
        logs = sorted((self.folder / "logs").glob(f"*-{job}/attempt*/*.log"))
        return "\n".join(f"== {log}\n{log.read_text(errors='replace')[-3000:]}" for log in logs)

    def assert_no_process_left(self) -> None:
        self.slurm.wait_for(
            lambda: not [line for node in self.slurm.nodes for line in self.slurm.processes_of(node)],
            "the end of all processes of jobs",
            30,
        )


def branched_recipe(folder: Path) -> Path:
    """The recipe with a second RL stage, which starts where the first one does."""
    recipe = folder / "branched.yaml"
    recipe.write_text(RECIPE.read_text().replace("evaluation: {data", f"{BRANCH}evaluation: {{data"))
    return recipe


def assert_equal(run: Path, other: Path) -> None:
    for name in ("rl/model", "release"):
        ours, theirs = (load_file(folder / name / "model.safetensors") for folder in (run, other))
        assert ours.keys() == theirs.keys()
        assert [key for key in theirs if not torch.equal(ours[key], theirs[key])] == []


def launch(site: Site, *arguments: str, code: int = 0, **settings: str) -> str:
    """Runs launch.py in this process, which saves its imports; returns its output or error."""
    done = CliRunner().invoke(app, arguments, env=launch_environment(site) | settings)
    if isinstance(done.exception, UserError):
        assert code == 2, done.exception
        return str(done.exception)
    assert done.exit_code == code, "".join(format_exception(done.exception))
    return done.stdout


def launch_environment(site: Site) -> dict[str, str]:
    settings = {"PYTHON": sys.executable, "LOG_DIR": str(site.folder / "logs")}
    return {**site.slurm.environment, **ENVIRONMENT, **settings}


def ids_of(output: str) -> list[str]:
    return [line.split()[0] for line in output.splitlines()]
