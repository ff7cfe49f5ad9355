"""A live model's weights from and to Hugging Face's tensors, by the tables of families.py read both ways."""

from __future__ import annotations

import zlib
from collections.abc import Iterable, Iterator

import torch
import torch.distributed as dist
from megatron.core import parallel_state
from torch import Tensor
from torch.nn import Parameter

from megatron_parallel_r1.architecture.model_config import ModelConfig
from megatron_parallel_r1.architecture.weight_table import EMBEDDING, HEAD, Weight, check_fit, table
from megatron_parallel_r1.model.gpt import Model

__all__ = [
    "EMBEDDING",
    "HEAD",
    "Weight",
    "check_fit",
    "hf_tensors",
    "load_hf_tensors",
    "own_parameters",
    "random_hf_tensors",
    "table",
]


def own_parameters(model: Model) -> dict[str, Parameter]:
    """This process's parameters under the names of a whole model.

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
            named[EMBEDDING if name == HEAD and model.shape.tied else name] = parameter
    return named


@torch.no_grad()
def hf_tensors(model: Model) -> Iterator[tuple[str, Tensor]]:
    """The model's weights under their Hugging Face names, detached; some share memory with the model.

    Of a split model every process yields every tensor, whole, one at a time: all of them must iterate.
    """
    own = own_parameters(model)
    tensor_group = parallel_state.get_tensor_model_parallel_group()
    pipeline = parallel_state.get_pipeline_model_parallel_group()
    holders: list[set[str]] = [set(own)]
    if pipeline.size() > 1:
        holders = [set() for _ in range(pipeline.size())]
        dist.all_gather_object(holders, set(own), group=pipeline)
    for weight in table(model.shape):
        shard = own[weight.name].detach() if weight.name in own else None
        if pipeline.size() > 1:
            owner = next(rank for rank, names in enumerate(holders) if weight.name in names)
            if pipeline.rank() != owner:
                like = next(model.parameters())
                shard = like.new_empty(weight.shard_shape(tensor_group.size()))
            dist.broadcast(shard, dist.get_global_rank(pipeline, owner), group=pipeline)
        shards = [shard]
        if tensor_group.size() > 1 and weight.cut is not None:
            shards = [torch.empty_like(shard) for _ in range(tensor_group.size())]
            dist.all_gather(shards, shard.contiguous(), group=tensor_group)
        yield from zip((name for name, _shape in weight.parts), weight.split(shards), strict=True)


@torch.no_grad()
def load_hf_tensors(model: Model, tensors: Iterable[tuple[str, Tensor]]) -> None:
    """Sets this process's weights, cast to the model's dtype, from all Hugging Face tensors in any order.

    Raises:
        UserError: they do not fit (`check_fit`); the model is then unchanged.
    """
    given = dict(tensors)
    check_fit(model.shape, {name: tuple(tensor.shape) for name, tensor in given.items()})
    group = parallel_state.get_tensor_model_parallel_group()
    own = own_parameters(model)
    for weight in table(model.shape):
        if weight.name in own:
            parts = [given[name] for name, _shape in weight.parts]
            set_weight(own[weight.name], weight.join(parts, group.rank(), group.size()))


def random_hf_tensors(shape: ModelConfig, seed: int, std: float = 0.02) -> Iterator[tuple[str, Tensor]]:
    """Fresh float32 weights: N(0, std²), residual outputs scaled by 1/sqrt(2 layers) (GPT-2), norms 1,
    biases 0.

    Each tensor depends on the seed and its name alone, so a model starts the same however it is split.
    """
    for name, size in (part for weight in table(shape) for part in weight.parts):
        if len(size) == 1:
            yield name, torch.zeros(size) if name.endswith(".bias") else torch.ones(size)
            continue
        generator = torch.Generator().manual_seed(zlib.crc32(f"{seed}/{name}".encode()))
        is_residual = name.endswith(("o_proj.weight", "down_proj.weight"))
        scale = std / (2 * shape.layers) ** 0.5 if is_residual else std
        yield name, torch.randn(size, generator=generator) * scale


FUSED = {
    "self_attention.linear_qkv.layer_norm_weight": "input_layernorm.weight",
    "mlp.linear_fc1.layer_norm_weight": "pre_mlp_layernorm.weight",
}


def local_name(name: str) -> str:
    """The name of a layer's parameter, given without the layer's own, in a model of local layers."""
    return FUSED.get(name, name)


def set_weight(parameter: Parameter, value: Tensor) -> None:
    """Sets a parameter, of whatever kind, and what its float32 copy in the optimizer will begin from.

    A matrix that is kept in FP8 remembers the numbers that it was born with for that copy; these are not the
    weights, which come later.
    """
    parameter.copy_(value)
    if hasattr(parameter, "_high_precision_init_val"):
        parameter._high_precision_init_val = value.to("cpu", parameter._high_precision_init_val.dtype)
