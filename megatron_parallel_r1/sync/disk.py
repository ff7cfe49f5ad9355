"""Sends weights through a folder that the trainer and all servers see.

A version is a Hugging Face folder `version-N`, with one safetensors file per bucket and a `manifest.json` of
each file's SHA-256. It appears whole or not at all.
"""

from __future__ import annotations

import hashlib
import json
import re
import shutil
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save
from torch import Tensor

from megatron_parallel_r1.architecture.model_config import ModelConfig
from megatron_parallel_r1.errors import UserError
from megatron_parallel_r1.sync.buckets import Bucket
from megatron_parallel_r1.sync.control import ServerControl, WeightsInfo
from megatron_parallel_r1.sync.sender import PassResult, map_servers
from megatron_parallel_r1.utils.files import file_digest, fsync_path

MANIFEST = "manifest.json"
EMBEDDING, HEAD = "model.embed_tokens.weight", "lm_head.weight"


class DiskTransport:
    """See `Transport`. Host memory holds a second copy of a bucket while it is written.

    Args:
        root: parent folder of the versions, of which `keep` stay; servers may read the last ones again.
    """

    def __init__(self, root: Path, keep: int, shape: ModelConfig, dtype: torch.dtype) -> None:
        self.root, self.keep, self.shape, self.dtype = root, keep, shape, dtype
        self._servers: list[ServerControl] = []
        self._version = 0
        self._sums: dict[str, str] = {}
        self._weight_map: dict[str, str] = {}

    def open(self, servers: Sequence[ServerControl], infos: Mapping[str, WeightsInfo], version: int) -> None:
        self._servers, self._version = list(servers), version
        self._sums, self._weight_map = {}, {}
        shutil.rmtree(self._work, ignore_errors=True)
        self._work.mkdir(parents=True)

    def send(self, bucket: Bucket) -> None:
        self._write(bucket.tensors)
        # Engines that tie the two read the embedding alone; one that does not gets both.
        if self.shape.tied and any(server.wants_head for server in self._servers):
            self._write([(HEAD, tensor) for name, tensor in bucket.tensors if name == EMBEDDING])

    def close(self) -> PassResult:
        index = {"metadata": {}, "weight_map": self._weight_map}
        self._put("model.safetensors.index.json", _json(index))
        self._put("config.json", _json(self.shape.to_hf(self.dtype)))
        (self._work / MANIFEST).write_bytes(_json({"version": self._version, "sha256": self._sums}))
        verify_manifest(self._work)
        folder = self.root.resolve() / f"version-{self._version}"
        shutil.rmtree(folder, ignore_errors=True)
        self._work.rename(folder)
        version = self._version
        _, lost = map_servers(self._servers, lambda server: server.load_folder(folder, version))
        self._prune()
        return PassResult(lost)

    def end(self) -> None:
        pass

    @property
    def _work(self) -> Path:
        return self.root / f".version-{self._version}.new"

    def _write(self, tensors: Sequence[tuple[str, Tensor]]) -> None:
        if not tensors:
            return
        file = f"model-{len(self._sums) + 1:05}.safetensors"
        self._put(file, save({name: tensor.cpu() for name, tensor in tensors}, metadata={"format": "pt"}))
        self._weight_map |= {name: file for name, _tensor in tensors}

    def _put(self, file: str, content: bytes) -> None:
        self._sums[file] = hashlib.sha256(content).hexdigest()
        (self._work / file).write_bytes(content)
        fsync_path(self._work / file)

    def _prune(self) -> None:
        versions = [
            (int(match[1]), path) for path in self.root.iterdir() if (match := _VERSION.fullmatch(path.name))
        ]
        others = sorted(number for number, _path in versions if number != self._version)
        expired = set(others[: max(0, len(others) + 1 - self.keep)])
        for number, path in versions:
            if number in expired:
                shutil.rmtree(path, ignore_errors=True)


_VERSION = re.compile(r"version-(\d+)")


def verify_manifest(folder: Path) -> None:
    """Verifies a folder's files against its manifest.

    Raises:
        UserError: a file is missing or differs from what was written.
    """
    for file, expected in json.loads((folder / MANIFEST).read_text())["sha256"].items():
        try:
            digest = file_digest(folder / file)
        except FileNotFoundError:
            raise UserError(
                f"{folder / file} is missing; is something else cleaning up {folder.parent}?"
            ) from None
        if digest.sha256 != expected:
            raise UserError(
                f"{folder / file} differs from what was written; check the disk, or choose another folder"
            )


def _json(value: Any) -> bytes:
    return json.dumps(value, indent=1).encode()
