"""One table between Megatron's parameters and Hugging Face's tensors of a dense Qwen3, read both ways.

Megatron fuses what it multiplies together. Its QKV weight holds, for each key/value head, the rows of the
queries that share it, then of the key, then of the value; its first MLP weight holds gate, then up. So a
Megatron tensor is the Hugging Face tensors cut into equal groups of rows, and those dealt out in turn.
"""

from __future__ import annotations

import zlib
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass

import torch
import torch.distributed as dist
import torch.nn.functional as F
from megatron.core import parallel_state
from torch import Tensor
from torch.nn import Parameter

from megatron_parallel_r1.errors import UserError
from megatron_parallel_r1.model.config import ModelConfig
from megatron_parallel_r1.model.gpt import Model, padded_vocab

EMBEDDING = "embedding.word_embeddings.weight"
HEAD = "output_layer.weight"


@dataclass(frozen=True, slots=True)
class Weight:
    """One Megatron parameter.

    Attributes:
        name: in a whole, unsplit GPTModel.
        parts: name and shape of the Hugging Face tensors that it is made of.
        groups: into how many groups of rows each of them is cut.
        cut: the dimension along which tensor parallelism splits it; None: every rank has all of it.
        vocabulary: whether its rows are tokens, filled up with zeros where the ranks do not divide them.
    """

    name: str
    parts: tuple[tuple[str, tuple[int, ...]], ...]
    groups: int = 1
    cut: int | None = None
    vocabulary: bool = False

    def join(self, tensors: list[Tensor], rank: int = 0, size: int = 1) -> Tensor:
        """Hugging Face tensors to the Megatron parameter of a tensor-parallel rank."""
        if self.vocabulary:
            tensors = [F.pad(tensor, (0, 0, 0, -len(tensor) % size)) for tensor in tensors]
        if self.cut == 0:
            tensors = [tensor.chunk(size)[rank] for tensor in tensors]
        groups = self._groups(size)
        whole = torch.cat([tensor.unflatten(0, (groups, -1)) for tensor in tensors], 1).flatten(0, 1)
        return whole.chunk(size, 1)[rank] if self.cut == 1 else whole

    def split(self, shards: list[Tensor]) -> list[Tensor]:
        """The Megatron parameters of all tensor-parallel ranks to Hugging Face tensors."""
        if self.vocabulary:
            return [torch.cat(shards)[: self.parts[0][1][0]]]
        if self.cut == 1:
            shards = [torch.cat(shards, 1)]
        if self.cut is None:
            shards = shards[:1]
        size = len(shards)
        groups = self._groups(size)
        rows = [shape[0] // size // groups for _name, shape in self.parts]
        cut = [shard.unflatten(0, (groups, -1)).split(rows, 1) for shard in shards]
        return [torch.cat([part.flatten(0, 1) for part in same]) for same in zip(*cut, strict=True)]

    def shard_shape(self, size: int) -> tuple[int, ...]:
        """Of the Megatron parameter of one of `size` tensor-parallel ranks."""
        rows, *rest = (sum(shape[0] for _, shape in self.parts), *self.parts[0][1][1:])
        sizes = [padded_vocab(rows, size) if self.vocabulary else rows, *rest]
        if self.cut is not None:
            sizes[self.cut] //= size
        return tuple(sizes)

    def _groups(self, size: int) -> int:
        return max(1, self.groups // size) if self.cut == 0 else self.groups


def table(shape: ModelConfig) -> list[Weight]:
    """Every parameter of the model."""
    hidden, ffn, dim = shape.hidden, shape.ffn, shape.head_dim
    query, key = shape.heads * dim, shape.kv_heads * dim

    def plain(name: str, hf_name: str, *size: int, cut: int | None = None) -> Weight:
        return Weight(name, ((hf_name, size),), cut=cut)

    def rows_of_tokens(name: str, hf_name: str) -> Weight:
        return Weight(name, ((hf_name, (shape.vocab, hidden)),), cut=0, vocabulary=True)

    weights = [rows_of_tokens(EMBEDDING, "model.embed_tokens.weight")]
    for i in range(shape.layers):
        ours, theirs = f"decoder.layers.{i}.", f"model.layers.{i}."
        attention, mlp = theirs + "self_attn.", theirs + "mlp."
        weights += [
            plain(ours + "input_layernorm.weight", theirs + "input_layernorm.weight", hidden),
            Weight(
                ours + "self_attention.linear_qkv.weight",
                (
                    (attention + "q_proj.weight", (query, hidden)),
                    (attention + "k_proj.weight", (key, hidden)),
                    (attention + "v_proj.weight", (key, hidden)),
                ),
                groups=shape.kv_heads,
                cut=0,
            ),
            plain(ours + "self_attention.q_layernorm.weight", attention + "q_norm.weight", dim),
            plain(ours + "self_attention.k_layernorm.weight", attention + "k_norm.weight", dim),
            plain(
                ours + "self_attention.linear_proj.weight", attention + "o_proj.weight", hidden, query, cut=1
            ),
            plain(ours + "pre_mlp_layernorm.weight", theirs + "post_attention_layernorm.weight", hidden),
            Weight(
                ours + "mlp.linear_fc1.weight",
                ((mlp + "gate_proj.weight", (ffn, hidden)), (mlp + "up_proj.weight", (ffn, hidden))),
                cut=0,
            ),
            plain(ours + "mlp.linear_fc2.weight", mlp + "down_proj.weight", hidden, ffn, cut=1),
        ]
    weights.append(plain("decoder.final_layernorm.weight", "model.norm.weight", hidden))
    if not shape.tied:
        weights.append(rows_of_tokens(HEAD, "lm_head.weight"))
    return weights


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
                name = f"decoder.layers.{number - 1}.{rest}"
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


def check_fit(shape: ModelConfig, sizes: Mapping[str, tuple[int, ...]]) -> None:
    """Holds the names and sizes of Hugging Face tensors against the model that they are for.

    Some released checkpoints of tied models carry a copy of the embedding as lm_head; it is ignored, as
    transformers does.

    Raises:
        UserError: a tensor is missing, unknown or of another size.
    """
    wanted = dict(part for weight in table(shape) for part in weight.parts)
    given = {name for name in sizes if not (shape.tied and name == "lm_head.weight")}
    problems = [f"{name} is missing" for name in wanted.keys() - given]
    problems += [f"{name} is unknown" for name in given - wanted.keys()]
    problems += [
        f"{name} is {tuple(sizes[name])} instead of {wanted[name]}"
        for name in wanted.keys() & given
        if tuple(sizes[name]) != wanted[name]
    ]
    if problems:
        shown = "; ".join(sorted(problems)[:5]) + (f"; and {len(problems) - 5} more" if problems[5:] else "")
        raise UserError(
            f"weights do not fit the model: {shown}. Use the weights that belong to its config.json"
        )


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
            own[weight.name].copy_(weight.join(parts, group.rank(), group.size()))


def random_hf_tensors(shape: ModelConfig, seed: int, std: float = 0.02) -> Iterator[tuple[str, Tensor]]:
    """Fresh float32 weights: N(0, std²), residual outputs scaled by 1/sqrt(2 layers) (GPT-2), norms 1.

    Each tensor depends on the seed and its name alone, so a model starts the same however it is split.
    """
    for name, size in (part for weight in table(shape) for part in weight.parts):
        if len(size) == 1:
            yield name, torch.ones(size)
            continue
        generator = torch.Generator().manual_seed(zlib.crc32(f"{seed}/{name}".encode()))
        is_residual = name.endswith(("o_proj.weight", "down_proj.weight"))
        scale = std / (2 * shape.layers) ** 0.5 if is_residual else std
        yield name, torch.randn(size, generator=generator) * scale
