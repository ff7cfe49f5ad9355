"""The GPUs and the command lines of servers that a run starts itself; nothing is started."""

from __future__ import annotations

import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from megatron_parallel_r1.config.rollout import Rollout
from megatron_parallel_r1.errors import UserError
from megatron_parallel_r1.rollout.launcher.command import build_command
from megatron_parallel_r1.rollout.launcher.run import check_launch
from megatron_parallel_r1.run.own_servers import launch_settings
from megatron_parallel_r1.utils.rank import local_world_size

EIGHT = "0,1,2,3,4,5,6,7"


@pytest.fixture(autouse=True)
def four_ranks(monkeypatch: pytest.MonkeyPatch) -> None:
    """The first of four ranks of this node, which are half of the launch; eight GPUs."""
    for name, value in {"RANK": "0", "WORLD_SIZE": "8", "LOCAL_RANK": "0", "LOCAL_WORLD_SIZE": "4"}.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", EIGHT)


TENSOR = {"transport": "tensor"}


def gpus_of(ranks: int | None = None, **keys: Any) -> list[tuple[str, ...]]:
    rollout = Rollout(engine="sglang", **keys)
    settings = launch_settings(rollout, Path(), False, Path(), local_world_size() if ranks is None else ranks)
    return check_launch(replace(settings, python=Path(sys.executable)))[2]


def test_servers_have_the_gpus_of_no_rank() -> None:
    assert gpus_of(servers=4) == [("4",), ("5",), ("6",), ("7",)]
    assert gpus_of(servers=2, tensor=2) == [("4", "5"), ("6", "7")]
    assert gpus_of(ranks=0, servers=8)[0] == ("0",)


def test_colocated_servers_have_the_gpus_of_the_ranks() -> None:
    assert gpus_of(servers=4, colocated=True, sync=TENSOR) == [("0",), ("1",), ("2",), ("3",)]
    assert gpus_of(servers=2, tensor=2, colocated=True, sync=TENSOR) == [("0", "1"), ("2", "3")]


def test_colocated_servers_of_several_nodes_listen_to_all() -> None:
    def host(**keys: Any) -> str:
        rollout = Rollout(engine="sglang", servers=4, sync=TENSOR | {"folder": "f"}, **keys)
        return launch_settings(rollout, Path(), False, Path("logs"), 4).host

    assert host(colocated=True) == "0.0.0.0"
    with pytest.raises(UserError, match="transport tensor shares GPU memory, which a server on other GPUs"):
        host()


def test_without_the_launchers_word_every_rank_is_on_this_node(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("LOCAL_WORLD_SIZE")
    monkeypatch.setenv("WORLD_SIZE", "6")
    assert gpus_of(servers=2) == [("6",), ("7",)]
    monkeypatch.delenv("RANK")
    assert gpus_of(servers=2) == [("1",), ("2",)]


@pytest.mark.parametrize(
    ("visible", "keys", "message"),
    [
        (EIGHT, {"servers": 3, "tensor": 2}, "3 servers of tensor 2 need 6 GPUs beside the 4 of the ranks"),
        ("0", {"servers": 1}, "which has 1; .* or set rollout.colocated=true, which shares the ranks' GPUs"),
        (
            EIGHT,
            {"servers": 9, "colocated": True},
            "need 9 GPUs on the first node, which has 8; lower ",
        ),
        (EIGHT, {"servers": 4, "colocated": True}, "distributed reaches no server on a rank's GPU; set"),
        (
            EIGHT,
            {"servers": 3, "tensor": 2, "colocated": True, "sync": TENSOR},
            "3 servers of tensor 2 are not all beside one of 4 ranks of a node",
        ),
    ],
)
def test_too_few_gpus_are_one_line(
    visible: str, keys: dict[str, Any], message: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", visible)
    with pytest.raises(UserError, match=message) as refused:
        gpus_of(**keys)
    assert "\n" not in str(refused.value)


def test_without_a_gpu_servers_run_on_the_cpu(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")
    assert gpus_of(servers=2) == [(), ()]


@pytest.mark.parametrize("engine", ["sglang", "vllm"])
def test_deterministic_inference_can_be_left_out(engine: str) -> None:
    def words(deterministic: bool) -> str:
        sync = {"transport": "disk", "folder": "sync"}
        rollout = Rollout(engine=engine, servers=1, deterministic=deterministic, sync=sync)
        settings = launch_settings(rollout, Path("model"), False, Path(), 4)
        command = build_command(settings, Path("python"), "cuda", 1, ("4",))
        return " ".join([*command.arguments, *command.environment])

    option = {"sglang": "--enable-deterministic-inference", "vllm": "VLLM_BATCH_INVARIANT"}[engine]
    assert option in words(True) and option not in words(False)


@pytest.mark.parametrize(("stored", "option"), [("float32", "float32"), ("bfloat16", "auto")])
def test_a_float32_model_is_served_in_float32(tmp_path: Path, stored: str, option: str) -> None:
    """The engines' own choice for it on a GPU is float16, which the probe would refuse."""
    (tmp_path / "config.json").write_text(f'{{"torch_dtype": "{stored}"}}')
    rollout = Rollout(engine="sglang", servers=4)
    settings = launch_settings(rollout, tmp_path, False, tmp_path, 4)
    command = build_command(settings, Path(sys.executable), "cuda", 30000, ("4",)).arguments
    assert command[command.index("--dtype") + 1] == option
