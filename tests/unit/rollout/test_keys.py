"""API keys: where they are read, who sends them, and where they are never seen."""

from __future__ import annotations

import asyncio
import subprocess
import sys
from pathlib import Path

import psutil
import pytest

from megatron_parallel_r1.config.rollout import Rollout
from megatron_parallel_r1.errors import UserError
from megatron_parallel_r1.rollout.launcher.command import LaunchSettings, build_command
from megatron_parallel_r1.rollout.launcher.guard import SUPPORTED
from megatron_parallel_r1.rollout.servers.client import Timeouts
from megatron_parallel_r1.rollout.servers.engine import connect_pool
from megatron_parallel_r1.rollout.servers.pool import PoolSettings
from megatron_parallel_r1.rollout.servers.sglang import SglangClient
from megatron_parallel_r1.sync.sglang import SglangControl
from megatron_parallel_r1.utils.api_key import read_key
from tests.unit.rollout.scripted_server import as_json, scripted_server
from tests.unit.rollout.serving.launched import launched
from tests.unit.rollout.serving.test_launching import SECONDS, settings  # noqa: F401 (a fixture)

KEY = "k-51d3"


def test_a_key_is_read_from_a_variable_or_a_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    file = tmp_path / "key"
    file.write_text(f"{KEY}\n")
    monkeypatch.setenv("SERVERS_KEY", KEY)
    assert read_key(None) is None
    assert read_key("SERVERS_KEY") == read_key(None, file) == KEY
    rollout = Rollout(engine="sglang", urls=("http://n1:1",), key_variable="SERVERS_KEY")
    assert rollout.api_key == KEY and KEY not in rollout.model_dump_json()
    with pytest.raises(UserError, match=r"rollout\.key_variable and rollout\.key_file both name a key"):
        _ = rollout.replace(key_file=file).api_key
    monkeypatch.setenv("SERVERS_KEY", "k\u00e9")
    with pytest.raises(UserError, match=r"rollout\.key_variable: SERVERS_KEY holds no valid key"):
        _ = rollout.api_key
    monkeypatch.delenv("SERVERS_KEY")
    with pytest.raises(UserError, match=r"rollout\.key_variable: SERVERS_KEY is not set"):
        _ = rollout.api_key
    with pytest.raises(UserError, match=r"key_file: .*none: No such file"):
        read_key(None, tmp_path / "none")
    file.write_text(" ")
    with pytest.raises(UserError, match=r"key_file: .*key is empty"):
        read_key(None, file)


def test_requests_and_control_messages_send_it_and_a_wrong_one_is_one_line() -> None:
    server = {"tp_size": 1, "pp_size": 1, "dp_size": 1, "dtype": "float32", "weight_version": "3"}
    with scripted_server(lambda *_: as_json(server), KEY) as url:
        assert asyncio.run(SglangClient(url, key=KEY).get("/model_info")) == server
        assert SglangControl(url, key=KEY).info().version == 3
        for key, wants in (
            (None, "it wants an API key; name it by"),
            ("other", "it wants another API key; "),
        ):
            with pytest.raises(UserError, match=f"/model_info refused: Unauthorized; {wants}"):
                SglangControl(url, key=key).info()
            with pytest.raises(UserError, match=f"answered 401: .*; {wants}") as refused:
                connect_pool("sglang", (url,), Timeouts(), PoolSettings(), key=key)
            assert "\n" not in str(refused.value) and "other;" not in str(refused.value)


@pytest.mark.skipif(not SUPPORTED, reason="this system has no prctl, which guards servers")
def test_a_server_gets_it_unseen(
    settings: dict[str, object],  # noqa: F811
    tmp_path: Path,
) -> None:
    file = tmp_path / "key"
    file.write_text(KEY)
    with launched(**settings | {"servers": 1, "key_file": file}) as it:
        _, _, pid = it.next_healthy(SECONDS)
        server = psutil.Process(pid)
        assert KEY not in " ".join([*server.cmdline(), *server.parent().cmdline()])
        assert server.environ()["PARALLEL_R1_SERVER_KEY"] == KEY


def test_sglang_asks_for_it_and_logs_none_of_it(tmp_path: Path) -> None:
    """With a fake `sglang.launch_server`, which logs its arguments as the real one does."""
    command = build_command(LaunchSettings(Path("model")), Path(sys.executable), "cpu", 30001, key=KEY)
    assert KEY not in repr(command) and KEY not in " ".join(command.arguments)
    (tmp_path / "sglang").mkdir()
    fake = """
import logging, os, sys
if __name__ == "__main__":
    logging.basicConfig(level="INFO", stream=sys.stdout)
    logging.info("server_args=%s", sys.argv[1:])
    logging.info("%s of %s", "plain", "two")
    print(sys.argv[-1] == KEY, sys.argv[1:3], "PARALLEL_R1_SERVER_KEY" in os.environ)
"""
    (tmp_path / "sglang" / "launch_server.py").write_text(f"KEY = {KEY!r}{fake}")
    environment = command.environment | {"PYTHONPATH": str(tmp_path)}
    done = subprocess.run(command.arguments, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    first, second, last = done.stdout.splitlines()
    assert "'--api-key', '***']" in first and KEY not in done.stdout
    assert second == "INFO:root:plain of two"
    assert last == "True ['--model-path', 'model'] False"


def test_vllm_takes_it_from_its_environment() -> None:
    serving = LaunchSettings(Path("model"), engine="vllm")
    command = build_command(serving, Path("python"), "cpu", 30001, key=KEY)
    assert command.environment["VLLM_API_KEY"] == KEY and KEY not in " ".join(command.arguments)
