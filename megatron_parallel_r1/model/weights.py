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
from torch import Tensor

from megatron_parallel_r1.errors import UserError
from megatron_parallel_r1.model.config import ModelConfig
from megatron_parallel_r1.model.gpt import PathGPT


@dataclass(frozen=True, slots=True)
class Weight:
    """One Megatron parameter.

    Attributes:
        name: in a whole, unsplit GPTModel.
        parts: name and shape of the Hugging Face tensors that it is made of.
        groups: into how many groups of rows each of them is cut.
    """

    name: str
    parts: tuple[tuple[str, tuple[int, ...]], ...]
    groups: int = 1

    def join(self, tensors: list[Tensor]) -> Tensor:
        """Hugging Face tensors to the Megatron parameter."""
        return torch.cat([tensor.unflatten(0, (self.groups, -1)) for tensor in tensors], 1).flatten(0, 1)

    def split(self, tensor: Tensor) -> list[Tensor]:
        """The Megatron parameter to Hugging Face tensors."""
        rows = [shape[0] // self.groups for _name, shape in self.parts]
        return [part.flatten(0, 1) for part in tensor.unflatten(0, (self.groups, -1)).split(rows, 1)]


def table(shape: ModelConfig) -> list[Weight]:
    """Every parameter of the model."""
    hidden, ffn, dim = shape.hidden, shape.ffn, shape.head_dim
    query, key = shape.heads * dim, shape.kv_heads * dim

    def plain(name: str, hf_name: str, *size: int) -> Weight:
        return Weight(name, ((hf_name, size),))

    weights = [plain("embedding.word_embeddings.weight", "model.embed_tokens.weight", shape.vocab, hidden)]
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
            ),
            plain(ours + "self_attention.q_layernorm.weight", attention + "q_norm.weight", dim),
            plain(ours + "self_attention.k_layernorm.weight", attention + "k_norm.weight", dim),
            plain(ours + "self_attention.linear_proj.weight", attention + "o_proj.weight", hidden, query),
            plain(ours + "pre_mlp_layernorm.weight", theirs + "post_attention_layernorm.weight", hidden),
            Weight(
                ours + "mlp.linear_fc1.weight",
                ((mlp + "gate_proj.weight", (ffn, hidden)), (mlp + "up_proj.weight", (ffn, hidden))),
            ),
            plain(ours + "mlp.linear_fc2.weight", mlp + "down_proj.weight", hidden, ffn),
        ]
    weights.append(plain("decoder.final_layernorm.weight", "model.norm.weight", hidden))
    if not shape.tied:
        weights.append(plain("output_layer.weight", "lm_head.weight", shape.vocab, hidden))
    return weights


def hf_tensors(model: PathGPT) -> Iterator[tuple[str, Tensor]]:
    """The weights of a whole, unsplit model under their Hugging Face names.

    They are detached, in the model's dtype, and may share memory with it: copy what must outlive a step.
    """
    parameters = dict(model.named_parameters())
    for weight in table(model.shape):
        parts = weight.split(parameters[weight.name].detach())
        yield from zip((name for name, _shape in weight.parts), parts, strict=True)


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
def load_hf_tensors(model: PathGPT, tensors: Iterable[tuple[str, Tensor]]) -> None:
    """Sets all weights of the model, cast to its dtype, from Hugging Face tensors in any order.

    Raises:
        UserError: they do not fit (`check_fit`); the model is then unchanged.
    """
    given = dict(tensors)
    check_fit(model.shape, {name: tuple(tensor.shape) for name, tensor in given.items()})
    parameters = dict(model.named_parameters())
    for weight in table(model.shape):
        parameters[weight.name].copy_(weight.join([given[name] for name, _shape in weight.parts]))


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
