"""All-reduces in a loop, until the rank that is told to does what it is told; see test_lost_rank.py.

RANK=1 WORLD_SIZE=3 MASTER_ADDR=127.0.0.1 MASTER_PORT=29500 python -m tests.parallel.lost 1 sleep
"""

from __future__ import annotations

import argparse
import os
import signal
import sys
import time
import warnings

import torch
import torch.distributed as dist

from megatron_parallel_r1.distributed import process
from megatron_parallel_r1.errors import LOST_EXIT_CODE, PeerLost, UserError
from megatron_parallel_r1.utils.exit import block_stop_signals

LAST = 3  # the step in which the told rank does it


def do(what: str) -> None:
    """Prints the time first, from which the test counts."""
    print(f"loss {time.time()}", flush=True)
    if what == "kill":
        os.kill(os.getpid(), signal.SIGKILL)
    if what == "stop":
        os.kill(os.getpid(), signal.SIGSTOP)
    if what == "sleep":
        time.sleep(1000)
    if what == "refuse":
        raise UserError("rewards: no such term; choose another")


def loop(watchdog: process.Watchdog, unlucky: bool, what: str) -> None:
    sums = torch.ones(4)
    for step in range(LAST + 2):
        watchdog.set_location(f"stage rl, step {step}")
        if unlucky and step == LAST:
            time.sleep(2)  # for its beat to tell the step
            do(what)
        dist.all_reduce(sums)
    if what == "late" and unlucky:
        time.sleep(3)  # work after the last collective, which the store's host must wait for


def again(arguments: argparse.Namespace, lags: bool) -> None:
    """Joins and leaves twice; in between the ranks drift apart by more than two beats."""
    for session in (1, 2):
        if lags and session == 2:
            time.sleep(2.5)
        with process.running(1, timeout_s=arguments.timeout, heartbeat_s=arguments.heartbeat, join_s=200):
            sums = torch.full((4,), float(session))
            dist.all_reduce(sums)
            assert sums.tolist() == [float(session * dist.get_world_size())] * 4
        assert not dist.is_initialized()


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("unlucky", type=int)
    parser.add_argument("what", choices=("kill", "stop", "sleep", "refuse", "late", "again"))
    parser.add_argument("--timeout", type=float, default=600)
    parser.add_argument("--heartbeat", type=float, default=60)
    arguments = parser.parse_args()
    block_stop_signals()
    warnings.simplefilter("ignore")
    torch.set_num_threads(1)
    unlucky = int(os.environ["RANK"]) == arguments.unlucky
    try:
        if arguments.what == "again":
            again(arguments, unlucky)
            return
        with process.running(
            1, timeout_s=arguments.timeout, heartbeat_s=arguments.heartbeat, join_s=200
        ) as watchdog:
            loop(watchdog, unlucky, arguments.what)
    except PeerLost as error:
        print(error, file=sys.stderr, flush=True)
        os._exit(LOST_EXIT_CODE)
    except UserError as error:
        print(error, file=sys.stderr)
        raise SystemExit(2) from None


if __name__ == "__main__":
    main()
