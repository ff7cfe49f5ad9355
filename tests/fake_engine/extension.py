"""The module that Transformer Engine imports as its compiled library, and its Python on a CPU."""

from __future__ import annotations

import enum
import importlib.machinery
import importlib.metadata
import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any
from unittest.mock import MagicMock

import torch

from tests.fake_engine import products, quantized, updates

VERSION = "2.20.2"
# What Transformer Engine imports beside its library and these tests never call.
ABSENT = ("onnxscript", "onnx", "onnxscript.onnx_opset", "einops")
HOPPER = SimpleNamespace(major=9, minor=0, multi_processor_count=132)

DType = enum.IntEnum(
    "DType",
    "kByte kInt32 kFloat32 kFloat16 kBFloat16 kFloat8E4M3 kFloat8E5M2 kFloat4E2M1",
    start=0,
)
# Places of a module's quantizers.
FP8FwdTensors = enum.IntEnum(
    "FP8FwdTensors", [f"GEMM{n}_{what}" for n in (1, 2, 3) for what in ("INPUT", "WEIGHT", "OUTPUT")], start=0
)
FP8BwdTensors = enum.IntEnum(
    "FP8BwdTensors", [f"GRAD_{what}{n}" for n in (1, 2, 3) for what in ("OUTPUT", "INPUT")], start=0
)


class _Numbers(type):
    """An enum of the library: each name that is asked for is a number."""

    def __getattr__(cls, name: str) -> int:
        if name.startswith("__"):
            raise AttributeError(name)
        setattr(cls, name, len(cls.__dict__))
        return cls.__dict__[name]

    @property
    def __members__(cls) -> dict[str, int]:
        return {name: value for name, value in vars(cls).items() if not name.startswith("__")}


class FakeLibrary(ModuleType):
    """Has what the modules of this package compute; anything else can be imported and not called."""

    DType = DType
    FP8FwdTensors = FP8FwdTensors
    FP8BwdTensors = FP8BwdTensors

    def __init__(self) -> None:
        super().__init__("transformer_engine_torch")
        for module in (quantized, products, updates):
            for name, function in vars(module).items():
                if getattr(function, "__module__", None) == module.__name__ and not name.startswith("_"):
                    setattr(self, name, function)
        for name in ("layernorm_fwd", "layernorm_bwd"):  # found by `import *`
            setattr(self, name, partial(_missing, name))

    def __getattr__(self, name: str) -> object:
        if name.startswith("__"):
            raise AttributeError(name)
        if name[0].isupper():
            setattr(self, name, _Numbers(name, (), {}))
        else:
            setattr(self, name, partial(_missing, name))
        return self.__dict__[name]


def _missing(name: str, *args: object, **kwargs: object) -> None:
    raise NotImplementedError(f"the fake library has no {name}")


@contextmanager
def _one_by_one(*args: object, **kwargs: object) -> Iterator[SimpleNamespace]:
    yield SimpleNamespace(wait=lambda: None)


def install(source: Path) -> None:
    """Makes `transformer_engine` importable from an unpacked wheel, before Megatron-Core is imported."""
    os.environ["NVTE_PROJECT_BUILDING"] = "1"  # Transformer Engine's own way not to load its libraries.
    os.environ["NVTE_TORCH_COMPILE"] = "0"
    # Gloo would gather tensors of several dtypes as one, which it casts to their common dtype; NCCL does not.
    torch.distributed._coalescing_manager = _one_by_one
    library = FakeLibrary()
    for name, module in ((library.__name__, library), *((name, MagicMock(name=name)) for name in ABSENT)):
        module.__spec__, module.__path__ = importlib.machinery.ModuleSpec(name, None), []
        sys.modules.setdefault(name, module)
    version = importlib.metadata.version
    ours = ("transformer_engine", "transformer-engine")
    importlib.metadata.version = lambda name: VERSION if name.startswith(ours) else version(name)
    package = ModuleType("transformer_engine")
    package.__path__, package.__version__ = [str(source)], VERSION
    package.__spec__ = importlib.machinery.ModuleSpec("transformer_engine", None, is_package=True)
    sys.modules["transformer_engine"] = package
    import transformer_engine.common

    transformer_engine.common.load_framework_extension = lambda framework: None
    import transformer_engine.pytorch

    _run_on_cpu()


def _run_on_cpu() -> None:
    """Redirects to the CPU what Transformer Engine's Python asks of CUDA; it computes as for a Hopper."""
    from transformer_engine.pytorch import distributed, quantization
    from transformer_engine.pytorch.module import base
    from transformer_engine.pytorch.optimizers import fused_adam

    from megatron_parallel_r1.distributed.cpu_backend import _CpuTorch
    from megatron_parallel_r1.model.layers import LayerSupport

    torch.cuda.get_device_properties = lambda device=None: HOPPER
    torch.cuda.get_device_capability = lambda device=None: (HOPPER.major, HOPPER.minor)
    torch.cuda.is_current_stream_capturing = lambda: False
    quantization._FP8_SUPPORT = quantization._FP8_BLOCK_SCALING_SUPPORT = (True, "")
    quantization.RecipeState.create = staticmethod(
        partial(quantization.RecipeState.create, device=quantized.CPU)
    )
    # What a checkpointed layer saves and restores around its second forward pass.
    distributed._get_cuda_rng_state = lambda graph_safe=True: torch.get_rng_state()
    distributed._set_cuda_rng_state = lambda state, graph_safe=True: torch.set_rng_state(state)
    # Its modules ask whether there is CUDA when they are made, and whether their input is on it.
    base.torch = fused_adam.torch = _CpuTorch()
    base.torch.cuda = SimpleNamespace(is_available=lambda: True, synchronize=lambda: None)
    prepare = base.TransformerEngineBaseModule.prepare_forward

    def prepare_forward(module: object, *args: Any, **kwargs: Any) -> torch.Tensor:
        torch.Tensor.is_cuda = property(lambda tensor: True)
        try:
            return prepare(module, *args, **kwargs)
        finally:
            del torch.Tensor.is_cuda

    base.TransformerEngineBaseModule.prepare_forward = prepare_forward
    LayerSupport.detect = classmethod(lambda cls, layers: cls(torch.device("cuda"), VERSION))
