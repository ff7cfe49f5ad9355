"""Submits the scripts of `slurm/` as a user does, and observes the jobs."""

from __future__ import annotations

import re
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import psutil
import pytest
import torch
from safetensors.torch import load_file

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
# With `-n 2 --dist loadgroup` each worker has a cluster of its own; these tests share one undisturbed run.
SHARES_UNDISTURBED = pytest.mark.xdist_group("undisturbed")
# No periodic checkpoints: a stopped run resumes from the one that the signal caused.
SHORT = (
    *("stages.cold_start.steps=4", "stages.cold_start.evaluate=false", "evaluation.problems=4"),
    *(
        "stages.rl.steps=6",
        "stages.rl.save_every=100",
        "stages.rl.reward={name: 'tests.slurm.rewards:shorter'}",
    ),
)
FAILING = "stages.rl.reward={name: 'tests.slurm.rewards:third_step'}"
RUN = (str(RECIPE), *SHORT, "parallel.sharded_optimizer=true")


@dataclass(frozen=True, slots=True)
class Site:
    """A cluster and a folder for its jobs' files: `logs`, `runs`, and one output file per job."""

    slurm: Daemons
    folder: Path

    def submit(self, script: str, *arguments: str, header: tuple[str, ...] = HEADER, **settings: str) -> str:
        """Submits a script of `slurm/` with settings of site.env; returns the job id."""
        return self.slurm.client(
            *(
                "sbatch",
                "--parsable",
                f"--output={self.folder}/%j.out",
                *header,
                f"slurm/{script}",
                *arguments,
            ),
            cwd=REPOSITORY,
            PYTHON=sys.executable,
            LOG_DIR=str(self.folder / "logs"),
            **(ENVIRONMENT | settings),
        ).strip()

    def state(self, job: str) -> str:
        output = self.slurm.client("scontrol", "show", "job", "--oneliner", job)
        return re.search(r"JobState=(\S+)", output)[1]

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

    def kill_rank(self, job: str, rank: int) -> None:
        """Sends SIGKILL to one rank of a job, whichever node it is on."""
        variables = {"SLURM_JOB_ID": job, "SLURM_PROCID": str(rank)}
        (process,) = (
            process
            for process in psutil.process_iter(["cmdline", "environ"])
            if "megatron_parallel_r1.cli" in (process.info["cmdline"] or ())
            and variables.items() <= (process.info["environ"] or {}).items()
        )
        process.kill()

    def rank_logs(self, job: str) -> str:
        logs = sorted((self.folder / "logs").glob(f"*-{job}/attempt*/*.log"))
        return "\n".join(f"== {log}\n{log.read_text(errors='replace')[-3000:]}" for log in logs)

    def assert_no_process_left(self) -> None:
        self.slurm.wait_for(
            lambda: not [line for node in self.slurm.nodes for line in self.slurm.processes_of(node)],
            "the end of all processes of jobs",
            30,
        )


def assert_equal(run: Path, other: Path) -> None:
    for name in ("rl/model", "release"):
        ours, theirs = (load_file(folder / name / "model.safetensors") for folder in (run, other))
        assert ours.keys() == theirs.keys()
        assert [key for key in theirs if not torch.equal(ours[key], theirs[key])] == []
