"""The model of a recipe: a new one or a Hugging Face folder, and the implementation of its layers."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal

from pydantic import Field, model_validator

from megatron_parallel_r1.architecture.model_config import ModelConfig
from megatron_parallel_r1.errors import UserError
from megatron_parallel_r1.utils.hub import local_folder
from megatron_parallel_r1.utils.settings import Count, Settings, Tokens

if TYPE_CHECKING:
    from megatron_parallel_r1.model.layers import Layers


class ModelShape(Settings):
    """A new Qwen3; its vocabulary is the tokenizer's."""

    hidden: Count
    """Hidden size."""
    layers: Count
    """Number of layers."""
    heads: Count
    """Number of attention heads."""
    kv_heads: Count
    """Number of key/value heads."""
    head_dim: Count
    """Size of a head; even."""
    ffn: Count
    """Intermediate size of the MLP."""
    rope_theta: float = 1e6
    """Base of the rotary embedding."""
    rms_eps: float = 1e-6
    """Epsilon of the RMS norms."""
    tied: bool = True
    """Share the weights of input and output embeddings."""
    max_positions: Tokens = 32768
    """Largest number of positions."""
    init_std: Annotated[float, Field(gt=0)] = 0.02
    """Standard deviation of the initial weights; narrow models learn sooner with about 1 / sqrt(hidden)."""

    @model_validator(mode="after")
    def _check_sizes(self) -> ModelShape:
        try:
            self.config(vocab=1)
        except UserError as error:
            raise ValueError(str(error).removeprefix("model: ")) from None
        return self

    def config(self, vocab: int) -> ModelConfig:
        return ModelConfig(vocab=vocab, **self.model_dump(exclude={"init_std"}))


class ModelSource(Settings):
    """Either `shape`, trained from scratch, or `path`, a supported model of Hugging Face's format."""

    shape: ModelShape | None = None
    """Sizes of a new model."""
    path: Path | None = None
    """Model to start from: a Hugging Face folder; or `owner/name` or `owner/name@revision` on the Hub, of a
    model that `parallel-r1 download` has fetched."""
    new_rows: Literal["subwords", "mean"] = "subwords"
    """Start of the embedding rows of tags that the model of `path` lacks: the mean of the rows of the tag's
    own subwords, or of all rows; plus noise of 0.1 standard deviations. A resumed run keeps its way."""
    dtype: Literal["float32", "bfloat16"] = "float32"
    """Number format of training; bfloat16 keeps float32 copies in the optimizer."""
    layers: Literal["local", "transformer_engine"] = "local"
    """Implementation of linear layers and norms: Megatron's own, or Transformer Engine's."""
    attention: Literal["auto", "sdpa", "tiled", "flex", "triton"] = "auto"
    """Attention kernel; `auto` chooses by device (docs/kernels.md)."""
    fp8: Literal["none", "delayed", "current", "blockwise"] = "none"
    """FP8 scaling of the products: by the history of a tensor's largest value (arXiv 2209.05433), by its
    current largest, or by that of blocks of 128 (arXiv 2412.19437)."""
    fp8_params: bool = False
    """Keep the layers' matrices in FP8; the optimizer's copies stay float32."""
    bf16_first_layers: Annotated[int, Field(ge=0)] = 0
    """Number of first layers whose products stay in bfloat16; needs `fp8: current` or `blockwise`."""
    bf16_last_layers: Annotated[int, Field(ge=0)] = 0
    """Number of last layers whose products stay in bfloat16; needs `fp8: current` or `blockwise`."""
    fused_swiglu: bool = False
    """Megatron's fused SwiGLU: backward computes the gate anew, so of an MLP less than two thirds are stored,
    and on GPUs torch.compile makes one kernel of it. Rounds otherwise in the last place."""
    balance_loss: Annotated[float, Field(ge=0, allow_inf_nan=False)] = 0.0
    """Coefficient of a loss that balances the load of the experts of each layer, by trace (arXiv 2412.19437,
    section 2.1.2); 0: none."""

    @property
    def folder(self) -> Path | None:
        """The folder of `path` on this machine."""
        return None if self.path is None else local_folder(self.path)

    @property
    def made_of(self) -> Layers:
        # Imported here: reading a recipe must not import torch.
        from megatron_parallel_r1.model.layers import Layers

        return Layers(
            self.layers,
            self.attention,
            self.fp8,
            self.fp8_params,
            self.bf16_first_layers,
            self.bf16_last_layers,
            self.balance_loss,
            self.fused_swiglu,
        )

    @model_validator(mode="after")
    def _check_fp8(self) -> ModelSource:
        if self.fp8 != "none" and self.layers != "transformer_engine":
            raise ValueError("fp8: only Transformer Engine has FP8; set model.layers to transformer_engine")
        if self.fp8_params and self.fp8 == "none":
            raise ValueError("fp8_params: needs scaling; set model.fp8 to delayed, current or blockwise")
        if (self.bf16_first_layers or self.bf16_last_layers) and self.fp8 not in ("current", "blockwise"):
            raise ValueError("bf16_first_layers, bf16_last_layers: set model.fp8 to current or blockwise")
        return self

    @model_validator(mode="after")
    def _check_either(self) -> ModelSource:
        if (self.shape is None) == (self.path is None):
            raise ValueError("give either shape (a new model) or path (a Hugging Face model)")
        return self
