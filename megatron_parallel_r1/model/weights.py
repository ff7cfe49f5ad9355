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

from megatron_parallel_r1.architecture.model_config import ExpertsConfig, ModelConfig
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

    A pipeline stage counts its layers from 0, an expert-parallel rank its experts; the last stage of a tied
    model has a copy of the embedding as its output layer.
    """
    named: dict[str, Parameter] = {}
    experts = model.architecture.experts
    first = experts_of_rank(experts).start if experts else 0
    for stage in model:
        for name, parameter in stage.named_parameters():
            if name.startswith("decoder.layers."):
                _, _, local, rest = name.split(".", 3)
                number = stage.decoder.layers[int(local)].layer_number
                if first and rest.startswith(LOCAL_EXPERTS):
                    index, _, rest = rest.removeprefix(LOCAL_EXPERTS).partition(".")
                    rest = f"{LOCAL_EXPERTS}{first + int(index)}.{rest}"
                name = f"decoder.layers.{number - 1}.{local_name(rest)}"
            named[EMBEDDING if name == HEAD and model.architecture.tied else name] = parameter
    return named


LOCAL_EXPERTS = "mlp.experts.local_experts."


def experts_of_rank(experts: ExpertsConfig, rank: int | None = None) -> range:
    """Returns the experts, of each layer, of an expert-parallel rank; None: of this one."""
    count = experts.count // parallel_state.get_expert_model_parallel_world_size()
    rank = parallel_state.get_expert_model_parallel_rank() if rank is None else rank
    return range(rank * count, (rank + 1) * count)


def expert_rank(model: Model, weight: WeightMapping) -> int | None:
    """Returns the expert-parallel rank that holds an expert's weight; None: all ranks of the stage do."""
    if weight.expert is None or model.architecture.experts is None:
        return None
    return weight.expert // len(experts_of_rank(model.architecture.experts))


def split_group(weight: WeightMapping) -> dist.ProcessGroup:
    """Returns the ranks that split a weight, if any do."""
    if weight.expert is None:
        return parallel_state.get_tensor_model_parallel_group()
    return parallel_state.get_expert_tensor_parallel_group()


def owned_weights(model: Model, own: Mapping[str, Parameter]) -> list[tuple[int, WeightMapping]]:
    """Returns every weight with the first pipeline rank whose stage has it: of a tied embedding, the first.

    Args:
        own: this rank's `own_parameters`.
    """
    table = weight_table(model.architecture)

    def place(weight: WeightMapping) -> str | int:
        """The layer: a rank has all experts' layers, but not all experts."""
        return weight.name if weight.layer is None else weight.layer

    places = {place(weight) for weight in table if weight.name in own}
    pipeline = parallel_state.get_pipeline_model_parallel_group()
    stages = [places]
    if pipeline.size() > 1:
        stages = [set() for _ in range(pipeline.size())]
        dist.all_gather_object(stages, places, group=pipeline)
    owners = {each: rank for rank, stage in reversed(list(enumerate(stages))) for each in stage}
    return [(owners[place(weight)], weight) for weight in table]


@torch.no_grad()
def hf_tensors(model: Model) -> Iterator[tuple[str, Tensor]]:
    """Yields the model's weights under their Hugging Face names, detached; some share memory with the model.

    On a split model every rank yields every tensor, gathered one at a time: all ranks must iterate.
    """
    own = own_parameters(model)
    pipeline = parallel_state.get_pipeline_model_parallel_group()
    experts = parallel_state.get_expert_model_parallel_group()
    for owner, weight in owned_weights(model, own):
        group, holder = split_group(weight), expert_rank(model, weight)
        in_stage = pipeline.rank() == owner
        if in_stage and holder in (None, experts.rank()):
            shard = plain(own[weight.name])
        else:
            like = next(model.parameters())
            size = weight.shard_shape(group.size())
            shard = torch.empty(size, dtype=like.dtype, device=like.device)
        if in_stage and holder is not None and experts.size() > 1:
            dist.broadcast(shard, dist.get_global_rank(experts, holder), group=experts)
        if pipeline.size() > 1:
            dist.broadcast(shard, dist.get_global_rank(pipeline, owner), group=pipeline)
        shards = [shard]
        if group.size() > 1 and weight.split_dim is not None:
            shards = [torch.empty_like(shard) for _ in range(group.size())]
            dist.all_gather(shards, shard.contiguous(), group=group)
        yield from zip((name for name, _shape in weight.parts), weight.split(shards), strict=True)


@torch.no_grad()
def load_hf_tensors(model: Model, tensors: Iterable[tuple[str, Tensor]]) -> None:
    """Sets this rank's weights, cast to the model's dtype, from all Hugging Face tensors in any order.

    Raises:
        UserError: they do not fit (`check_fit`); the model is then unchanged.
    """
    by_name = dict(tensors)
    check_fit(model.architecture, {name: tuple(tensor.shape) for name, tensor in by_name.items()})
    own = own_parameters(model)
    for weight in weight_table(model.architecture):
        if weight.name in own:
            group = split_group(weight)
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
