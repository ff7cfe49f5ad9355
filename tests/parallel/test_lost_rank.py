"""A rank that is gone ends every other, with its name and step: real processes over gloo, started by hand.

But for one test no torchrun agent cleans up here, as under a launcher that leaves the others running. Not
covered: nccl, and a machine whose power fails (its connections stay open, as those of the stopped rank do).
"""

from __future__ import annotations

import os
import subprocess
import sys
import time
from dataclasses import dataclass
from pathlib import Path

import pytest

from megatron_parallel_r1.errors import LOST_EXIT_CODE
from megatron_parallel_r1.rollout.launcher.ports import free_port
from tests.parallel.launch import ENVIRONMENT, ROOT

RANKS = 3
# Beats to convict (5 s), to spread the word and take leave (10 s), and other work on this machine's cores.
MARGIN_S = 25.0


@dataclass(frozen=True)
class Ended:
    code: int
    error: str
    seconds: float  # from the loss to this rank's end


def ended(folder: Path, unlucky: int, what: str, *more: str) -> dict[int, Ended]:
    """Runs the ranks until all have ended but the unlucky one, which is killed then if it has not."""
    port = free_port()
    world = {"WORLD_SIZE": str(RANKS), "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    processes = []
    for rank in range(RANKS):
        with (folder / f"{rank}.out").open("w") as out, (folder / f"{rank}.err").open("w") as err:
            processes.append(
                subprocess.Popen(
                    [sys.executable, "-m", "tests.parallel.lost", str(unlucky), what, *more],
                    cwd=ROOT,
                    env={**os.environ, **ENVIRONMENT, **world, "RANK": str(rank)},
                    stdout=out,
                    stderr=err,
                )
            )
    # A stopped rank cannot end, and a killed one has.
    awaited = [rank for rank in range(RANKS) if rank != unlucky or what not in ("stop", "kill", "hand_over")]
    ends: dict[int, float] = {}
    try:
        give_up = time.monotonic() + 300
        while len(ends) < len(awaited) and time.monotonic() < give_up:
            for rank in awaited:
                if rank not in ends and processes[rank].poll() is not None:
                    ends[rank] = time.time()
            time.sleep(0.1)
    finally:
        for process in processes:
            process.kill()  # SIGKILL reaches a stopped process too
            process.wait()
    errors = {rank: (folder / f"{rank}.err").read_text() for rank in awaited}
    assert sorted(ends) == awaited, errors
    output = (folder / f"{unlucky}.out").read_text().split()
    loss = float(output[output.index("loss") + 1]) if "loss" in output else min(ends.values())
    return {rank: Ended(processes[rank].returncode, errors[rank], ends[rank] - loss) for rank in awaited}


def check(found: dict[int, Ended], ranks: tuple[int, ...], within: float, *phrases: str) -> None:
    for rank in ranks:
        assert found[rank].code == LOST_EXIT_CODE, found
        (line,) = [
            line for line in found[rank].error.splitlines() if line.startswith(f"rank {rank} (stage rl")
        ]
        print(f"{found[rank].seconds:.1f} s: {line}")
        assert all(part in line for part in phrases), line
        assert found[rank].seconds < within + MARGIN_S, line


def test_a_killed_rank_is_named(tmp_path: Path) -> None:
    found = ended(tmp_path, 1, "kill")
    check(
        found, (0, 2), 0, "(stage rl, step 3): rank 1 has sent no heartbeat for", "last in stage rl, step 3"
    )


@pytest.mark.slow
def test_under_torchrun_a_killed_rank_is_named_before_the_agent_ends_the_others() -> None:
    launcher = ("-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(RANKS))
    done = subprocess.run(
        [sys.executable, *launcher, "-m", "tests.parallel.lost", "1", "kill"],
        cwd=ROOT,
        env={**os.environ, **ENVIRONMENT},
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert done.returncode == 1
    for rank in (0, 2):
        (line,) = [line for line in done.stderr.splitlines() if line.startswith(f"rank {rank} (stage rl")]
        assert "(stage rl, step 3): rank 1 has sent no heartbeat for" in line


@pytest.mark.slow
def test_an_error_of_a_rank_keeps_its_message_and_is_told_to_the_others(tmp_path: Path) -> None:
    found = ended(tmp_path, 1, "refuse")
    assert found[1].code == 2
    assert found[1].error.splitlines()[-1] == "rewards: no such term; choose another"
    message = "rank 1 left from stage rl, step 3 by its own error, UserError: rewards: no such term"
    check(found, (0, 2), 0, message)


@pytest.mark.slow
def test_a_rank_killed_as_it_hands_weights_to_its_server_is_named(tmp_path: Path) -> None:
    found = ended(tmp_path, 1, "hand_over")
    check(found, (0, 2), 0, "(stage rl, step 3): rank 1 has sent no heartbeat", "last in stage rl, step 3")


@pytest.mark.slow
def test_a_stopped_rank_is_named_after_the_time_out(tmp_path: Path) -> None:
    found = ended(tmp_path, 2, "stop", "--heartbeat", "8")
    check(found, (0, 1), 8, "rank 2 has sent no heartbeat for", "last in stage rl, step 3")
    assert all(rank.seconds >= 8 - 1 for rank in found.values())  # its last beat may be a second older


@pytest.mark.slow
@pytest.mark.parametrize("what", ["kill", "stop"])
def test_the_host_of_the_store_is_named(tmp_path: Path, what: str) -> None:
    found = ended(tmp_path, 0, what, "--heartbeat", "8")
    check(found, (1, 2), 8, "rank 0, which hosts the store,", "rank 0 was last in stage rl, step")


@pytest.mark.slow
def test_a_rank_that_comes_to_no_collective_is_named(tmp_path: Path) -> None:
    found = ended(tmp_path, 1, "sleep", "--timeout", "8")
    check(found, (0, 1, 2), 8, "failed in stage rl, step 3", "rank 1 is in stage rl, step 3, at do (lost.py:")


@pytest.mark.slow
def test_a_rank_that_ends_late_loses_nobody(tmp_path: Path) -> None:
    found = ended(tmp_path, 2, "late")
    assert [rank.code for rank in found.values()] == [0, 0, 0], found


@pytest.mark.slow
@pytest.mark.parametrize("lags", [0, 2])
def test_ranks_that_left_join_again_though_one_lags(tmp_path: Path, lags: int) -> None:
    # Whoever is early must neither read the last session's words nor lose its store to a host that lags.
    found = ended(tmp_path, lags, "again", "--timeout", "30", "--heartbeat", "8")
    assert [rank.code for rank in found.values()] == [0, 0, 0], found
