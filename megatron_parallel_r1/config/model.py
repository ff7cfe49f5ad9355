"""The model of a recipe: a fresh one, or one that is there; and what its layers are made of."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal

from pydantic import Field, model_validator

from megatron_parallel_r1.architecture.model_config import ModelConfig
from megatron_parallel_r1.config.data import Count, Strict
from megatron_parallel_r1.errors import UserError

if TYPE_CHECKING:
    from megatron_parallel_r1.model.layers import Layers


class Shape(Strict):
    """A fresh Qwen3; the vocabulary is the tokenizer's. Attributes as `model.config.ModelConfig`.

    `init_std` is that of its weights; narrow models learn sooner with about 1 / sqrt(hidden).
    """

    hidden: Count
    layers: Count
    heads: Count
    kv_heads: Count
    head_dim: Count
    ffn: Count
    rope_theta: float = 1e6
    rms_eps: float = 1e-6
    tied: bool = True
    max_positions: Count = 32768
    init_std: Annotated[float, Field(gt=0)] = 0.02

    @model_validator(mode="after")
    def _possible(self) -> Shape:
        try:
            self.config(vocab=1)
        except UserError as error:
            raise ValueError(str(error).removeprefix("model: ")) from None
        return self

    def config(self, vocab: int) -> ModelConfig:
        return ModelConfig(vocab=vocab, **self.model_dump(exclude={"init_std"}))


class Model(Strict):
    """Either `shape`, trained from scratch, or `path`, a Hugging Face folder of a supported model.

    `layers`, `attention`, `fp8` and `fp8_params` are those of `model.layers.Layers`.
    """

    shape: Shape | None = None
    path: Path | None = None
    dtype: Literal["float32", "bfloat16"] = "float32"
    layers: Literal["local", "transformer_engine"] = "local"
    attention: Literal["auto", "sdpa", "tiled", "flex", "triton"] = "auto"
    fp8: Literal["none", "delayed", "current", "blockwise"] = "none"
    fp8_params: bool = False

    @property
    def made_of(self) -> Layers:
        # Its room imports Megatron, which a recipe that is only read does not need.
        from megatron_parallel_r1.model.layers import Layers

        return Layers(self.layers, self.attention, self.fp8, self.fp8_params)

    @model_validator(mode="after")
    def _layers_exist(self) -> Model:
        try:
            _ = self.made_of if self.fp8 != "none" or self.fp8_params else None
        except UserError as error:
            raise ValueError(str(error).removeprefix("model.")) from None
        return self

    @model_validator(mode="after")
    def _one_of_them(self) -> Model:
        if (self.shape is None) == (self.path is None):
            raise ValueError("give either shape (a fresh model) or path (a Hugging Face folder)")
        return self
