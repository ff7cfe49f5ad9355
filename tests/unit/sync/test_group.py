"""The sender's process group connects to processes outside its launch."""

from __future__ import annotations

import subprocess
import sys
import threading
from itertools import chain, repeat
from pathlib import Path

import pytest
import torch

from megatron_parallel_r1.sync import broadcast
from megatron_parallel_r1.sync.broadcast import GroupBroken, SenderGroup, local_address

ROOT = Path(__file__).resolve().parents[3]


def peer(group: SenderGroup, rank: int, times: int) -> subprocess.Popen[str]:
    words = (str(group.port), str(rank), str(group.size), str(times))
    command = (sys.executable, "-m", "tests.unit.sync.peer", *words)
    return subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, text=True)


def never() -> bool:
    return False


@pytest.mark.slow
def test_all_get_what_is_sent_until_one_is_gone() -> None:
    group = SenderGroup("weights", 3, "gloo", "127.0.0.1", timeout_s=120)
    staying, leaving = peer(group, 1, times=99), peer(group, 2, times=2)
    try:
        group.connect(never)
        group.broadcast(torch.ones(1000), never)
        group.broadcast(torch.full((1000,), 2.0), never)
        assert leaving.wait(300) == 0 and leaving.stdout.read().split() == ["1000.0", "2000.0"]
        with pytest.raises(GroupBroken):
            for _ in range(9):
                group.broadcast(torch.ones(1000), never)
        group.close()
        with pytest.raises(GroupBroken, match=r"the group is closed"):
            group.broadcast(torch.ones(1000), never)
        # It waited for the next one, and is told that none comes.
        assert staying.wait(300) != 0
    finally:
        for process in (staying, leaving):
            process.kill()
            process.wait()


def test_nobody_waits_for_one_that_will_not_come() -> None:
    group = SenderGroup("weights", 2, "gloo", "127.0.0.1", timeout_s=120)
    answers = iter([False, False, True])
    with pytest.raises(GroupBroken, match=r"a server did not join"):
        group.connect(lambda: next(answers))


def test_those_that_do_not_come_in_time_are_an_error() -> None:
    group = SenderGroup("weights", 2, "gloo", "127.0.0.1", timeout_s=0.2)
    with pytest.raises(GroupBroken, match=r"the servers did not join the sender at 127.0.0.1"):
        group.connect(never)


class BlocksInBroadcast:
    """Stands in for a backend whose first broadcast creates a communicator, and waits for a lost server."""

    def __init__(self) -> None:
        self.released = threading.Event()

    def broadcast(self, tensors: list[torch.Tensor], options: object) -> None:
        self.released.wait()

    def abort(self) -> None:
        self.released.set()


@pytest.mark.parametrize("way", ["a server failed", "no answer within 0.2 s"])
def test_a_broadcast_that_blocks_does_not_block_the_sender(way: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(broadcast, "LATE_S", 0.0)
    group = SenderGroup("weights", 2, "gloo", "127.0.0.1", timeout_s=0.2)
    group._group = blocking = BlocksInBroadcast()
    answers = repeat(False) if way.startswith("no") else chain([False, False], repeat(True))
    with pytest.raises(GroupBroken, match=way):
        group.broadcast(torch.ones(3), lambda: next(answers))
    assert not blocking.released.is_set()
    group.close()
    assert blocking.released.is_set()


def test_the_address_is_that_of_the_way_to_the_server() -> None:
    assert local_address("http://127.0.0.1:30000") == "127.0.0.1"
