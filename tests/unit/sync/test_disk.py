"""A version on disk: whole, checksummed, loadable, and pruned."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from megatron_parallel_r1.architecture.model_config import ModelConfig
from megatron_parallel_r1.checkpoint_formats.hf_folder import load_hf_folder
from megatron_parallel_r1.errors import UserError
from megatron_parallel_r1.model.weights import random_hf_tensors
from megatron_parallel_r1.rollout.servers.client import Unreachable
from megatron_parallel_r1.sync.buckets import Bucket
from megatron_parallel_r1.sync.disk import DiskTransport, verify_manifest

SHAPE = ModelConfig(hidden=32, layers=2, heads=4, kv_heads=2, head_dim=8, ffn=64, vocab=41)


class Recorder:
    """Stands in for a server; reads what it is told to load, as one would."""

    def __init__(self, url: str = "http://a:1", wants_head: bool = False, fails: bool = False) -> None:
        self.url, self.wants_head, self.fails = url, wants_head, fails
        self.loaded: dict[int, dict[str, torch.Tensor]] = {}

    def load_folder(self, folder: Path, version: int) -> None:
        if self.fails:
            raise Unreachable(f"{self.url} is gone")
        self.loaded[version] = dict(load_hf_folder(folder)[1])


def publish(disk: DiskTransport, version: int, *servers: Recorder) -> dict[str, str]:
    tensors = list(random_hf_tensors(disk.shape, version))
    disk.open(servers, {}, version)
    disk.send(Bucket(tensors[:5], last=False))
    disk.send(Bucket(tensors[5:], last=True))
    return dict(disk.close().lost)


@pytest.mark.parametrize("tied", [True, False])
def test_a_folder_holds_the_weights_and_is_one_of_hugging_face(tmp_path: Path, tied: bool) -> None:
    shape, server = replace(SHAPE, tied=tied), Recorder()
    assert not publish(DiskTransport(tmp_path, 2, shape, torch.float32), 7, server)
    expected = dict(random_hf_tensors(shape, 7))
    assert server.loaded[7].keys() == expected.keys()
    assert all(torch.equal(server.loaded[7][name], tensor) for name, tensor in expected.items())
    assert load_hf_folder(tmp_path / "version-7")[0] == shape
    assert sorted(json.loads((tmp_path / "version-7" / "manifest.json").read_text())["sha256"]) == [
        "config.json",
        "model-00001.safetensors",
        "model-00002.safetensors",
        "model.safetensors.index.json",
    ]


def test_a_tied_output_matrix_is_written_for_whoever_wants_it(tmp_path: Path) -> None:
    server = Recorder(wants_head=True)
    publish(DiskTransport(tmp_path, 2, SHAPE, torch.float32), 1, server, Recorder("http://b:1"))
    assert torch.equal(server.loaded[1]["lm_head.weight"], server.loaded[1]["model.embed_tokens.weight"])


def test_old_versions_go_and_what_is_not_ours_stays(tmp_path: Path) -> None:
    disk = DiskTransport(tmp_path, 2, SHAPE, torch.float32)
    (tmp_path / "mine").mkdir()
    for version in (9, 10, 11):
        publish(disk, version)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["mine", "version-10", "version-11"]
    # A run that went back to an earlier checkpoint publishes lower numbers.
    publish(disk, 3)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["mine", "version-11", "version-3"]


def test_damage_is_found(tmp_path: Path) -> None:
    publish(DiskTransport(tmp_path, 2, SHAPE, torch.float32), 1)
    file = tmp_path / "version-1" / "model-00001.safetensors"
    content = bytearray(file.read_bytes())
    content[-1] ^= 1
    file.write_bytes(content)
    with pytest.raises(UserError, match=r"model-00001.safetensors differs from what was written"):
        verify_manifest(tmp_path / "version-1")
    file.unlink()
    with pytest.raises(UserError, match=r"model-00001.safetensors is missing"):
        verify_manifest(tmp_path / "version-1")


def test_a_server_that_fails_is_told_of(tmp_path: Path) -> None:
    good, bad = Recorder(), Recorder("http://b:1", fails=True)
    assert publish(DiskTransport(tmp_path, 2, SHAPE, torch.float32), 1, good, bad) == {
        "http://b:1": "http://b:1 is gone"
    }
    assert good.loaded.keys() == {1}


def test_a_pass_that_broke_off_leaves_no_version(tmp_path: Path) -> None:
    disk = DiskTransport(tmp_path, 2, SHAPE, torch.float32)
    disk.open([], {}, 1)
    disk.send(Bucket(list(random_hf_tensors(SHAPE, 1))[:3], last=False))
    assert not (tmp_path / "version-1").exists()
    assert not publish(disk, 1) and (tmp_path / "version-1").exists()
    assert [path.name for path in tmp_path.iterdir()] == ["version-1"]
