"""slurm/common.sh before a job's first step, in bash without SLURM."""

from __future__ import annotations

import os
import re
import subprocess
from pathlib import Path

import pytest

from megatron_parallel_r1.cluster.job import RANK_DEFAULTS

REPOSITORY = Path(__file__).resolve().parents[3]


def run_script(folder: Path, *, commands: str = "env", **settings: str) -> subprocess.CompletedProcess[str]:
    """Runs bash commands after sourcing common.sh, as in a job."""
    job = {"SLURM_SUBMIT_DIR": str(REPOSITORY), "SLURM_JOB_NAME": "rl", "SLURM_JOB_ID": "7"}
    job["REPOSITORY"] = str(REPOSITORY)
    return subprocess.run(
        ["bash", "-euo", "pipefail", "-c", f"source slurm/common.sh; {commands}"],
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
def test_a_malformed_number_is_refused(name: str, value: str, tmp_path: Path) -> None:
    done = run_script(tmp_path, **{name: value})
    assert done.returncode == 2
    assert done.stderr == f"error: {name}={value} is not an integer >= 1; edit slurm/site.env\n"
    assert not list(tmp_path.iterdir())


def test_an_unknown_engine_is_refused(tmp_path: Path) -> None:
    done = run_script(tmp_path, ROLLOUT_ENGINE="sglnag")
    assert done.returncode == 2
    assert done.stderr == "error: ROLLOUT_ENGINE=sglnag is not one of sglang, vllm; edit slurm/site.env\n"


def test_zero_rollout_nodes_are_valid_and_settings_of_site_env_are_exported(tmp_path: Path) -> None:
    done = run_script(tmp_path, ROLLOUT_NODES="0")
    assert done.returncode == 0, done.stderr
    assert {"MAX_FAILURES=3", "OMP_NUM_THREADS=1"} <= set(done.stdout.splitlines())
    assert (tmp_path / "logs/rl-7/attempt0").is_dir()


@pytest.mark.parametrize(
    ("size", "message"),
    [
        ({"SLURM_NTASKS": "16"}, ""),
        (
            {"SLURM_NTASKS": "4"},
            "--ntasks=4, but 2 nodes of --ntasks-per-node=8 have 16 tasks; give",
        ),
        ({"SLURM_HET_SIZE": "2"}, "a heterogeneous job has 2 parts, this script runs in one; drop the :"),
    ],
)
def test_a_job_of_another_shape_is_refused(size: dict[str, str], message: str, tmp_path: Path) -> None:
    done = run_script(tmp_path, SLURM_JOB_NUM_NODES="2", SLURM_NTASKS_PER_NODE="8", **size)
    assert done.returncode == (2 if message else 0)
    assert done.stderr.startswith(f"error: {message}" if message else "")
    assert len(done.stderr.splitlines()) == bool(message)


def test_a_job_from_another_folder_uses_the_programs_of_the_repository(tmp_path: Path) -> None:
    (tmp_path / "slurm").mkdir()
    for name in ("common.sh", "site.env"):
        (tmp_path / "slurm" / name).write_text((REPOSITORY / "slurm" / name).read_text())
    python = tmp_path / ".venv/bin/python"
    python.parent.mkdir(parents=True)
    python.write_text("")
    python.chmod(0o755)
    (tmp_path / "elsewhere").mkdir()
    script = f"source {tmp_path}/slurm/common.sh; echo $PWD $PYTHON $PYTHONPATH $SLURM_EXPORT_ENV"
    job = {"SLURM_SUBMIT_DIR": f"{tmp_path}/elsewhere", "REPOSITORY": str(tmp_path)}
    job |= {"SLURM_JOB_NAME": "rl", "SLURM_JOB_ID": "7", "PATH": os.environ["PATH"], "LOG_DIR": "logs"}
    output = subprocess.check_output(["bash", "-euc", script], env=job, text=True)
    assert output.split() == [f"{tmp_path}/elsewhere", str(python), str(tmp_path), "ALL"]


@pytest.mark.parametrize("own", [{}, {"PYTORCH_ALLOC_CONF": "", "CUDA_DEVICE_MAX_CONNECTIONS": "8"}])
def test_a_rank_has_cuda_settings_of_its_own_unless_they_are_set(own: dict[str, str]) -> None:
    step = {"SLURM_PROCID": "5", "SLURM_NTASKS": "7", "SLURM_LOCALID": "1"}
    step |= {"SLURM_STEP_TASKS_PER_NODE": "4(x1),3"}
    inherited = {name: value for name, value in os.environ.items() if name not in RANK_DEFAULTS}
    command = ["bash", "slurm/rank.sh", "env"]
    output = subprocess.check_output(command, cwd=REPOSITORY, env=inherited | step | own, text=True)
    environment = dict(line.split("=", 1) for line in output.splitlines() if "=" in line)
    place = {"RANK": "5", "WORLD_SIZE": "7", "LOCAL_RANK": "1", "LOCAL_WORLD_SIZE": "4"}
    assert (RANK_DEFAULTS | own | place).items() <= environment.items()


PATIENT = 'timeout() { shift 3; "$@"; }'  # which runs functions of the shell too
AWAY = "slurm_requeue error: Unable to contact slurm controller (connect failure)"


def test_a_requeue_is_repeated_until_the_controller_answers(tmp_path: Path) -> None:
    """With a fake `scontrol` that fails twice and records its arguments."""
    calls = tmp_path / "calls"
    scontrol = (
        f'scontrol() {{ echo "$*" >>{calls}; (($(wc -l <{calls}) > 2)) || {{ echo "{AWAY}"; return 1; }}; }}'
    )
    array = {"SLURM_ARRAY_JOB_ID": "5", "SLURM_ARRAY_TASK_ID": "2"}
    done = run_script(tmp_path, commands=f"sleep() {{ :; }}; {PATIENT}; {scontrol}; requeue", **array)
    assert done.returncode == 0, done.stderr
    # Not the id of the last task of an array, which stands for the whole array.
    assert calls.read_text() == "requeue 5_2\n" * 3
    assert done.stdout.count("the controller does not answer") == 2


def test_a_requeue_that_slurm_refuses_is_an_error(tmp_path: Path) -> None:
    scontrol = "scontrol() { echo 'Requested operation is presently disabled for job 7'; return 1; }"
    done = run_script(tmp_path, commands=f"{PATIENT}; {scontrol}; requeue")
    assert done.returncode == 2
    assert done.stderr == "error: not requeued: Requested operation is presently disabled for job 7\n"


@pytest.mark.parametrize(
    ("left", "shown"), [("now + 5 seconds", "given up after -"), ("now + 1 hour", "given up after 1:")]
)
def test_the_grace_is_capped_at_what_slurm_leaves(left: str, shown: str, tmp_path: Path) -> None:
    job = f"PreemptTime=None StartTime=1 EndTime=$(date -d '{left}' +%FT%T) Deadline=N/A"
    commands = (
        f'scontrol() {{ echo "JobId=7 {job}"; }}; {PATIENT}; sleep 60 & RANKS=$!; '
        # A signal between fork and exec would be lost.
        "until [[ $(</proc/$RANKS/comm) == sleep ]]; do :; done; "
        'give_up_step() { echo "given up after $GRACE_LEFT_S:"; }; forward_stop; wait $TIMER'
    )
    done = run_script(tmp_path, commands=commands, GRACE_S="1")
    assert done.returncode == 0, done.stderr
    assert shown in done.stdout


@pytest.mark.parametrize(
    ("output", "found"),
    [
        ("JobId=7 PreemptTime=2026-01-01T00:00:00 EndTime=Unknown", "999999999::yes"),
        ("JobId=7 PreemptTime=None EndTime=Unknown", "999999999::"),
        ("", "999999999::"),
    ],
)
def test_a_controller_without_an_answer_leaves_time_enough(output: str, found: str, tmp_path: Path) -> None:
    fake = f'timeout() {{ echo "{output}"; [[ "{output}" ]]; }}'
    commands = f"{fake}; ask_controller; echo $LEFT_S:$JOB_LIMIT_S:$PREEMPTED"
    assert run_script(tmp_path, commands=commands).stdout == f"{found}\n"


def test_a_script_whose_job_slurm_has_requeued_does_not_touch_the_next_attempt(tmp_path: Path) -> None:
    fakes = (
        'timeout() { echo "JobId=7 Restarts=1 "; }; bookkeeping() { echo booked; }; requeue() { echo again; }'
    )
    done = run_script(tmp_path, commands=f"{fakes}; conclude rank 85")
    assert (done.returncode, done.stdout) == (143, "")
    done = run_script(tmp_path, commands=f"{fakes}; conclude rank 85", SLURM_RESTART_COUNT="1")
    assert (done.returncode, done.stdout) == (0, "booked\n")


def test_a_job_that_slurm_ends_leaves_the_reason(tmp_path: Path) -> None:
    done = run_script(tmp_path, commands="trap ended_by_slurm TERM; kill $$; sleep 5")
    assert done.returncode == 143
    assert (tmp_path / "logs/rl-7/attempt0/stopped").read_text().startswith("ended by SLURM: preempted")


@pytest.mark.parametrize(
    ("servers", "message"),
    [("1", "ROLLOUT_NODES=1 of 1 nodes leaves none for training"), ("0", "")],
)
def test_nodes_are_split(servers: str, message: str, tmp_path: Path) -> None:
    """With a fake `scontrol` that reports one node."""
    commands = (
        "scontrol() { echo n1; }; split_nodes; echo ${TRAINERS[*]}:${SERVERS[*]}:$MASTER_ADDR:$MASTER_PORT"
    )
    done = run_script(tmp_path, commands=commands, ROLLOUT_NODES=servers, SLURM_JOB_NODELIST="n1")
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
def test_servers_get_all_cpus_of_the_job_on_their_node(
    size: dict[str, str], cpus: int, tmp_path: Path
) -> None:
    """With a fake `srun` that records its arguments and serves."""
    srun = 'srun() { echo "$*" >"$LOGS/called"; touch "$LOGS/urls.0"; exec sleep 60; }'
    commands = (
        f"{srun}; bookkeeping() {{ echo --checkpoint=any; }}; SERVERS=(n2); SPAN=1; start_servers rl any.yaml"
    )
    done = run_script(tmp_path, commands=f"{commands}; kill -KILL $SERVING", **size)
    assert done.returncode == 0, done.stderr
    called = (tmp_path / "logs/rl-7/attempt0/called").read_text().split()
    assert f"--cpus-per-task={cpus}" in called and "--ntasks-per-node=1" in called


def test_a_server_takes_several_nodes_whole(tmp_path: Path) -> None:
    """With a fake `srun` that runs the step's tasks as SLURM does."""
    srun = """srun() {
        while [[ $1 != bash ]]; do shift; done
        for ((task = 0; task < 4; task++)); do SLURM_PROCID=$task "$@"; done >"$LOGS/called"
        touch "$LOGS"/urls.{0,2}
        exec sleep 60
    }"""
    commands = f"{srun}; bookkeeping() {{ echo --checkpoint=any; }}; SERVERS=(n2 n3 n4 n5) MASTER_PORT=20007"
    settings = {"SLURM_GPUS_ON_NODE": "8", "ROLLOUT_TENSOR": "16", "ROLLOUT_SERVERS": "1", "PYTHON": "echo"}
    commands += "; export MASTER_PORT; span_nodes; start_servers rl any.yaml; kill $SERVING"
    done = run_script(tmp_path, commands=commands, ROLLOUT_NODES="4", **settings)
    assert done.returncode == 0, done.stderr
    lines = (tmp_path / "logs/rl-7/attempt0/called").read_text().splitlines()
    parts = [re.search(r"--tp 16 --nodes 2 --node-rank (\d) --rendezvous (\S+) ", line) for line in lines]
    first, second = "n2:20007", "n4:20007"
    assert [part.groups() for part in parts] == [("0", first), ("1", first), ("0", second), ("1", second)]


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"ROLLOUT_TENSOR": "12"}, "ROLLOUT_TENSOR=12 does not divide into nodes of 8 GPUs"),
        (
            {"ROLLOUT_SERVERS": "2"},
            "takes 2 nodes of 8 GPUs whole; set ROLLOUT_SERVERS=1",
        ),
        (
            {"ROLLOUT_NODES": "3"},
            "ROLLOUT_NODES=3 is not a multiple of the 2 nodes that a server",
        ),
        (
            {"ROLLOUT_ENGINE": "vllm"},
            "more than the 8 GPUs of a node, which only ROLLOUT_ENGINE=sglang",
        ),
    ],
)
def test_a_server_that_does_not_fit_nodes_is_refused(
    settings: dict[str, str], message: str, tmp_path: Path
) -> None:
    fits = {"ROLLOUT_NODES": "4", "ROLLOUT_TENSOR": "16", "ROLLOUT_SERVERS": "1", "SLURM_GPUS_ON_NODE": "8"}
    done = run_script(tmp_path, commands="span_nodes", **fits | settings)
    assert done.returncode == 2 and message in done.stderr


@pytest.mark.parametrize(
    ("code", "stdout", "stderr"),
    [(0, "server 1\n", "error: the rollout servers ended before the ranks\n"), (1, "", "")],
)
def test_servers_that_end_before_successful_ranks_are_an_error(
    code: int, stdout: str, stderr: str, tmp_path: Path
) -> None:
    """If the ranks failed too, only their failure is reported."""
    ended_server = "true & SERVING=$!; while kill -0 $SERVING 2>/dev/null; do sleep 0.01; done"
    commands = f'conclude() {{ echo "$@"; exit 1; }}; {ended_server}'
    done = run_script(tmp_path, commands=f"{commands}; CODE={code}; end_servers")
    assert (done.stdout, done.stderr) == (stdout, stderr)


@pytest.mark.parametrize(
    ("before", "others", "shown", "excluded"),
    [
        ("(null)", "n1 n3", "failed twice on n2,n4: left out of the next attempt", "n2,n4"),
        ("n9", "n1 n3", "failed twice on n2,n4: left out of the next attempt", "n9,n2,n4"),
        (
            "(null)",
            "n3",
            "failed twice on n2,n4, which stays in use: the partition has only 1 other nodes",
            None,
        ),
    ],
)
def test_nodes_that_failed_twice_are_left_out_if_enough_others_are_there(
    before: str, others: str, shown: str, excluded: str | None, tmp_path: Path
) -> None:
    """With fakes of SLURM's clients; a real one: tests/slurm/test_failures.py."""
    fakes = f"""
        bookkeeping() {{ echo n2,n4 | tr -d '\\n' >"$JOB_LOGS/bad_nodes"; return 75; }}
        requeue() {{ echo requeued; }}
        sinfo() {{ printf '%s\\n' {others} n2 n4 n4; }}
        scontrol() {{ [[ $1 == show ]] && echo "JobId=7 ExcNodeList={before} Restarts=0" || echo "$*" >&2; }}
    """
    settings = {"SLURM_JOB_PARTITION": "all", "SLURM_JOB_NUM_NODES": "2"}
    done = run_script(tmp_path, commands=f"{fakes}\nconclude rank 1", **settings)
    assert done.returncode == 75 and done.stdout == f"requeued\n{shown}\n"
    assert done.stderr == (f"update JobId=7 ExcNodeList={excluded}\n" if excluded else "")
