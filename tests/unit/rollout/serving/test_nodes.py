"""One server over two machines, here two supervisors on this one, with a fake server as each part.

tests/engines/test_isolated.py has a real one."""

from __future__ import annotations

import os
import signal
import socket
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import psutil
import pytest

from megatron_parallel_r1.errors import UserError
from megatron_parallel_r1.rollout.launcher.command import LaunchSettings, build_command
from megatron_parallel_r1.rollout.launcher.guard import SUPPORTED
from megatron_parallel_r1.rollout.launcher.nodes import Link, PartsRendezvous
from megatron_parallel_r1.rollout.launcher.ports import bind_free
from megatron_parallel_r1.rollout.launcher.run import check_launch
from tests.unit.rollout.serving.launched import GONE_SECONDS, Launched, assert_gone, launched
from tests.unit.rollout.serving.test_commands import value
from tests.unit.rollout.serving.test_launching import SECONDS, settings  # noqa: F401 (a fixture)

pytestmark = pytest.mark.skipif(not SUPPORTED, reason="this system has no prctl, which guards servers")

TWO = LaunchSettings(Path("model"), tensor=16, nodes=2, rendezvous="n1:20500")


def free_address() -> str:
    with socket.socket() as listener:
        return f"127.0.0.1:{bind_free(listener, '127.0.0.1')}"


def until(found: Callable[[], object]) -> None:
    end = time.monotonic() + GONE_SECONDS
    while not found():
        assert time.monotonic() < end, "in vain"
        time.sleep(0.05)


def part_of(node: Launched, known: set[int]) -> psutil.Process:
    """The fake server of a supervisor, other than those of `known` pids."""
    found: list[psutil.Process] = []

    def look() -> bool:
        for process in node.family():
            try:
                if "--dist-init-addr" in process.cmdline() and process.parent().pid != node.process.pid:
                    found.append(process)
            except psutil.NoSuchProcess:
                continue
        return any(process.pid not in known for process in found)

    until(look)
    return next(process for process in found if process.pid not in known)


def test_each_part_has_sglangs_options() -> None:
    command = build_command(replace(TWO, node_rank=1), Path("python"), "cuda", 1, ("0",)).meeting("n1:21000")
    assert value(command.arguments, "--nnodes") == "2" and value(command.arguments, "--node-rank") == "1"
    assert value(command.arguments, "--tp-size") == "16"
    assert value(command.arguments, "--dist-init-addr") == "n1:21000"
    assert "--nnodes" not in build_command(LaunchSettings(Path("model")), Path("python"), "cpu", 1).arguments


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"engine": "vllm"}, "SGLang's servers can extend over several machines, vllm's cannot here"),
        ({"servers": 2}, "--nodes=2: one server of one copy takes the machines whole"),
        ({"data": 2}, "--nodes=2: one server of one copy takes the machines whole"),
        ({"tensor": 9}, "--tp=9 does not divide into --nodes=2 equal parts"),
        ({"node_rank": 2}, "--node-rank=2: the 2 machines have the ranks 0 to 1"),
        ({"rendezvous": None}, "--rendezvous=: give each of the 2 machines HOST:PORT of the first"),
        ({"rendezvous": "n1"}, "--rendezvous=n1: give each of the 2 machines HOST:PORT of the first"),
        ({"nodes": 1}, "--node-rank and --rendezvous are for one server over several --nodes"),
        ({"gpus": ("0", "1")}, "1 servers of 8 GPUs need 8, and 2 are visible; .* over several --nodes"),
    ],
)
def test_shapes_that_do_not_fit_are_refused(changed: dict[str, object], message: str, tmp_path: Path) -> None:
    (tmp_path / "python").touch(0o755)
    with pytest.raises(UserError, match=message):
        check_launch(replace(replace(TWO, python=tmp_path / "python"), **changed))


def test_the_whole_server_is_restarted_if_a_part_dies(settings: dict[str, object]) -> None:  # noqa: F811
    two = settings | {"servers": 1, "nodes": 2, "tensor": 2, "rendezvous": free_address()}
    urls_file = Path(str(settings["urls_file"]))
    with launched(**two) as first, launched(**two | {"node_rank": 1, "log_dir": f"{urls_file}.1"}) as second:
        assert second.next_line(SECONDS).startswith(f"node 1  joined {two['rendezvous']}")
        _, url, pid = first.next_healthy(SECONDS)
        until(urls_file.exists)
        assert urls_file.read_text() == f"{url}\n"
        parts = [psutil.Process(pid), part_of(second, set())]
        known = {part.pid for part in parts}
        # Each part dies once.
        for lost in (1, 0):
            met = [value(tuple(part.cmdline()), "--dist-init-addr") for part in parts]
            assert met[0] == met[1]
            old = [*parts, *(child for part in parts for child in part.children())]
            os.kill(parts[lost].pid, signal.SIGKILL)
            line = first.next_line(SECONDS)
            why = "lost its part on node 1: ended with status 137; see" if lost else "ended with status 137"
            assert line.startswith(f"server 0 {why}") and line.endswith("; restarting it")
            assert_gone(old)
            _, again, pid = first.next_healthy(SECONDS)
            assert again == url
            parts = [psutil.Process(pid), part_of(second, known)]
            known |= {part.pid for part in parts}
            # Parts of different starts cannot meet.
            assert met[0] != value(tuple(parts[0].cmdline()), "--dist-init-addr")
        family = [*first.family(), *second.family()]
        first.process.send_signal(signal.SIGTERM)
        assert first.process.wait(SECONDS) == second.process.wait(SECONDS) == 0
        assert_gone(family)
        assert not urls_file.exists()


def test_who_joins_and_who_is_lost() -> None:
    address = free_address()
    host, port = address.split(":")

    def join(line: str) -> Link:
        link = Link(socket.create_connection((host, int(port))))
        link.send(line)
        return link

    def losses(expected: list[str]) -> None:
        until(lambda: rendezvous.losses() == expected)

    served = "join 1 model, tp 16 on 2 nodes"
    with PartsRendezvous(replace(TWO, rendezvous=address)) as rendezvous:
        with pytest.raises(UserError, match=f"--rendezvous={address}: port {port} .*in use"):
            PartsRendezvous(replace(TWO, rendezvous=address))
        other, stranger = join("join 1 model, tp 8 on 2 nodes"), join("GET / HTTP/1.1")
        until(lambda: rendezvous.losses() == [] and other.lines() == [_REFUSED])
        until(lambda: stranger.lines() == [] and not stranger.open)
        assert not rendezvous.complete
        link = join(served)
        until(lambda: rendezvous.losses() == [] and rendezvous.complete)
        rendezvous.meeting = "n1:2"
        link.send("lost n1:1 of the start before")
        link.send("lost n1:2 ended with\nstatus 1")
        losses(["lost its part on node 1: ended with status 1"])
        again = join(served)
        losses(["lost node 1"])
        assert rendezvous.complete
        again.close()
        losses(["lost node 1"])
        assert not rendezvous.complete


_REFUSED = (
    "refuse it has model, tp 8 on 2 nodes, the first one model, tp 16 on 2 nodes; give all machines the same "
    "options"
)
