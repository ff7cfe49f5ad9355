"""Sends weights through shared memory to servers on the sender's node.

HTTP carries a pickle of names and handles: of a file in shared memory on a CPU, of CUDA inter-process memory
on a GPU. The server maps it and copies from it before it answers.
"""

from __future__ import annotations

import base64
import pickle
import uuid
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import accumulate
from pathlib import Path
from typing import Any, cast

import torch
from torch import Tensor
from torch.multiprocessing import reductions

from megatron_parallel_r1.sync.buckets import Bucket
from megatron_parallel_r1.sync.control import LiveServerControl, ServerControl, WeightsInfo
from megatron_parallel_r1.sync.sender import PassResult, map_servers

SHARED_MEMORY = Path("/dev/shm")
# Each tensor is aligned for any dtype. torch keeps a reference count in the head of the file.
ALIGNED, HEAD = 16, 64
# That reference count. It must not fall to 0, where the last user would remove the file: the sender does.
REFERENCES = 2**30
# Index of the device in the arguments of torch's `rebuild_cuda_tensor`.
DEVICE = 6


class SharedMemoryTransport:
    """See `Transport`. Servers are independent: one that fails is left out of the rest of the pass."""

    def __init__(self) -> None:
        self._servers: list[LiveServerControl] = []
        self._processes: dict[str, int] = {}
        self._version = 0
        self._lost: dict[str, str] = {}

    def open(self, servers: Sequence[ServerControl], infos: Mapping[str, WeightsInfo], version: int) -> None:
        self._servers = [cast(LiveServerControl, server) for server in servers]
        self._processes = {server.url: infos[server.url].processes for server in servers}
        self._version, self._lost = version, {}
        self._try(lambda server: server.begin_update())

    def send(self, bucket: Bucket) -> None:
        version = self._version if bucket.last else None
        with shared(bucket.tensors) as payload:

            def take(server: LiveServerControl) -> None:
                # A handle serves one process.
                server.receive_shared([payload() for _ in range(self._processes[server.url])], version)

            self._try(take)

    def close(self) -> PassResult:
        self._try(lambda server: server.end_update())
        return PassResult(self._lost)

    def end(self) -> None:
        pass

    def _try(self, work: Callable[[LiveServerControl], None]) -> None:
        _, reasons = map_servers(self._servers, work)
        self._lost |= reasons
        self._servers = [server for server in self._servers if server.url not in reasons]


@contextmanager
def shared(tensors: Sequence[tuple[str, Tensor]]) -> Iterator[Callable[[], str]]:
    """Copies tensors to shared memory for the duration of the context.

    Sharing a parameter itself would share, and on a CPU move, everything in the same storage.

    Yields:
        A function that creates the payload for one server process, from which SGLang rebuilds the tensors.
    """
    sizes = [-(-tensor.nbytes // ALIGNED) * ALIGNED for _name, tensor in tensors]
    starts = list(accumulate(sizes, initial=HEAD))
    if tensors[0][1].is_cuda:
        block = torch.empty(starts[-1], dtype=torch.uint8, device=tensors[0][1].device)
        copies = _copy(block, tensors, starts)
        yield lambda: _payload([(name, _on_gpu(copy)) for name, copy in copies])
        return
    file = SHARED_MEMORY / f"parallel-r1-{uuid.uuid4().hex}"
    try:
        block = torch.from_file(str(file), shared=True, size=starts[-1], dtype=torch.uint8)
        block[:4].view(torch.int32).fill_(REFERENCES)
        _copy(block, tensors, starts)
        # One for all tensors: a pickle stores the same object once.
        storage = _Call(
            reductions.rebuild_storage_filename,
            (torch.UntypedStorage, b"", f"/{file.name}".encode(), starts[-1] - HEAD),
        )
        named = [
            (name, _in_file(tensor, storage, start - HEAD))
            for (name, tensor), start in zip(tensors, starts, strict=False)
        ]
        yield lambda: _payload(named)
    finally:
        file.unlink(missing_ok=True)


@dataclass(frozen=True, slots=True)
class _Call:
    """Unpickles to the result of a function call."""

    function: Callable[..., Any]
    arguments: tuple[Any, ...]

    def __reduce__(self) -> tuple[Callable[..., Any], tuple[Any, ...]]:
        return self.function, self.arguments


def _copy(
    block: Tensor, tensors: Sequence[tuple[str, Tensor]], starts: list[int]
) -> list[tuple[str, Tensor]]:
    copies = []
    for (name, tensor), start in zip(tensors, starts, strict=False):
        target = block[start : start + tensor.nbytes].view(tensor.dtype).view(tensor.shape)
        copies.append((name, target.copy_(tensor)))
    return copies


def _in_file(tensor: Tensor, storage: _Call, start: int) -> _Call:
    """A tensor of the same shape, `start` bytes after a file's head.

    torch's own way (the sharing strategy `file_system`) starts a process for the sender's files, which
    inherits all open files of the sender and lives as long as the servers do.
    """
    typed = _Call(reductions.rebuild_typed_storage, (storage, tensor.dtype))
    strides = torch.empty(tensor.shape, device="meta").stride()
    where = (start // tensor.itemsize, tensor.shape, strides, False)
    return _Call(reductions.rebuild_tensor, (Tensor, typed, where))


def _on_gpu(tensor: Tensor) -> _Call:
    """Names the GPU by its UUID: its index depends on the GPUs that a process sees. SGLang reads both."""
    rebuild, arguments = reductions.reduce_tensor(tensor)
    device = str(torch.cuda.get_device_properties(arguments[DEVICE]).uuid)
    return _Call(rebuild, (*arguments[:DEVICE], device, *arguments[DEVICE + 1 :]))


def _payload(named: list[tuple[str, _Call]]) -> str:
    return base64.b64encode(pickle.dumps(named)).decode("ascii")
