"""The implementation of the layers: Megatron's own modules, or Transformer Engine's with FP8 GEMMs.

Megatron-Core creates the FP8 recipes from its configuration; this module names them and refuses before the
start what cannot run. Attention under the layout is this package's own and stays in the model's dtype.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, version
from typing import Any, Literal

import torch

from megatron_parallel_r1.architecture.model_config import ModelConfig
from megatron_parallel_r1.errors import UserError
from megatron_parallel_r1.model.attention.dispatch import Kernel, check_kernel

LayerKind = Literal["local", "transformer_engine"]
Scaling = Literal["none", "delayed", "current", "blockwise"]
# The first release in which all three scalings can also keep parameters in FP8.
MIN_ENGINE_VERSION = (2, 4)
# FP8 GEMMs need a multiple of this number of rows.
FP8_ROWS = 16


@dataclass(frozen=True, slots=True)
class Layers:
    """A recipe's `model.layers`, `attention`, `fp8`, `fp8_params`, `bf16_first_layers`, `bf16_last_layers`,
    `balance_loss` and `fused_swiglu` (config/model.py)."""

    kind: LayerKind = "local"
    attention: Kernel = "auto"
    fp8: Scaling = "none"
    fp8_params: bool = False
    bf16_first: int = 0
    bf16_last: int = 0
    balance_loss: float = 0.0
    fused_swiglu: bool = False

    def __post_init__(self) -> None:
        if self.fp8 != "none" and self.kind != "transformer_engine":
            raise UserError(
                "model.fp8: only Transformer Engine has FP8; set model.layers to transformer_engine"
            )
        if self.fp8_params and self.fp8 == "none":
            raise UserError("model.fp8_params: needs scaling; set model.fp8 to delayed, current or blockwise")
        if (self.bf16_first or self.bf16_last) and self.fp8 not in ("current", "blockwise"):
            raise UserError(
                "model.bf16_first_layers, bf16_last_layers: need FP8 that is not delayed, which takes all "
                "layers or none; set model.fp8 to current or blockwise"
            )

    @property
    def row_multiple(self) -> int:
        """Each rank's part of a row is padded to a multiple of this number of tokens."""
        return 1 if self.fp8 == "none" else FP8_ROWS

    def megatron_fields(self) -> dict[str, Any]:
        """Returns the corresponding fields of Megatron's TransformerConfig.

        With blockwise scaling four exponent bits suffice in both directions (arXiv 2412.19437); otherwise
        gradients use five. The history's length is Transformer Engine's default.
        """
        if self.fp8 == "none":
            return {}
        return {
            "fp8": "e4m3" if self.fp8 == "blockwise" else "hybrid",
            "fp8_recipe": {"current": "tensorwise"}.get(self.fp8, self.fp8),
            "fp8_param": self.fp8_params,
            "fp8_amax_history_len": 1024,
            "fp8_amax_compute_algo": "max",
            "first_last_layers_bf16": bool(self.bf16_first or self.bf16_last),
            "num_layers_at_start_in_bf16": self.bf16_first,
            "num_layers_at_end_in_bf16": self.bf16_last,
        }


@dataclass(frozen=True, slots=True)
class LayerSupport:
    """What a machine supports.

    Attributes:
        device: where the model will be.
        engine: Transformer Engine's version; None: not installed.
        engine_refusal: why it cannot be imported although installed; "" if it can.
        fp8_refusal: why this GPU has no such FP8, in Transformer Engine's words; "" if it has.
    """

    device: torch.device
    engine: str | None = None
    engine_refusal: str = ""
    fp8_refusal: str = ""

    @classmethod
    def detect(cls, layers: Layers) -> LayerSupport:
        """Inspects this machine; imports Transformer Engine only if `layers` use it."""
        device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
        try:
            engine = version("transformer_engine")
        except PackageNotFoundError:
            return cls(device)
        if layers.kind == "local" or device.type == "cpu" or _too_old(engine):
            return cls(device, engine)
        try:
            # Its library loads CUDA, so it cannot be imported everywhere. Every release has this name here.
            from transformer_engine.pytorch.fp8 import FP8GlobalStateManager as Support
        except (ImportError, OSError) as error:  # without its torch extension, or built for another CUDA
            return cls(device, engine, " ".join(str(error).split()))
        if layers.fp8 == "none":
            return cls(device, engine)
        blockwise = layers.fp8 == "blockwise"
        has, reason = Support.is_fp8_block_scaling_available() if blockwise else Support.is_fp8_available()
        return cls(device, engine, fp8_refusal="" if has else reason)


def check_layers(layers: Layers, dim: int, dtype: torch.dtype, support: LayerSupport | None = None) -> None:
    """Checks that the layers can run on a machine.

    Args:
        dim: size of an attention head.
        support: None: of this machine.

    Raises:
        UserError: they cannot.
    """
    support = support or LayerSupport.detect(layers)
    check_kernel(layers.attention, support.device, dim)
    if layers.kind == "local":
        return
    if support.device.type != "cuda":
        raise UserError("model.layers: transformer_engine needs a CUDA device; set it to local")
    if support.engine is None:
        raise UserError(
            "model.layers: Transformer Engine is not installed; set it to local, or run "
            "`pip install transformer-engine[pytorch]`"
        )
    if _too_old(support.engine):
        oldest = ".".join(map(str, MIN_ENGINE_VERSION))
        raise UserError(
            f"model.layers: Transformer Engine {support.engine} is too old; install {oldest} or later"
        )
    if support.engine_refusal:
        raise UserError(
            f"model.layers: Transformer Engine {support.engine} cannot be imported "
            f"({support.engine_refusal}); install a build for this torch, or set it to local"
        )
    if layers.fp8 != "none" and dtype != torch.bfloat16:
        raise UserError("model.fp8: FP8 layers need bfloat16 parameters; set dtype to bfloat16")
    if support.fp8_refusal:
        raise UserError(f"model.fp8: {layers.fp8}: {support.fp8_refusal.rstrip('.')}; set it to none")


def check_balance(layers: Layers, model: ModelConfig) -> None:
    """Checks that a model whose experts are to be balanced has some.

    Raises:
        UserError: it has none.
    """
    if layers.balance_loss and model.experts is None:
        raise UserError("model.balance_loss: the model has no experts; set it to 0")


def check_fp8(layers: Layers, model: ModelConfig, tensor: int, pipeline: int) -> None:
    """Checks that the products of a model can be in FP8 under a tensor and a pipeline group of these sizes.

    Raises:
        UserError: a rank's part of a matrix has a size that FP8 GEMMs do not take, or more layers are to stay
            in bfloat16 than Megatron allows.
    """
    if layers.fp8 == "none":
        return
    split = {
        "heads x head_dim": model.heads * model.head_dim // tensor,
        "(heads + 2 kv_heads) x head_dim": (model.heads + 2 * model.kv_heads) * model.head_dim // tensor,
        "ffn": (model.experts.ffn if model.experts else model.ffn) // tensor,
    }
    for name, size in {"hidden": model.hidden, **split}.items():
        if size % FP8_ROWS:
            raise UserError(
                f"model.fp8: {name} is {size} on each rank, and FP8 needs multiples of {FP8_ROWS}; "
                "set model.fp8 to none, or choose another size or parallel.tensor"
            )
    for name, count in (("bf16_first_layers", layers.bf16_first), ("bf16_last_layers", layers.bf16_last)):
        if count > (limit := model.layers // pipeline):
            raise UserError(
                f"model.{name}: {count} is more than the {limit} layers of a pipeline rank; set at most "
                f"{limit}"
            )


@contextmanager
def without_fp8(model: torch.nn.Module) -> Iterator[None]:
    """Makes the products of a model with a Megatron `config` bfloat16's within.

    A layer that has computed so would save no history of delayed scaling; afterwards it does again.
    """
    config: Any = model.config
    layers: list[Any] = [module for module in model.modules() if hasattr(module, "fp8_meta")]
    before = [(layer.fp8, layer.fp8_initialized, layer.fp8_meta["fp8_checkpoint"]) for layer in layers]
    fp8, config.fp8 = config.fp8, None
    try:
        yield
    finally:
        config.fp8 = fp8
        for layer, state in zip(layers, before, strict=True):
            layer.fp8, layer.fp8_initialized, layer.fp8_meta["fp8_checkpoint"] = state


def _too_old(engine: str) -> bool:
    return tuple(int(part) for part in engine.split(".")[:2]) < MIN_ENGINE_VERSION
