"""What servers are started with, and what is refused before one is."""

from __future__ import annotations

import socket
from dataclasses import replace
from pathlib import Path

import pytest

from megatron_parallel_r1.errors import UserError
from megatron_parallel_r1.rollout.launcher import run
from megatron_parallel_r1.rollout.launcher.command import LaunchSettings, build_command
from megatron_parallel_r1.rollout.launcher.ports import pick_ports
from megatron_parallel_r1.rollout.launcher.run import (
    assign_gpus,
    build_servers,
    find_python,
    server_url,
    visible_gpus,
)

SERVING = LaunchSettings(Path("model"))
PYTHON = Path("bin/python")


def value(arguments: tuple[str, ...], option: str) -> str:
    return arguments[arguments.index(option) + 1]


def test_sglang_on_a_cpu_draws_by_seed_through_the_plugin() -> None:
    command = build_command(SERVING, PYTHON, "cpu", 30001)
    assert command.arguments[:3] == ("bin/python", "-m", "sglang.launch_server")
    assert value(command.arguments, "--port") == "30001"
    assert value(command.arguments, "--dtype") == "float32"
    assert value(command.arguments, "--sampling-backend") == "pytorch"
    assert command.environment["SGLANG_PLUGINS"] == "parallel_r1_cpu"
    assert command.environment["OMP_NUM_THREADS"] == "1"
    assert command.environment["TORCH_COMPILE_DISABLE"] == "1"
    assert "--sleep-on-idle" in command.arguments
    # As the cache is bounded by tokens, the share is no more than what others must leave.
    assert value(command.arguments, "--max-total-tokens") == "20000"
    assert value(command.arguments, "--mem-fraction-static") == "0.9"


def test_sglang_returns_the_experts_of_a_mixture(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text('{"num_experts": 128}')
    option = "--enable-return-routed-experts"
    assert option in build_command(replace(SERVING, checkpoint=tmp_path), PYTHON, "cuda", 1).arguments
    assert option not in build_command(SERVING, PYTHON, "cuda", 1).arguments


def test_sglang_on_gpus() -> None:
    serving = replace(SERVING, tensor=2, data=2, memory_share=0.5, colocated=True)
    command = build_command(serving, PYTHON, "cuda", 1, ("4", "5", "6", "7"))
    assert command.environment["CUDA_VISIBLE_DEVICES"] == "4,5,6,7"
    assert value(command.arguments, "--tp-size") == value(command.arguments, "--dp-size") == "2"
    assert value(command.arguments, "--mem-fraction-static") == "0.5"
    assert value(command.arguments, "--dtype") == "auto"
    assert {"--enable-deterministic-inference", "--enable-memory-saver"} <= set(command.arguments)
    assert "--device" not in command.arguments


@pytest.mark.parametrize(
    ("isolated", "deterministic", "plugins"),
    [
        (True, True, "parallel_r1,parallel_r1_cpu"),
        (True, False, "parallel_r1"),
        # Without a name SGLang would load every plugin that is installed.
        (False, False, "none"),
    ],
)
def test_plugins_are_named(isolated: bool, deterministic: bool, plugins: str) -> None:
    serving = replace(SERVING, isolated=isolated, deterministic=deterministic)
    assert build_command(serving, PYTHON, "cpu", 1).environment["SGLANG_PLUGINS"] == plugins


def test_vllm_returns_log_probs_of_what_it_draws_from() -> None:
    command = build_command(replace(SERVING, engine="vllm", options=("--seed", "3")), PYTHON, "cpu", 1)
    assert value(command.arguments, "--logprobs-mode") == "processed_logprobs"
    assert command.arguments[-2:] == ("--seed", "3")


def test_gpus_are_shared_out() -> None:
    serving = replace(SERVING, servers=2, tensor=2)
    assert assign_gpus(serving, ("0", "3", "5", "6", "7")) == ("cuda", [("0", "3"), ("5", "6")])
    assert assign_gpus(serving, ()) == ("cpu", [(), ()])
    assert assign_gpus(replace(serving, device="cpu"), ("0",)) == ("cpu", [(), ()])
    with pytest.raises(UserError, match=r"2 servers of 2 GPUs need 4, and 3 are visible; lower --servers"):
        assign_gpus(serving, ("0", "1", "2"))


def test_gpus_are_those_that_cuda_is_told(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "2, GPU-5f")
    assert visible_gpus() == ("2", "GPU-5f")
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")
    assert visible_gpus() == ()


def test_ports_follow_one_another_or_are_free_ones() -> None:
    free = pick_ports(replace(SERVING, port=0, servers=3))
    # None that the kernel may give to somebody's connection before the server listens.
    assert len(set(free)) == 3 and max(free) < 32768
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        listener.listen()
        port = listener.getsockname()[1]
        with pytest.raises(
            UserError, match=rf"port {port} on 127.0.0.1: Address already in use; give another"
        ):
            pick_ports(replace(SERVING, port=port))


def test_others_reach_a_server_that_listens_everywhere_by_name() -> None:
    assert server_url("0.0.0.0", 5) == f"http://{socket.gethostname()}:5"
    assert server_url("127.0.0.1", 5) == "http://127.0.0.1:5"


def test_refusals_say_what_to_do(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"no config.json; give --checkpoint a Hugging Face folder"):
        build_servers(replace(SERVING, checkpoint=tmp_path))
    (tmp_path / "config.json").write_text("{}")
    serving = replace(SERVING, checkpoint=tmp_path)
    with pytest.raises(UserError, match="isolated: vllm cannot"):
        build_servers(replace(serving, engine="vllm", isolated=True))
    with pytest.raises(UserError, match="no such interpreter"):
        build_servers(replace(serving, python=tmp_path / "python"))


def test_servers_start_only_where_a_guard_can_end_them(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(run, "SUPPORTED", False)
    with pytest.raises(UserError, match=r"servers cannot be started on \w+: .*give their addresses"):
        build_servers(SERVING)


def test_a_missing_environment_is_made_by_make(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    places = "megatron_parallel_r1.rollout.launcher.run"
    monkeypatch.setattr(f"{places}.__file__", str(tmp_path / "a" / "b" / "c" / "places.py"))
    monkeypatch.setattr(f"{places}.importlib.util.find_spec", lambda name: None)
    with pytest.raises(UserError, match=r"run `make engines` in .*, or give --python"):
        find_python(SERVING)
