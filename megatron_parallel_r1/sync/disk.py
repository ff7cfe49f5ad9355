"""Weights by a folder that the trainer and all servers see.

A version is a Hugging Face folder `version-N`, its weights one safetensors file a bucket, and in it a
`manifest.json` with each file's SHA-256. It appears whole or not at all.
"""

from __future__ import annotations

import hashlib
import json
import os
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

MANIFEST = "manifest.json"
EMBEDDING, HEAD = "model.embed_tokens.weight", "lm_head.weight"
READ_BYTES = 2**24


class DiskTransport:
    """See `Transport`. The host has a second copy of a bucket while it is written.

    Args:
        root: where the folders of versions are.
        keep: how many of them stay; servers may read the last ones again.
        shape, dtype: of the model.
    """

    def __init__(self, root: Path, keep: int, shape: ModelConfig, dtype: torch.dtype) -> None:
        self.root, self.keep, self.shape, self.dtype = root, keep, shape, dtype
        self._servers: list[ServerControl] = []
        self._version = 0
        self._sums: dict[str, str] = {}
        self._places: dict[str, str] = {}

    def open(self, servers: Sequence[ServerControl], facts: Mapping[str, WeightsInfo], version: int) -> None:
        self._servers, self._version = list(servers), version
        self._sums, self._places = {}, {}
        shutil.rmtree(self._work, ignore_errors=True)
        self._work.mkdir(parents=True)

    def send(self, bucket: Bucket) -> None:
        self._write(bucket.tensors)
        # Engines that tie the two look at the embedding alone, and one that does not is given both.
        if self.shape.tied and any(server.wants_head for server in self._servers):
            self._write([(HEAD, tensor) for name, tensor in bucket.tensors if name == EMBEDDING])

    def close(self) -> PassResult:
        index = {"metadata": {}, "weight_map": self._places}
        self._put("model.safetensors.index.json", _json(index))
        self._put("config.json", _json(self.shape.to_hf(self.dtype)))
        (self._work / MANIFEST).write_bytes(_json({"version": self._version, "sha256": self._sums}))
        check(self._work)
        folder = self.root.resolve() / f"version-{self._version}"
        shutil.rmtree(folder, ignore_errors=True)
        self._work.rename(folder)
        version = self._version
        _, lost = map_servers(self._servers, lambda server: server.load(folder, version))
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
        self._places |= {name: file for name, _tensor in tensors}

    def _put(self, file: str, content: bytes) -> None:
        self._sums[file] = hashlib.sha256(content).hexdigest()
        with open(self._work / file, "wb") as target:
            target.write(content)
            target.flush()
            os.fsync(target.fileno())

    def _prune(self) -> None:
        ours = [
            (int(found[1]), path) for path in self.root.iterdir() if (found := _VERSION.fullmatch(path.name))
        ]
        older = sorted(number for number, _path in ours if number != self._version)
        gone = set(older[: max(0, len(older) + 1 - self.keep)])
        for number, path in ours:
            if number in gone:
                shutil.rmtree(path, ignore_errors=True)


_VERSION = re.compile(r"version-(\d+)")


def check(folder: Path) -> None:
    """Holds a folder's files against its manifest.

    Raises:
        UserError: one is missing or is not what was written.
    """
    for file, wanted in json.loads((folder / MANIFEST).read_text())["sha256"].items():
        found = hashlib.sha256()
        try:
            with open(folder / file, "rb") as source:
                while part := source.read(READ_BYTES):
                    found.update(part)
        except FileNotFoundError:
            raise UserError(
                f"{folder / file} is gone; is something else cleaning up {folder.parent}?"
            ) from None
        if found.hexdigest() != wanted:
            raise UserError(
                f"{folder / file} is not what was written to it; check the disk, or choose another folder"
            )


def _json(value: Any) -> bytes:
    return json.dumps(value, indent=1).encode()
