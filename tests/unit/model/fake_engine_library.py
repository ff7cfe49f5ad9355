"""Transformer Engine's real Python over a fake of its compiled library, which cannot be without CUDA.

Run as a program of its own (`python -O`, since Transformer Engine asserts that its enums are those of the
library) it builds a model of such layers, computes nothing, and prints how its weights compare with those of
local layers.
"""

import importlib.machinery
import importlib.metadata
import json
import os
import sys
from pathlib import Path
from types import ModuleType, SimpleNamespace
from unittest.mock import MagicMock

import torch

# What Transformer Engine imports beside its library, and this build never calls.
ABSENT = ("onnxscript", "onnx", "onnxscript.onnx_opset", "nvdlfw_inspect", "nvdlfw_inspect.api", "einops")


class _Numbers(type):
    """An enum of the library: each name that is asked for is a number."""

    def __getattr__(cls, name: str) -> int:
        if name.startswith("__"):
            raise AttributeError(name)
        setattr(cls, name, len(cls.__dict__))
        return cls.__dict__[name]


class _Library(ModuleType):
    def __getattr__(self, name: str) -> object:
        if name.startswith("__"):
            raise AttributeError(name)
        fake = _Numbers(name, (), {}) if name[0].isupper() else MagicMock(name=name)
        setattr(self, name, fake)
        return fake


def install(source: Path) -> None:
    """Makes `transformer_engine` importable from an unpacked wheel."""
    os.environ["NVTE_PROJECT_BUILDING"] = "1"  # Transformer Engine's own way not to load its libraries.
    for name in ("transformer_engine_torch", *ABSENT):
        module = _Library(name) if name not in ABSENT else MagicMock(name=name)
        module.__spec__, module.__path__ = importlib.machinery.ModuleSpec(name, None), []
        sys.modules.setdefault(name, module)
    version = importlib.metadata.version
    importlib.metadata.version = lambda name: "2.20.2" if name.startswith("transformer") else version(name)
    package = ModuleType("transformer_engine")
    package.__path__, package.__version__ = [str(source)], "2.20.2"
    package.__spec__ = importlib.machinery.ModuleSpec("transformer_engine", None, is_package=True)
    sys.modules["transformer_engine"] = package
    import transformer_engine.common.recipe

    transformer_engine.common.load_framework_extension = lambda framework: None
    import transformer_engine.pytorch


def histories(model: torch.nn.ModuleList) -> list[torch.Tensor]:
    """Scales and histories of all its layers, which are made if they are not there."""
    from transformer_engine.common.recipe import DelayedScaling

    found = []
    for layer in (module for module in model.modules() if hasattr(module, "fp8_meta")):
        if "scaling_fwd" not in layer.fp8_meta:
            layer.fp8_meta.update(fp8_checkpoint=True, num_gemms=1, recipe=DelayedScaling())
            layer.init_fp8_meta_tensors(layer.fp8_meta["recipe"])
        for way in ("scaling_fwd", "scaling_bwd"):
            found += [layer.fp8_meta[way].scale, layer.fp8_meta[way].amax_history]
    return found


def kept(model: torch.nn.ModuleList, other: torch.nn.ModuleList) -> bool:
    """Whether histories go from one model to another by what a checkpoint keeps."""
    from transformer_engine.pytorch.quantization import DelayedScalingRecipeState

    from megatron_parallel_r1.train.checkpoints.sharded import extra_states, set_extra_states

    original_init = DelayedScalingRecipeState.__init__

    def made_here(self: DelayedScalingRecipeState, *arguments: object, **named: object) -> None:
        original_init(self, *arguments, **named | {"device": torch.device("cpu")})

    DelayedScalingRecipeState.__init__ = made_here
    torch.cuda.synchronize = lambda: None
    torch.cuda.get_device_properties = lambda device: SimpleNamespace(major=9, minor=0)
    nothing_yet = not extra_states(model)
    histories_before = histories(model)
    for number, tensor in enumerate(histories_before):
        tensor.fill_(number + 0.5)
    set_extra_states(other, extra_states(model))
    found = histories(other)
    return (
        nothing_yet
        and len(histories_before) == len(found) == 32
        and all(map(torch.equal, histories_before, found))
    )


def main() -> None:
    install(Path(os.environ["TRANSFORMER_ENGINE_SOURCE"]))
    from megatron_parallel_r1.architecture.model_config import ModelConfig
    from megatron_parallel_r1.distributed import process
    from megatron_parallel_r1.model import gpt, weights
    from megatron_parallel_r1.model.layers import Layers
    from megatron_parallel_r1.model.transformer import transformer_config

    shape = ModelConfig(hidden=64, layers=2, heads=4, kv_heads=2, head_dim=16, ffn=96, vocab=64)
    with process.running(seed=1):
        local = gpt.build_model(shape, torch.bfloat16)
        engine = Layers("transformer_engine")
        config = transformer_config(shape, torch.bfloat16, layers=engine)
        config.use_cpu_initialization = True
        torch.cuda.is_available = lambda: True  # All that its layers ask for to be made.
        theirs, others = (gpt.Model(shape, [gpt.PathGPT(shape, config, engine)]) for _ in range(2))
        torch.cuda.is_available = lambda: False
        for model in (local, theirs):
            weights.load_hf_tensors(model, weights.random_hf_tensors(shape, 1))
        kinds = {type(layer.self_attention.linear_qkv).__name__ for layer in theirs[0].decoder.layers}
        pairs = zip(weights.hf_tensors(local), weights.hf_tensors(theirs), strict=True)
        saved = [
            {
                entry.key: tuple(entry.data.shape)
                for entry in model[0].sharded_state_dict(metadata={"non_homogeneous_layers": True}).values()
                if not entry.key.endswith("_extra_state")
            }
            for model in (local, theirs)
        ]
        print()
        print(
            json.dumps(
                {
                    "layers": sorted(kinds),
                    "same_names": set(weights.own_parameters(local)) == set(weights.own_parameters(theirs)),
                    "same_tensors": all(a == b and torch.equal(x, y) for (a, x), (b, y) in pairs),
                    "same_checkpoint": saved[0] == saved[1],
                    "keeps_histories": kept(theirs, others),
                }
            )
        )


if __name__ == "__main__":
    main()
