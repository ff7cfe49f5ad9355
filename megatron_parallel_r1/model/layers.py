"""What the layers are made of: Megatron's own modules, or Transformer Engine's with FP8 products.

Megatron-Core makes the FP8 recipes from its configuration; here they are named, and what cannot run is told
before the start. Attention under the layout is ours in either case and stays in the model's dtype.
"""

from __future__ import annotations

from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, version
from typing import Any, Literal

import torch

from megatron_parallel_r1.errors import UserError
from megatron_parallel_r1.model.attention.dispatch import Kernel, check_kernel

Kind = Literal["local", "transformer_engine"]
Scaling = Literal["none", "delayed", "current", "blockwise"]
# The first release in which all three scalings can keep parameters in FP8, too.
OLDEST = (2, 4)
# FP8 products take rows in multiples of this.
FP8_ROWS = 16


@dataclass(frozen=True, slots=True)
class Layers:
    """A recipe's `model.layers`, `model.attention`, `model.fp8` and `model.fp8_params`.

    Attributes:
        kind: whose linear layers and norms.
        attention: what computes attention under the layout.
        fp8: how numbers are scaled into FP8's range: by the history of a tensor's largest number (arXiv
            2209.05433), by its present largest, or by that of blocks of 128 (arXiv 2412.19437).
        fp8_params: whether the layers' matrices are kept in FP8; the optimizer's copies stay float32.
    """

    kind: Kind = "local"
    attention: Kernel = "auto"
    fp8: Scaling = "none"
    fp8_params: bool = False

    def __post_init__(self) -> None:
        if self.fp8 != "none" and self.kind != "transformer_engine":
            raise UserError(
                "model.fp8: only Transformer Engine has FP8; set model.layers to transformer_engine"
            )
        if self.fp8_params and self.fp8 == "none":
            raise UserError("model.fp8_params: needs scaling; set model.fp8 to delayed, current or blockwise")

    @property
    def row_multiple(self) -> int:
        """Each process's part of a row is filled up to a multiple of so many tokens."""
        return 1 if self.fp8 == "none" else FP8_ROWS

    def megatron_fields(self) -> dict[str, Any]:
        """The fields of Megatron's TransformerConfig that say so.

        Blockwise scaling has range enough for four bits of exponent in both directions (arXiv 2412.19437);
        else gradients take five. The history's length is Transformer Engine's own default.
        """
        if self.fp8 == "none":
            return {}
        return {
            "fp8": "e4m3" if self.fp8 == "blockwise" else "hybrid",
            "fp8_recipe": {"current": "tensorwise"}.get(self.fp8, self.fp8),
            "fp8_param": self.fp8_params,
            "fp8_amax_history_len": 1024,
            "fp8_amax_compute_algo": "max",
        }


@dataclass(frozen=True, slots=True)
class Machine:
    """What layers ask of the machine.

    Attributes:
        device: where the model will be.
        engine: Transformer Engine's version; None: it is not installed.
        engine_refusal: why it cannot be imported, though it is installed; "" if it can.
        fp8_refusal: why this GPU has no FP8 of that kind, in Transformer Engine's words; "" if it has.
    """

    device: torch.device
    engine: str | None = None
    engine_refusal: str = ""
    fp8_refusal: str = ""

    @classmethod
    def here(cls, layers: Layers) -> Machine:
        """This machine; imports Transformer Engine only where its layers are asked for."""
        device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
        try:
            engine = version("transformer_engine")
        except PackageNotFoundError:
            return cls(device)
        if layers.kind == "local" or device.type == "cpu" or _too_old(engine):
            return cls(device, engine)
        try:
            # Its library loads CUDA, so it cannot be imported everywhere. All releases have this name here.
            from transformer_engine.pytorch.fp8 import FP8GlobalStateManager as Support
        except (ImportError, OSError) as error:  # without its part for torch, or built for another CUDA
            return cls(device, engine, " ".join(str(error).split()))
        if layers.fp8 == "none":
            return cls(device, engine)
        blockwise = layers.fp8 == "blockwise"
        has, reason = Support.is_fp8_block_scaling_available() if blockwise else Support.is_fp8_available()
        return cls(device, engine, fp8_refusal="" if has else reason)


def check_layers(layers: Layers, dim: int, dtype: torch.dtype, machine: Machine | None = None) -> None:
    """Whether layers can run on a machine.

    Args:
        dim: of an attention head.
        dtype: of parameters and activations.
        machine: None for this one.

    Raises:
        UserError: they cannot.
    """
    machine = machine or Machine.here(layers)
    check_kernel(layers.attention, machine.device, dim)
    if layers.kind == "local":
        return
    if machine.device.type != "cuda":
        raise UserError("model.layers: transformer_engine needs a CUDA device; set it to local")
    if machine.engine is None:
        raise UserError(
            "model.layers: Transformer Engine is not installed; set it to local, or run "
            "`pip install transformer-engine[pytorch]`"
        )
    if _too_old(machine.engine):
        oldest = ".".join(map(str, OLDEST))
        raise UserError(
            f"model.layers: Transformer Engine {machine.engine} is too old; install {oldest} or later"
        )
    if machine.engine_refusal:
        raise UserError(
            f"model.layers: Transformer Engine {machine.engine} cannot be imported "
            f"({machine.engine_refusal}); install one that was built for this torch, or set it to local"
        )
    if layers.fp8 != "none" and dtype != torch.bfloat16:
        raise UserError("model.fp8: FP8 layers are trained around bfloat16; set dtype to bfloat16")
    if machine.fp8_refusal:
        raise UserError(f"model.fp8: {layers.fp8}: {machine.fp8_refusal.rstrip('.')}; set it to none")


def _too_old(engine: str) -> bool:
    return tuple(int(part) for part in engine.split(".")[:2]) < OLDEST
