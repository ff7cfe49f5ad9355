"""A tensor that says `cuda:0` around one on the CPU, and a dispatch that unwraps, checks, computes, wraps."""

from __future__ import annotations

from typing import Any

import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_flatten, tree_map

from tests.pretend_cuda.ledger import LEDGER

# Operations whose result's shape or value the host must know.
WAITS = {
    "_local_scalar_dense", "_unique2", "bincount", "equal", "histc", "is_nonzero", "masked_select", "nonzero",
    "unique_consecutive", "unique_dim",
}  # fmt: skip
INDEXING = {"index", "index_put", "index_put_", "_index_put_impl_", "_unsafe_index"}


class PretendTensor(torch.Tensor):
    """`on_cpu` holds the data."""

    on_cpu: torch.Tensor

    @staticmethod
    def __new__(cls, on_cpu: torch.Tensor) -> PretendTensor:
        tensor = torch.Tensor._make_wrapper_subclass(
            cls,
            on_cpu.shape,
            strides=on_cpu.stride(),
            storage_offset=on_cpu.storage_offset(),
            dtype=on_cpu.dtype,
            device="cuda:0",
        )
        tensor.on_cpu = on_cpu
        return tensor

    def __init__(self, on_cpu: torch.Tensor) -> None: ...

    def __repr__(self) -> str:  # type: ignore[override]
        return f"PretendTensor({self.on_cpu!r})"

    @classmethod
    def __torch_dispatch__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        return compute(func, args, kwargs)

    @property
    def data(self) -> torch.Tensor:
        with torch.no_grad():
            return self.detach()

    @data.setter
    def data(self, new: torch.Tensor) -> None:
        if not isinstance(new, PretendTensor):
            LEDGER.fault("`.data` of a CUDA parameter set to a CPU tensor")
        self.on_cpu = host(new)
        if self.shape != self.on_cpu.shape or self.dtype != self.on_cpu.dtype:
            torch.Tensor.data.__set__(self, PretendTensor(self.on_cpu))  # type: ignore[attr-defined]

    # What torch answers in C++ from a storage that the wrapper does not have.
    def data_ptr(self) -> int:
        return self.on_cpu.data_ptr()

    def untyped_storage(self) -> torch.UntypedStorage:
        return self.on_cpu.untyped_storage()

    def is_pinned(self, device: Any = None) -> bool:
        return False

    def record_stream(self, stream: Any) -> None: ...

    def tolist(self) -> Any:
        LEDGER.event("copy to host", "tolist")
        return self.detach().on_cpu.tolist()

    def __reduce_ex__(self, protocol: Any) -> Any:
        LEDGER.event("copy to host", "pickle")
        return PretendTensor, (self.detach().on_cpu,)

    def __deepcopy__(self, memo: Any) -> PretendTensor:
        return PretendTensor(self.on_cpu.clone())


class PretendMode(TorchDispatchMode):
    """Sees factories such as `torch.zeros(..., device="cuda")`, which no tensor argument announces."""

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        return compute(func, args, kwargs)


class Capture:
    """Operations of a CUDA graph under capture; `ops` is None outside of one."""

    ops: list[tuple[Any, Any, Any, Any]] | None = None


def host(value: Any) -> Any:
    """The CPU tensor of a pretend tensor; any other value unchanged."""
    return value.on_cpu if isinstance(value, PretendTensor) else value


def compute(func: Any, args: Any, kwargs: Any) -> Any:
    """Runs one ATen operation on the CPU and gives its results the device that CUDA would."""
    kwargs = dict(kwargs or {})
    tensors = [leaf for leaf in tree_flatten((args, kwargs))[0] if isinstance(leaf, torch.Tensor)]
    pretend = [tensor for tensor in tensors if isinstance(tensor, PretendTensor)]
    plain = [tensor for tensor in tensors if not isinstance(tensor, PretendTensor)]
    device = torch.device(kwargs["device"]) if kwargs.get("device") is not None else None
    on_cuda = device.type == "cuda" if device is not None else bool(pretend)
    name = func.overloadpacket.__name__
    if name == "is_pinned":
        return is_pinned(tensors[0])
    if name in ("_pin_memory", "pin_memory"):
        return _pinned(args[0].clone())
    _check(func.namespace, name, args, kwargs, pretend, plain, device)
    if device is not None and on_cuda:
        kwargs["device"] = torch.device("cpu")
    pin = kwargs.pop("pin_memory", False)

    wrappers = {id(tensor.on_cpu): tensor for tensor in pretend}
    cpu_args, cpu_kwargs = tree_map(host, args), tree_map(host, kwargs)
    result = func(*cpu_args, **cpu_kwargs)
    if Capture.ops is not None and on_cuda:
        Capture.ops.append((func, cpu_args, cpu_kwargs, result))

    def wrap(value: Any) -> Any:
        if not isinstance(value, torch.Tensor) or any(value is tensor for tensor in plain):
            return value
        if id(value) in wrappers:  # in place
            return wrappers[id(value)]
        return PretendTensor(value) if on_cuda else value

    result = tree_map(wrap, result)
    return _pinned(result) if pin else result


def is_pinned(tensor: torch.Tensor) -> bool:
    return getattr(tensor, "pretend_pinned", False)


def _pinned(tensor: torch.Tensor) -> torch.Tensor:
    tensor.pretend_pinned = True  # type: ignore[attr-defined]
    return tensor


def _check(
    namespace: str,
    name: str,
    args: Any,
    kwargs: dict[str, Any],
    pretend: list[PretendTensor],
    plain: list[torch.Tensor],
    device: torch.device | None,
) -> None:
    """Records the faults, waits and copies of one operation."""
    # A CPU tensor without dimensions counts as a number.
    wide = [tensor for tensor in plain if tensor.dim()]
    if name == "copy_":
        _check_copy(args[0], args[1])
    elif name == "_to_copy":
        to_cuda = device is not None and device.type == "cuda"
        if not pretend and to_cuda:
            _copy_to_device(args[0])
        elif pretend and device is not None and not to_cuda:
            LEDGER.event("copy to host", "to(cpu)")
    elif pretend and name in INDEXING and isinstance(args[0], PretendTensor):
        values = args[2] if len(args) > 2 else None
        if isinstance(values, torch.Tensor) and values.dim() and not isinstance(values, PretendTensor):
            LEDGER.fault(f"{name}: values on the CPU for a CUDA tensor")
        elif wide:
            LEDGER.event("copy to device", f"{name} with indices on the CPU")
        fills = name != "index" and isinstance(values, torch.Tensor) and values.numel() == 1
        if not fills and any(_is_mask(index) for index in args[1]):
            LEDGER.event("wait", f"{name} with a boolean mask")
    elif pretend and wide and name != "set_":
        LEDGER.fault(f"{namespace}::{name} mixes CUDA and CPU tensors")
    if pretend and (name in WAITS or (name == "repeat_interleave" and kwargs.get("output_size") is None)):
        LEDGER.event("wait", name)
        if Capture.ops is not None:
            LEDGER.fault(f"{name} during the capture of a CUDA graph")


def _check_copy(to: torch.Tensor, source: torch.Tensor) -> None:
    if isinstance(to, PretendTensor) and not isinstance(source, PretendTensor):
        _copy_to_device(source)
    elif isinstance(source, PretendTensor) and not isinstance(to, PretendTensor):
        LEDGER.event("copy to host", "copy_")


def _copy_to_device(source: torch.Tensor) -> None:
    LEDGER.event("pinned copy" if is_pinned(source) else "copy to device", "to(cuda)")


def _is_mask(index: Any) -> bool:
    return isinstance(index, PretendTensor) and index.dtype in (torch.bool, torch.uint8)
