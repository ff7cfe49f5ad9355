"""What the scripts of `slurm/` do before a job's first step, in bash itself and without SLURM."""

from __future__ import annotations

import os
import subprocess
from pathlib import Path

import pytest

REPOSITORY = Path(__file__).resolve().parents[3]


def script(folder: Path, *, words: str = "env", **settings: str) -> subprocess.CompletedProcess[str]:
    """Runs words of bash where a script has read common.sh, as in a job."""
    job = {"SLURM_SUBMIT_DIR": str(REPOSITORY), "SLURM_JOB_NAME": "rl", "SLURM_JOB_ID": "7"}
    return subprocess.run(
        ["bash", "-euo", "pipefail", "-c", f"source slurm/common.sh; {words}"],
        cwd=REPOSITORY,
        env={**os.environ, **job, "LOG_DIR": str(folder / "logs"), **settings},
        capture_output=True,
        text=True,
        timeout=60,
    )


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("ROLLOUT_NODES", "one"),
        ("ROLLOUT_SERVERS", "0"),
        ("ROLLOUT_TENSOR", "08"),
        ("ROLLOUT_WAIT_S", "1e3"),
        ("GRACE_S", "240s"),
        ("MAX_FAILURES", "-1"),
    ],
)
def test_a_number_that_is_none_is_refused(name: str, value: str, tmp_path: Path) -> None:
    done = script(tmp_path, **{name: value})
    assert done.returncode == 2
    assert done.stderr == f"error: {name}={value} is no whole number from 1 on; mend slurm/site.env\n"
    assert not list(tmp_path.iterdir())


def test_an_engine_that_is_none_is_refused(tmp_path: Path) -> None:
    done = script(tmp_path, ROLLOUT_ENGINE="sglnag")
    assert done.returncode == 2
    assert done.stderr == "error: ROLLOUT_ENGINE=sglnag is none of sglang, vllm; mend slurm/site.env\n"


def test_no_servers_are_asked_for_and_the_bookkeeping_learns_what_site_env_says(tmp_path: Path) -> None:
    done = script(tmp_path, ROLLOUT_NODES="0")
    assert done.returncode == 0, done.stderr
    assert {"MAX_FAILURES=3", "OMP_NUM_THREADS=1"} <= set(done.stdout.splitlines())
    assert (tmp_path / "logs/rl-7/attempt0").is_dir()


def test_logs_that_cannot_be_written_are_refused(tmp_path: Path) -> None:
    (tmp_path / "logs").touch()
    done = script(tmp_path)
    assert done.returncode == 2
    assert done.stderr.splitlines()[-1] == f"error: LOG_DIR={tmp_path}/logs cannot be written"


@pytest.mark.parametrize(
    ("servers", "message"),
    [("1", "ROLLOUT_NODES=1 of 1 nodes leaves none to train"), ("0", "")],
)
def test_nodes_are_split(servers: str, message: str, tmp_path: Path) -> None:
    """With a `scontrol` that names one node."""
    words = (
        "scontrol() { echo n1; }; split_nodes; echo ${TRAINERS[*]}:${SERVERS[*]}:$MASTER_ADDR:$MASTER_PORT"
    )
    done = script(tmp_path, words=words, ROLLOUT_NODES=servers, SLURM_JOB_NODELIST="n1")
    assert message in done.stderr and done.returncode == (2 if message else 0)
    assert done.stdout == ("" if message else "n1::n1:20007\n")


@pytest.mark.parametrize(
    ("size", "cpus"),
    [
        ({"SLURM_CPUS_PER_TASK": "12", "SLURM_NTASKS_PER_NODE": "8"}, 96),
        ({"SLURM_CPUS_PER_TASK": "12"}, 12),
        ({"SLURM_NTASKS_PER_NODE": "8"}, 8),
        ({}, 1),
    ],
)
def test_servers_have_all_that_the_job_has_of_their_node(
    size: dict[str, str], cpus: int, tmp_path: Path
) -> None:
    """With a `srun` that says how it was called, and serves."""
    srun = 'srun() { echo "$*" >"$LOGS/called"; touch "$LOGS/urls.0"; exec sleep 60; }'
    words = f"{srun}; bookkeeping() {{ echo --checkpoint=any; }}; SERVERS=(n2); start_servers rl any.yaml"
    done = script(tmp_path, words=f"{words}; kill $SERVING", **size)
    assert done.returncode == 0, done.stderr
    called = (tmp_path / "logs/rl-7/attempt0/called").read_text().split()
    assert f"--cpus-per-task={cpus}" in called and "--ntasks-per-node=1" in called


@pytest.mark.parametrize(
    ("code", "said", "told"),
    [(0, "server 1\n", "error: the rollout servers ended before the ranks\n"), (1, "", "")],
)
def test_servers_that_ended_before_ranks_that_succeeded(
    code: int, said: str, told: str, tmp_path: Path
) -> None:
    """Of ranks that failed, it is they whose end is told."""
    words = 'conclude() { echo "$@"; exit 1; }; true & SERVING=$!; sleep 0.1'
    done = script(tmp_path, words=f"{words}; CODE={code}; end_servers")
    assert (done.stdout, done.stderr) == (said, told)
