"""A decoder's forward pass over rows of tokens, each with its own list of cache slots.

Takes weights under their Hugging Face names, as a server does, and fuses them once per update. Prefill and
decode are the same pass: a row is one token at any place of any context. In a tensor-parallel group each rank
computes its own heads, features and logits of every row; their sums are the whole model's.

Shapes: N rows, T longest context, E hidden size, H query heads, K key/value heads, G = H / K, D head size,
J = H + K, F feed-forward size, V vocabulary, S slots, C slots that are gathered at once; H, K, F and a
weight's V count this rank's own.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, replace
from functools import cache
from typing import Any

import torch
import torch.nn.functional as F

from megatron_parallel_r1.architecture.model_config import ModelConfig
from megatron_parallel_r1.distributed.parallel_config import check_native_heads
from megatron_parallel_r1.rollout.native.layer import (
    attention_inputs,
    feed_forward,
    fuse_layer,
    mix_experts,
    rms_norm,
)
from megatron_parallel_r1.rollout.native.page_table import ForwardBatch, Group, Numbers
from megatron_parallel_r1.rollout.native.tensor_parallel import TensorParallelGroup, local_shard
from megatron_parallel_r1.utils.devices import to_device

EMBEDDING = "model.embed_tokens.weight"
HEAD = "lm_head.weight"
# Bytes of keys and values gathered at once; on a CPU they are still in its cache when they are read.
MAX_BYTES = {"cpu": 2**19, "cuda": 2**28}


@dataclass(frozen=True, slots=True)
class _Seen:
    """Rows [start, stop), attended together; the same in every layer.

    Attributes:
        slots: that they see, row after row, each padded to the longest.
        bias_N11T: 0 where the row sees the slot, -inf in the padding.
    """

    start: int
    stop: int
    slots: torch.Tensor
    bias_N11T: torch.Tensor


class DecodeModel:
    """The weights, the KV cache, and the pass over them; in a tensor-parallel group this rank's shard.

    Args:
        config: of the whole model.
        tensors: whole, under their Hugging Face names; no two need to exist at once.
        compiled: layers go through torch.compile, except attention and experts, whose choice makes shapes
            depend on values.

    Attributes:
        cache_LSX: keys and values.
        chosen_LSC: the experts of the tokens in the cache, int16; empty without experts.
    """

    def __init__(
        self,
        config: ModelConfig,
        tensors: Iterable[tuple[str, torch.Tensor]],
        slots: int,
        group: TensorParallelGroup,
        compiled: bool = False,
    ) -> None:
        self.config = local_config(config, group.size)
        self.group = group
        self._inputs = _compiled(attention_inputs) if compiled else attention_inputs
        self._feed_forward = _compiled(feed_forward) if compiled else feed_forward
        by_name: dict[str, torch.Tensor] = {}
        for name, tensor in tensors:
            if name == EMBEDDING:
                self.vocabulary = len(tensor)
            # Copies: the trainer changes its own tensors in place.
            by_name[name] = local_shard(name, tensor, group)
        prefix = "model.layers."
        self.embedding_VE = by_name[EMBEDDING]
        self.head_VE = self.embedding_VE if config.tied else by_name[HEAD]
        self.norm_E = by_name["model.norm.weight"]
        self.layers = [
            fuse_layer(by_name, f"{prefix}{index}.", self.config) for index in range(config.layers)
        ]
        self.frequencies = config.rope_frequencies().to(self.embedding_VE.device)
        self.rope_factor = config.rope_attention_factor
        self.cache_LSX = [self._empty_cache(slots) for _ in self.layers]
        self.chosen_LSC = [self._none_chosen(slots) for _ in self.layers if config.experts]

    @property
    def device(self) -> torch.device:
        return self.embedding_VE.device

    @property
    def max_cells(self) -> int:
        """(row, slot) pairs whose keys and values are gathered at once."""
        return MAX_BYTES[self.device.type] // (self._width * self.embedding_VE.element_size())

    def grow(self, slots: int) -> None:
        """Makes room for `slots` slots and keeps the cached ones.

        Raises:
            RuntimeError: out of memory. The cache keeps its old size.
        """
        held, layers = len(self.cache_LSX[0]), range(len(self.cache_LSX))
        self.chosen_LSC = [
            torch.cat([chosen_SC, self._none_chosen(slots - len(chosen_SC))]) for chosen_SC in self.chosen_LSC
        ]
        try:
            # One layer at a time: all new ones beside all old ones would take half as much memory again.
            for index in layers:
                self.cache_LSX[index] = torch.cat([self.cache_LSX[index], self._empty_cache(slots - held)])
        except RuntimeError:
            for index in layers:
                if len(self.cache_LSX[index]) > held:
                    self.cache_LSX[index] = _first(held, self.cache_LSX[index])
            raise

    def logits(self, batch: ForwardBatch, wanted: Numbers) -> torch.Tensor:
        """Writes each row's key and value into its slot; logits [C, V], float32, of the `wanted` rows."""
        batch, places_N = batch.longest_first()
        return self.forward(
            self._tensor(batch.tokens_N),
            self._tensor(batch.positions_N),
            self._tensor(batch.slots_N),
            self._tensor(batch.seen_NT),
            self._tensor(batch.lengths_N),
            self._tensor(places_N[wanted]),
            batch.groups(self.max_cells),
        )

    @torch.inference_mode()
    def forward(
        self,
        tokens_N: torch.Tensor,
        positions_N: torch.Tensor,
        slots_N: torch.Tensor,
        seen_NT: torch.Tensor,
        lengths_N: torch.Tensor,
        wanted: torch.Tensor,
        groups: Sequence[Group],
    ) -> torch.Tensor:
        """The pass itself, without a host synchronization on a GPU; see `ForwardBatch` for its arguments.

        In a tensor-parallel group rank 0 gets the whole vocabulary's logits, other ranks their shard's.
        """
        config = self.config
        cos_N1D, sin_N1D = self._rotation(positions_N)
        hidden_NE = self._embed(tokens_N)
        bias_N11T = _bias(lengths_N, seen_NT.shape[1], hidden_NE.dtype)
        seen = [
            _Seen(start, stop, seen_NT[start:stop, :length].flatten(), bias_N11T[start:stop, ..., :length])
            for start, stop, length in groups
        ]
        gathered_CX = self.cache_LSX[0].new_empty(max(len(group.slots) for group in seen), self._width)
        still = torch.ones_like(cos_N1D), torch.zeros_like(sin_N1D)  # the rotation by 0
        for number, (layer, cache_SX) in enumerate(zip(self.layers, self.cache_LSX, strict=True)):
            rotation = still if number in config.unrotated_layers else (cos_N1D, sin_N1D)
            query_NHD, key_value_NX = self._inputs(layer, hidden_NE, *rotation, config.heads, config.rms_eps)
            cache_SX.index_copy_(0, slots_N, key_value_NX)
            attended_NX = self._attend(query_NHD, cache_SX, seen, gathered_CX)
            hidden_NE = hidden_NE + self.group.sum(F.linear(attended_NX, layer.output_EA))
            if self.chosen_LSC:
                added_NE, chosen_NC = mix_experts(layer, hidden_NE, config.rms_eps)
                self.chosen_LSC[number].index_copy_(0, slots_N, chosen_NC.short())
            else:
                added_NE = self._feed_forward(layer, hidden_NE, config.rms_eps)
            hidden_NE = hidden_NE + self.group.sum(added_NE)
        last_NE = rms_norm(hidden_NE[wanted], self.norm_E, config.rms_eps)
        logits_NV = self.group.gather_columns(F.linear(last_NE, self.head_VE))
        return logits_NV[:, : self.vocabulary].float()

    def _embed(self, tokens_N: torch.Tensor) -> torch.Tensor:
        """Each token's row of the embedding, which one rank of the group holds."""
        if self.group.size == 1:
            return F.embedding(tokens_N, self.embedding_VE)
        rows_N = tokens_N - self.group.rank * len(self.embedding_VE)
        elsewhere_N = (rows_N < 0) | (rows_N >= len(self.embedding_VE))
        local_NE = F.embedding(rows_N.masked_fill(elsewhere_N, 0), self.embedding_VE)
        return self.group.sum(local_NE.masked_fill(elsewhere_N[:, None], 0.0))

    def _attend(
        self,
        query_NHD: torch.Tensor,
        cache_SX: torch.Tensor,
        seen: Sequence[_Seen],
        gathered_CX: torch.Tensor,
    ) -> torch.Tensor:
        """Attention of each row over its own slots, [N, H x D]; `gathered_CX` is scratch space."""
        config = self.config
        query_NKGD = query_NHD.unflatten(1, (config.kv_heads, -1))
        out_NKGD = torch.empty_like(query_NKGD)
        for group in seen:
            rows = slice(group.start, group.stop)
            both_CX = torch.index_select(cache_SX, 0, group.slots, out=gathered_CX[: len(group.slots)])
            both_NT2KD = both_CX.view(group.stop - group.start, -1, 2, config.kv_heads, config.head_dim)
            key_NKTD, value_NKTD = both_NT2KD.permute(2, 0, 3, 1, 4)
            out_NKGD[rows] = F.scaled_dot_product_attention(
                query_NKGD[rows], key_NKTD, value_NKTD, attn_mask=group.bias_N11T
            )
        return out_NKGD.flatten(1)

    def _rotation(self, positions_N: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        angles_N1D = (positions_N[:, None].float() * self.frequencies).repeat(1, 2)[:, None]
        dtype = self.embedding_VE.dtype
        factor = self.rope_factor
        return (angles_N1D.cos() * factor).to(dtype), (angles_N1D.sin() * factor).to(dtype)

    def _tensor(self, numbers: Numbers) -> torch.Tensor:
        return to_device(numbers, self.device)

    def _none_chosen(self, slots: int) -> torch.Tensor:
        assert self.config.experts is not None
        size = (max(0, slots), self.config.experts.per_token)
        return torch.zeros(size, dtype=torch.int16, device=self.device)

    def _empty_cache(self, slots: int) -> torch.Tensor:
        return self.embedding_VE.new_zeros(slots, self._width)

    @property
    def _width(self) -> int:
        """Elements of one token's key and value in one layer."""
        return 2 * self.config.kv_heads * self.config.head_dim


def local_config(config: ModelConfig, size: int) -> ModelConfig:
    """The attention heads that each of `size` processes computes.

    Raises:
        UserError: a head would be cut.
    """
    check_native_heads(config.heads, config.kv_heads, size)
    return replace(config, heads=config.heads // size, kv_heads=config.kv_heads // size)


@cache
def _compiled(function: Callable[..., Any]) -> Callable[..., Any]:
    """One per function and process: layers of one shape share the compiled code, with old or new weights."""
    return torch.compile(function, dynamic=True)


def _first(slots: int, cache_SX: torch.Tensor) -> torch.Tensor:
    """The first slots of a layer's cache: a copy, or a view of it all if there is no memory for a copy."""
    try:
        return cache_SX[:slots].clone()
    except RuntimeError:
        return cache_SX[:slots]


def _bias(lengths_N: torch.Tensor, length: int, dtype: torch.dtype) -> torch.Tensor:
    """0 where the row sees the slot, -inf in the padding; [N, 1, 1, T]."""
    unseen_NT = torch.arange(length, device=lengths_N.device) >= lengths_N[:, None]
    return torch.zeros_like(unseen_NT, dtype=dtype).masked_fill_(unseen_NT, float("-inf"))[:, None, None]
