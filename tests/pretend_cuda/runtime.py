"""Installs pretend CUDA into a process: `torch.cuda`'s functions, streams, events, graphs and NCCL groups."""

from __future__ import annotations

import contextlib
import os
import sys
import threading
from collections.abc import Iterator
from types import SimpleNamespace
from typing import Any

import torch
import torch.cuda.random
import torch.distributed as dist
import torch.distributed.distributed_c10d as c10d
from torch.utils._pytree import tree_flatten, tree_map

from tests.pretend_cuda.ledger import LEDGER
from tests.pretend_cuda.tensor import Capture, PretendMode, PretendTensor

GIB = 2**30
H100 = SimpleNamespace(
    name="NVIDIA H100 80GB HBM3",
    total_memory=80 * GIB,
    multi_processor_count=132,
    major=9,
    minor=0,
    uuid="GPU-0",
    gcnArchName="",
)


class Stream:
    """Everything runs in order, so a stream has nothing to do."""

    device = torch.device("cuda:0")
    cuda_stream = 0

    def __init__(self, *args: Any, **kwargs: Any) -> None: ...
    def __enter__(self) -> Stream:
        return self

    def __exit__(self, *args: Any) -> None: ...
    def wait_stream(self, other: Any) -> None: ...
    def wait_event(self, event: Any) -> None: ...
    def record_event(self, event: Any = None) -> Any:
        return event or Event()

    def query(self) -> bool:
        return True

    def synchronize(self) -> None:
        LEDGER.event("wait", "stream.synchronize")


class Event:
    """Is always reached; waiting for one is counted."""

    def __init__(self, *args: Any, **kwargs: Any) -> None: ...
    def record(self, *args: Any) -> None: ...
    def wait(self, *args: Any) -> None: ...
    def query(self) -> bool:
        return True

    def elapsed_time(self, other: Any) -> float:
        return 1.0

    def synchronize(self) -> None:
        LEDGER.event("wait", "event.synchronize")


class Graph:
    """Replays the operations of its capture, one by one, into the tensors that the capture left."""

    ops: list[tuple[Any, Any, Any, Any]]

    def replay(self) -> None:
        for func, args, kwargs, result in self.ops:
            inputs = {t.untyped_storage().data_ptr() for t in _tensors((args, kwargs))}
            for old, new in zip(_tensors(result), _tensors(func(*args, **kwargs)), strict=True):
                # A view of an input, or the input itself, is already what it should be.
                if old is not new and old.untyped_storage().data_ptr() not in inputs:
                    old.copy_(new)


def _tensors(tree: Any) -> list[torch.Tensor]:
    return [leaf for leaf in tree_flatten(tree)[0] if isinstance(leaf, torch.Tensor)]


@contextlib.contextmanager
def _capture(graph: Graph, *args: Any, **kwargs: Any) -> Iterator[None]:
    Capture.ops = []
    try:
        yield
    finally:
        graph.ops, Capture.ops = Capture.ops, None


def install() -> None:
    """Makes this process see one H100; needs the device guard, and comes before any tensor or group."""
    sys.modules["triton"] = None  # type: ignore[assignment]  # Its kernels need the hardware.
    _install_cuda()
    _install_tensors()
    _install_nccl()
    run = threading.Thread.run

    def run_in_mode(thread: threading.Thread) -> None:
        with PretendMode():  # a mode is a thread's own
            run(thread)

    threading.Thread.run = run_in_mode  # type: ignore[method-assign]
    PretendMode().__enter__()


def _install_cuda() -> None:
    stream = Stream()
    stand_ins: dict[str, Any] = {
        "is_available": lambda: True,
        "is_initialized": lambda: True,
        "init": lambda: None,
        "_lazy_init": lambda: None,
        # Each rank of a launch has a GPU of its own, and calls it cuda:0.
        "device_count": lambda: int(os.environ.get("LOCAL_WORLD_SIZE", "1")),
        "current_device": lambda: 0,
        "set_device": lambda device: None,
        "synchronize": lambda *args: LEDGER.event("wait", "torch.cuda.synchronize"),
        "Stream": Stream,
        "Event": Event,
        "CUDAGraph": Graph,
        "graph": _capture,
        "graph_pool_handle": lambda: (0, 0),
        "is_current_stream_capturing": lambda: Capture.ops is not None,
        "current_stream": lambda *args: stream,
        "default_stream": lambda *args: stream,
        "stream": lambda stream: contextlib.nullcontext(),
        "empty_cache": lambda: None,
        "mem_get_info": lambda *args: (70 * GIB, 80 * GIB),
        "reset_peak_memory_stats": lambda *args: None,
        "get_device_capability": lambda *args: (9, 0),
        "get_device_name": lambda *args: H100.name,
        "get_device_properties": lambda *args: H100,
        "default_generators": (torch.Generator(),),
        "manual_seed": lambda seed: None,
        "manual_seed_all": lambda seed: None,
    }
    for name in ("memory_allocated", "max_memory_allocated", "memory_reserved", "max_memory_reserved"):
        stand_ins[name] = lambda *args: 0
    for name, value in stand_ins.items():
        setattr(torch.cuda, name, value)
    for module in (torch.cuda, torch.cuda.random):
        module.get_rng_state = lambda device="cuda": torch.get_rng_state()  # type: ignore[attr-defined]
        module.set_rng_state = lambda state, device="cuda": None  # type: ignore[attr-defined]


def _install_tensors() -> None:
    torch._C._set_only_lift_cpu_tensors(True)
    # Inference tensors cannot be wrapped; what they save does not matter here.
    torch.inference_mode = lambda mode=True: torch.no_grad()  # type: ignore[assignment,misc]
    torch.Tensor.cuda = lambda self, device=None, non_blocking=False: self.to(  # type: ignore[assignment,method-assign]
        "cuda", non_blocking=non_blocking
    )
    new_tensor = torch.tensor

    def tensor(data: Any, **kwargs: Any) -> torch.Tensor:
        return new_tensor(tree_map(_number, data) if isinstance(data, list | tuple) else data, **kwargs)

    torch.tensor = tensor


def _number(value: Any) -> Any:
    if not isinstance(value, PretendTensor):
        return value
    LEDGER.event("copy to host", "torch.tensor of CUDA scalars")
    return value.detach().on_cpu.tolist()


def _install_nccl() -> None:
    """Groups of gloo that say `nccl`; CPU tensors in their collectives are faults."""
    torch.cuda.nccl.version = lambda *args: (2, 30, 7)  # type: ignore[assignment]
    gloo: list[Any] = []  # groups that were asked to be gloo; keeps them alive, and their ids unique
    default: list[str] = []
    init, new_group = dist.init_process_group, dist.new_group

    def backend_of(group: Any = None) -> str:
        return "gloo" if default != ["nccl"] or any(group is known for known in gloo) else "nccl"

    def init_process_group(backend: str | None = None, *args: Any, **kwargs: Any) -> None:
        default[:] = [str(backend)]
        kwargs.pop("device_id", None)
        init("gloo", *args, **kwargs)

    def new(ranks: Any = None, timeout: Any = None, backend: str | None = None, **kwargs: Any) -> Any:
        group = new_group(ranks, timeout=timeout, backend="gloo")
        if backend == "gloo":
            gloo.append(group)
        return group

    dist.init_process_group, dist.new_group = init_process_group, new
    dist.get_backend = c10d.get_backend = backend_of  # type: ignore[assignment]
    c10d._get_object_coll_device = lambda group=None: "cuda" if backend_of(group) == "nccl" else "cpu"
    c10d._get_pg_default_device = lambda group=None: torch.device(c10d._get_object_coll_device(group))
    for name in COLLECTIVES:
        setattr(dist, name, _checked(getattr(dist, name), name, backend_of))


COLLECTIVES = (
    "all_gather", "all_gather_into_tensor", "all_reduce", "all_to_all_single", "broadcast", "gather", "recv",
    "reduce", "reduce_scatter_tensor", "send",
)  # fmt: skip


def _checked(collective: Any, name: str, backend_of: Any) -> Any:
    def call(*args: Any, **kwargs: Any) -> Any:
        group = kwargs.get("group") or next((a for a in args if isinstance(a, dist.ProcessGroup)), None)
        on_cpu = any(not isinstance(tensor, PretendTensor) for tensor in _tensors((args, kwargs)))
        if on_cpu and backend_of(group) == "nccl":
            LEDGER.fault(f"{name} of a CPU tensor in an nccl group")
        return collective(*args, **kwargs)

    return call
