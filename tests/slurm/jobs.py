"""Submits the scripts of `slurm/` as a user does, and looks at what becomes of the jobs."""

from __future__ import annotations

import re
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import psutil
import torch
from safetensors.torch import load_file

from tests.curriculum.test_run import steps_of
from tests.parallel.launch import ENVIRONMENT
from tests.slurm.daemons import Daemons

REPOSITORY = Path(__file__).resolve().parents[2]
RECIPE = REPOSITORY / "tests/curriculum/mini.yaml"
ENDED = ("COMPLETED", "FAILED", "CANCELLED", "TIMEOUT", "NODE_FAIL")
# What a site would edit in the headers: nodes of one process, no GPU.
HEADER = ("--nodes=2", "--ntasks-per-node=1", "--cpus-per-task=1", "--gpus-per-node=0", "--time=60")
ONE_NODE = ("--nodes=1", *HEADER[1:])
PATIENCE_S = 600.0
# Checkpoints are due never: what a stopped run goes on from, the signal made.
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
    """A cluster and a folder for what its jobs write: `logs`, `runs`, and one file a job."""

    slurm: Daemons
    folder: Path

    def submit(self, script: str, *words: str, header: tuple[str, ...] = HEADER, **settings: str) -> str:
        """The id of a job that runs a script of `slurm/`; `settings` are those of site.env."""
        return self.slurm.client(
            *("sbatch", "--parsable", f"--output={self.folder}/%j.out", *header, f"slurm/{script}", *words),
            cwd=REPOSITORY,
            PYTHON=sys.executable,
            LOG_DIR=str(self.folder / "logs"),
            **(ENVIRONMENT | settings),
        ).strip()

    def state(self, job: str) -> str:
        shown = self.slurm.client("scontrol", "show", "job", "--oneliner", job)
        return re.search(r"JobState=(\S+)", shown)[1]

    def said(self, job: str) -> str:
        file = self.folder / f"{job}.out"
        return file.read_text(errors="replace") if file.is_file() else ""

    def logs(self, job: str) -> Path:
        (found,) = (self.folder / "logs").glob(f"*-{job}")
        return found

    def wait(self, job: str, what: Callable[[], bool] | None = None) -> str:
        """Waits until the job has ended or, if given, until `what`; its state then."""
        try:
            self.slurm.wait_for(what or (lambda: self.state(job) in ENDED), f"job {job}", PATIENCE_S)
        except TimeoutError as error:
            raise AssertionError(
                f"{error}: {self.state(job)}\n{self.said(job)}\n{self.ranks_said(job)}"
            ) from None
        return self.state(job)

    def finish(self, job: str) -> None:
        """Waits for a job that must succeed."""
        state = self.wait(job)
        assert state == "COMPLETED", f"{state}\n{self.said(job)}\n{self.ranks_said(job)}"

    def wait_for_steps(self, job: str, steps: list[int]) -> None:
        """Waits until the RL stage of a job has written these down."""
        self.wait(job, lambda: steps_of(self.folder / "runs/mini/rl") == steps)

    def kill_rank(self, job: str, rank: int) -> None:
        """Ends one process of a job's training by SIGKILL, whichever node it is on."""
        own = {"SLURM_JOB_ID": job, "SLURM_PROCID": str(rank)}
        (process,) = (
            process
            for process in psutil.process_iter(["cmdline", "environ"])
            if "megatron_parallel_r1.cli" in (process.info["cmdline"] or ())
            and own.items() <= (process.info["environ"] or {}).items()
        )
        process.kill()

    def ranks_said(self, job: str) -> str:
        logs = sorted((self.folder / "logs").glob(f"*-{job}/attempt*/*.log"))
        return "\n".join(f"== {log}\n{log.read_text(errors='replace')[-3000:]}" for log in logs)

    def no_process_is_left(self) -> None:
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
