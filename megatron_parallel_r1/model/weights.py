"""Loads a live model's weights from Hugging Face tensors, and gathers them back, by the weight table."""

from __future__ import annotations

import zlib
from collections.abc import Iterable, Iterator, Mapping

import torch
import torch.distributed as dist
from megatron.core import parallel_state
from megatron.core.fp8_utils import dequantize_fp8_tensor, is_float8tensor
from torch import Tensor
from torch.nn import Parameter

from megatron_parallel_r1.architecture.model_config import ModelConfig
from megatron_parallel_r1.architecture.weight_table import (
    EMBEDDING,
    HEAD,
    WeightMapping,
    check_fit,
    weight_table,
)
from megatron_parallel_r1.model.gpt import Model


def own_parameters(model: Model) -> dict[str, Parameter]:
    """Returns this rank's parameters under the names of a whole model.

    A pipeline stage counts its layers from 0; the last stage of a tied model has a copy of the embedding as
    its output layer.
    """
    named: dict[str, Parameter] = {}
    for stage in model:
        for name, parameter in stage.named_parameters():
            if name.startswith("decoder.layers."):
                _, _, local, rest = name.split(".", 3)
                number = stage.decoder.layers[int(local)].layer_number
                name = f"decoder.layers.{number - 1}.{local_name(rest)}"
            named[EMBEDDING if name == HEAD and model.architecture.tied else name] = parameter
    return named


def owned_weights(model: Model, own: Mapping[str, Parameter]) -> list[tuple[int, WeightMapping]]:
    """Returns every weight with the first pipeline rank that holds it: of a tied embedding, the first.

    Args:
        own: this rank's `own_parameters`.
    """
    pipeline = parallel_state.get_pipeline_model_parallel_group()
    holders: list[set[str]] = [set(own)]
    if pipeline.size() > 1:
        holders = [set() for _ in range(pipeline.size())]
        dist.all_gather_object(holders, set(own), group=pipeline)
    return [
        (next(rank for rank, names in enumerate(holders) if weight.name in names), weight)
        for weight in weight_table(model.architecture)
    ]


@torch.no_grad()
def hf_tensors(model: Model) -> Iterator[tuple[str, Tensor]]:
    """Yields the model's weights under their Hugging Face names, detached; some share memory with the model.

    On a split model every rank yields every tensor, gathered one at a time: all ranks must iterate.
    """
    own = own_parameters(model)
    tensor_group = parallel_state.get_tensor_model_parallel_group()
    pipeline = parallel_state.get_pipeline_model_parallel_group()
    for owner, weight in owned_weights(model, own):
        if pipeline.size() == 1 or pipeline.rank() == owner:
            shard = plain(own[weight.name])
        else:
            size = weight.shard_shape(tensor_group.size())
            like = next(model.parameters())
            shard = torch.empty(size, dtype=like.dtype, device=like.device)
        if pipeline.size() > 1:
            dist.broadcast(shard, dist.get_global_rank(pipeline, owner), group=pipeline)
        shards = [shard]
        if tensor_group.size() > 1 and weight.split_dim is not None:
            shards = [torch.empty_like(shard) for _ in range(tensor_group.size())]
            dist.all_gather(shards, shard.contiguous(), group=tensor_group)
        yield from zip((name for name, _shape in weight.parts), weight.split(shards), strict=True)


@torch.no_grad()
def load_hf_tensors(model: Model, tensors: Iterable[tuple[str, Tensor]]) -> None:
    """Sets this rank's weights, cast to the model's dtype, from all Hugging Face tensors in any order.

    Raises:
        UserError: they do not fit (`check_fit`); the model is then unchanged.
    """
    by_name = dict(tensors)
    check_fit(model.architecture, {name: tuple(tensor.shape) for name, tensor in by_name.items()})
    group = parallel_state.get_tensor_model_parallel_group()
    own = own_parameters(model)
    for weight in weight_table(model.architecture):
        if weight.name in own:
            parts = [by_name[name] for name, _shape in weight.parts]
            set_weight(own[weight.name], weight.join(parts, group.rank(), group.size()))


def random_hf_tensors(config: ModelConfig, seed: int, std: float = 0.02) -> Iterator[tuple[str, Tensor]]:
    """Yields initial float32 weights: N(0, std²), residual outputs scaled by 1/sqrt(2 layers) (GPT-2),
    norms 1, biases 0.

    Each tensor depends only on the seed and its name, so a model starts the same under every layout.
    """
    for name, size in (part for weight in weight_table(config) for part in weight.parts):
        if len(size) == 1:
            yield name, torch.zeros(size) if name.endswith(".bias") else torch.ones(size)
            continue
        generator = torch.Generator().manual_seed(zlib.crc32(f"{seed}/{name}".encode()))
        is_residual = name.endswith(("o_proj.weight", "down_proj.weight"))
        scale = std / (2 * config.layers) ** 0.5 if is_residual else std
        yield name, torch.randn(size, generator=generator) * scale


FUSED = {
    "self_attention.linear_qkv.layer_norm_weight": "input_layernorm.weight",
    "mlp.linear_fc1.layer_norm_weight": "pre_mlp_layernorm.weight",
}


def local_name(name: str) -> str:
    """Returns the local layers' name for a parameter of a layer; both names are relative to the layer."""
    return FUSED.get(name, name)


def plain(parameter: Tensor) -> Tensor:
    """Returns a parameter's values, detached; of a matrix stored in FP8 a copy in its nominal dtype."""
    values = parameter.detach()
    return dequantize_fp8_tensor(values) if is_float8tensor(parameter) else values


def set_weight(parameter: Parameter, value: Tensor) -> None:
    """Sets a parameter and the value from which the optimizer initializes its float32 copy.

    A matrix stored in FP8 keeps its initial values for that copy; the weights are set only afterwards.
    """
    parameter.copy_(value)
    if hasattr(parameter, "_high_precision_init_val"):
        parameter._high_precision_init_val = value.to("cpu", parameter._high_precision_init_val.dtype)
