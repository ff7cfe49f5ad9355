"""Starting, restarting and ending, with a fake server; tests/engines/test_serving.py has real ones."""

from __future__ import annotations

import os
import signal
import sys
from pathlib import Path

import httpx
import psutil
import pytest

from megatron_parallel_r1.rollout.launcher.guard import SUPPORTED
from tests.unit.rollout.serving import fake_server
from tests.unit.rollout.serving.launched import assert_gone, launched

pytestmark = pytest.mark.skipif(not SUPPORTED, reason="this system has no prctl, which guards servers")

SECONDS = 180  # Each takes a second or two where no other work is.


@pytest.fixture
def settings(tmp_path: Path) -> dict[str, object]:
    """Of two fake servers."""
    (tmp_path / "model").mkdir()
    (tmp_path / "model" / "config.json").write_text("{}")
    python = tmp_path / "python"
    python.write_text(f'#!/bin/sh\nexec {sys.executable} {fake_server.__file__} "$@"\n')
    python.chmod(0o755)
    return {
        "checkpoint": tmp_path / "model",
        "servers": 2,
        "port": 0,
        "device": "cpu",
        "python": python,
        "log_dir": tmp_path / "logs",
        "urls_file": tmp_path / "urls",
    }


def test_a_killed_server_comes_back_at_its_address(settings: dict[str, object]) -> None:
    with launched(**settings) as it:
        healthy = [it.next_healthy(SECONDS) for _ in range(2)]
        urls = {index: url for index, url, _ in healthy}
        index, url, pid = healthy[0]
        old = psutil.Process(pid).children(recursive=True)
        assert len(old) == 1
        os.kill(pid, signal.SIGKILL)
        assert it.next_line(SECONDS) == f"server {index} ended with status 137; restarting it"
        assert_gone(old)
        again = it.next_healthy(SECONDS)
        assert again[:2] == (index, url) and again[2] != pid
        assert httpx.get(f"{url}/health").status_code == 200
        assert Path(str(settings["urls_file"])).read_text() == f"{urls[0]}\n{urls[1]}\n"


def test_a_server_that_hangs_is_restarted(settings: dict[str, object]) -> None:
    with launched(**settings | {"servers": 1, "hang_seconds": 8}) as it:
        index, url, pid = it.next_healthy(SECONDS)
        os.kill(pid, signal.SIGSTOP)
        assert it.next_line(SECONDS) == "server 0 has given no answer for 8 s; restarting it"
        again = it.next_healthy(SECONDS)
        assert again[:2] == (index, url) and again[2] != pid


def test_a_server_is_told_nothing_of_a_trainers_process_group(
    settings: dict[str, object], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("RANK", "3")
    monkeypatch.setenv("MASTER_PORT", "29500")
    monkeypatch.setenv("PYTORCH_ALLOC_CONF", "expandable_segments:True")
    monkeypatch.setenv("KEPT", "yes")
    # A proxy is for the world outside: the server is found healthy without it.
    monkeypatch.setenv("HTTP_PROXY", "http://127.0.0.1:9")
    with launched(**settings | {"servers": 1}) as it:
        _, _, pid = it.next_healthy(SECONDS)
        environment = psutil.Process(pid).environ()
        left_out = {"RANK", "MASTER_PORT", "PYTORCH_ALLOC_CONF"}
        assert environment["KEPT"] == "yes" and not left_out & set(environment)


def test_told_to_end_it_leaves_nothing(settings: dict[str, object]) -> None:
    with launched(**settings) as it:
        for _ in range(2):
            it.next_healthy(SECONDS)
        family = it.family()
        # Of each server: its guard, itself, its child.
        assert len(family) == 6
        it.process.send_signal(signal.SIGINT)
        assert it.process.wait(SECONDS) == 0
        assert_gone(family)
        assert not Path(str(settings["urls_file"])).exists()


@pytest.mark.parametrize("held", [(), (signal.SIGTERM,)], ids=["", "SIGTERM held"])
def test_a_killed_supervisor_leaves_nothing(
    settings: dict[str, object], held: tuple[signal.Signals, ...]
) -> None:
    """Also one that holds SIGTERM, as a trainer under torchrun."""
    before = signal.pthread_sigmask(signal.SIG_BLOCK, held)
    try:
        with launched(**settings) as it:
            for _ in range(2):
                it.next_healthy(SECONDS)
            family = it.family()
            it.process.kill()
            assert_gone(family)
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


def test_a_killed_guard_takes_its_server_along(settings: dict[str, object]) -> None:
    with launched(**settings | {"servers": 1}) as it:
        index, url, pid = it.next_healthy(SECONDS)
        server = psutil.Process(pid)
        old = [server, *server.children()]
        assert len(old) == 2
        server.parent().kill()
        assert it.next_healthy(SECONDS)[:2] == (index, url)
        assert_gone(old)


def test_a_server_that_only_crashes_is_given_up_on(
    settings: dict[str, object], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("FAKE_CRASH", "1")
    with launched(**settings | {"servers": 1, "crashes": 2}) as it:
        assert it.next_line(SECONDS) == "server 0 ended with status 1; restarting it"
        error = it.next_line(SECONDS)
        assert error is not None and error.startswith(
            "error: server 0 ended with status 1, 2 times without being healthy in between; see"
        )
        assert error.endswith("which ends with: FakeServer has no weights")
        assert it.process.wait(SECONDS) == 1
        assert not Path(str(settings["urls_file"])).exists()
