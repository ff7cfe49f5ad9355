"""Each check finds the fault that it is there for."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest
import torch

from megatron_parallel_r1.doctor import kernels, node, ranks
from megatron_parallel_r1.doctor.findings import Finding
from megatron_parallel_r1.errors import UserError
from megatron_parallel_r1.run import transport


def levels(findings: list[Finding]) -> dict[str, str]:
    return {finding.subject: finding.level for finding in findings}


def test_every_kernel_of_a_cpu_is_right() -> None:
    assert levels(kernels.attention(torch.device("cpu"))) == {"attention sdpa": "ok", "attention tiled": "ok"}


def test_a_kernel_that_sees_hidden_paths_is_a_fault(monkeypatch: pytest.MonkeyPatch) -> None:
    def causal(query, key, value, layout_KL, scale, kernel):
        return kernels.definition(query, key, value, layout_KL[:2], scale)

    monkeypatch.setattr(kernels, "path_attention", causal)
    assert set(levels(kernels.attention(torch.device("cpu"))).values()) == {"fault"}


@pytest.mark.skipif(torch.cuda.is_available(), reason="torch sees a GPU here")
def test_gpus_that_torch_does_not_see_are_a_fault(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "0,1")
    (found,) = node.gpus()
    assert found.level == "fault" and "2 on this node, but torch" in found.found
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")
    assert levels(node.gpus()) == {"GPU": "ok"}


def test_the_disk_is_measured_and_left_as_it_was(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(node, "DISK_BYTES", 2**21)
    monkeypatch.setattr(node, "SLOW_DISK", float("inf"))
    monkeypatch.setattr(node, "FULL_DISK", float("inf"))
    assert levels(node.disk(tmp_path)) == {"disk": "ok", "disk rate": "note", "disk room": "note"}
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("program", "level", "text"),
    [
        ('print(\'{"engine": "0.5", "torch": "2.13", "nccl": []}\')', "ok", "sglang 0.5, torch 2.13"),
        ("raise ImportError('libcudart.so.13')", "fault", "ImportError: libcudart.so.13"),
    ],
)
def test_the_environment_of_servers(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, program: str, level: str, text: str
) -> None:
    monkeypatch.setattr(transport, "_ENGINE_VERSIONS", program)
    monkeypatch.setattr(node, "find_python", lambda settings: Path(sys.executable))
    (found,) = node.engine("sglang")
    assert found.level == level and text in found.found


def test_without_servers_the_native_engine_is_left(monkeypatch: pytest.MonkeyPatch) -> None:
    def absent(settings: object) -> Path:
        raise UserError("no environment with sglang: run `make engines`")

    monkeypatch.setattr(node, "find_python", absent)
    assert levels(node.engine("sglang")) == {"servers": "note"}


def test_a_folder_that_another_rank_does_not_share(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ranks, "VISIBLE_S", 0.0)
    monkeypatch.setattr(ranks, "barrier", lambda: None)
    monkeypatch.setattr(ranks, "all_gather_objects", lambda value: [value])
    assert levels(ranks.shared_folder(tmp_path)) == {"shared folder": "ok"}
    monkeypatch.setattr(ranks, "world_size", lambda: 3)  # ranks 1 and 2 write somewhere else
    (found,) = ranks.shared_folder(tmp_path)
    assert found.level == "fault" and found.found.endswith("does not see what ranks 1, 2 write")
    assert not list(tmp_path.iterdir())
    (found,) = ranks.shared_folder(tmp_path / "absent")  # after which the other ranks go on
    assert found.level == "fault" and "cannot write there: No such file or directory" in found.found
