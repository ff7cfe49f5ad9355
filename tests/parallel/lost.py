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
from collections.abc import Sequence

import torch
import torch.distributed as dist

from megatron_parallel_r1.distributed import process
from megatron_parallel_r1.errors import LOST_EXIT_CODE, PeerLost, UserError
from megatron_parallel_r1.model.gpt import build_model
from megatron_parallel_r1.sync.control import RowScores, TokenRow, WeightsInfo
from megatron_parallel_r1.sync.publisher import Publisher
from megatron_parallel_r1.sync.settings import Sync
from megatron_parallel_r1.utils.exit import block_stop_signals
from tests.parallel.launch import SHAPE

SCORES = [(-1.0,)]
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


class Beside:
    """A server beside a rank, which is killed as it hands over the weights of version `strikes_at`."""

    kinds, wants_head = frozenset({"tensor"}), False

    def __init__(self, strikes_at: int | None) -> None:
        self.url, self._left, self._version = "http://beside", strikes_at, None

    def info(self) -> WeightsInfo:
        return WeightsInfo(self._version, 1, "float32")

    def receive_shared(self, payloads: Sequence[str], version: int | None) -> None:
        if version == self._left:
            time.sleep(2)  # for its beat to tell the step
            do("kill")
        self._version = version

    def score(self, rows: Sequence[TokenRow]) -> Sequence[RowScores]:
        return SCORES

    def _nothing(self, *_: object) -> None: ...

    pause = continue_generation = release_memory = resume_memory = begin_update = end_update = close = (
        _nothing
    )


def hand_over(watchdog: process.Watchdog, unlucky: bool) -> None:
    """Each rank hands its weights to a server of its own, which sleeps from one step to the next."""
    servers = [Beside(LAST if unlucky else None)]
    sync = Sync(transport="tensor", bucket_bytes=2**20)
    publisher = Publisher(servers, build_model(SHAPE), sync, [(1, 2)], lambda *_: SCORES, colocated=True)
    for step in range(LAST + 2):
        watchdog.set_location(f"stage rl, step {step}")
        publisher.publish(step)
        publisher.release()


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
    parser.add_argument("what", choices=("kill", "stop", "sleep", "refuse", "late", "again", "hand_over"))
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
            if arguments.what == "hand_over":
                hand_over(watchdog, unlucky)
            else:
                loop(watchdog, unlucky, arguments.what)
    except PeerLost as error:
        print(error, file=sys.stderr, flush=True)
        os._exit(LOST_EXIT_CODE)
    except UserError as error:
        print(error, file=sys.stderr)
        raise SystemExit(2) from None


if __name__ == "__main__":
    main()
