"""A decoder's forward pass: rows of tokens, each with its own list of cache slots.

Takes weights under their Hugging Face names, as a server does, and fuses them once per update. Prefill and
decode are the same pass: a row is one token, wherever in whichever context it stands. In a team each process
computes its own heads, features and logits of every row; their sums are the whole model's.

Shapes: N rows, T longest context, E hidden size, H query heads, K key/value heads, G = H / K, D head size,
J = H + K, F feed-forward size, V vocabulary, S slots, C slots that are gathered at once; H, K, F and a
weight's V count this process's own.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from typing import Protocol

import torch
import torch.nn.functional as F

from megatron_parallel_r1.rollout.native.feed_forward import Dense, Experts
from megatron_parallel_r1.rollout.native.limits import check_heads
from megatron_parallel_r1.rollout.native.parts import own_part
from megatron_parallel_r1.rollout.native.rows import Group, Numbers, Rows
from megatron_parallel_r1.rollout.native.team import Team
from megatron_parallel_r1.rope import RopeScaling, rope_frequencies, rope_gain

EMBEDDING = "model.embed_tokens.weight"
HEAD = "lm_head.weight"
# Bytes of keys and values that are gathered at once; on a CPU they are still in its cache when they are read.
MOST_BYTES = {"cpu": 2**19, "cuda": 2**28}


class ShapeOfExperts(Protocol):
    """The fields of `model.config.Experts` that decoding needs."""

    per_token: int
    renormalized: bool


class Shape(Protocol):
    """The fields of `model.config.ModelConfig` that decoding needs; this room does not import that one."""

    layers: int
    heads: int
    kv_heads: int
    head_dim: int
    rms_eps: float
    rope_theta: float
    tied: bool
    rope_scaling: RopeScaling | None
    experts: ShapeOfExperts | None


@dataclass(frozen=True, slots=True)
class Architecture:
    """What the forward pass needs of a `config.json`; which norms and biases there are, the weights tell.

    Attributes:
        experts_per_token: how many of the experts a token goes through; 0: there are none.
        renormalized: whether their weights are scaled to sum to 1.
    """

    layers: int
    heads: int
    kv_heads: int
    head_dim: int
    norm_eps: float
    rope_theta: float
    tied: bool
    rope_scaling: RopeScaling | None = None
    experts_per_token: int = 0
    renormalized: bool = True

    @classmethod
    def of(cls, shape: Shape) -> Architecture:
        return cls(
            layers=shape.layers,
            heads=shape.heads,
            kv_heads=shape.kv_heads,
            head_dim=shape.head_dim,
            norm_eps=shape.rms_eps,
            rope_theta=shape.rope_theta,
            tied=shape.tied,
            rope_scaling=shape.rope_scaling,
            experts_per_token=shape.experts.per_token if shape.experts else 0,
            renormalized=shape.experts is None or shape.experts.renormalized,
        )

    def shared(self, size: int) -> Architecture:
        """What each of `size` processes computes.

        Raises:
            UserError: a head would be cut.
        """
        check_heads(self.heads, self.kv_heads, size)
        return replace(self, heads=self.heads // size, kv_heads=self.kv_heads // size)


@dataclass(frozen=True, slots=True)
class _Layer:
    attention_norm_E: torch.Tensor
    qkv_AE: torch.Tensor
    qkv_bias_A: torch.Tensor | None
    query_key_norm_JD: torch.Tensor | None
    output_EA: torch.Tensor
    mlp_norm_E: torch.Tensor
    mlp: Dense | Experts


@dataclass(frozen=True, slots=True)
class _Seen:
    """Rows from `start` to before `stop`, which are attended together; the same in every layer.

    Attributes:
        slots: that they see, row after row, each filled up to the longest.
        bias_N11T: 0 where a slot is the row's own, -inf where it fills up.
    """

    start: int
    stop: int
    slots: torch.Tensor
    bias_N11T: torch.Tensor


class DecodeModel:
    """The weights, the cache tensors, and the pass over them; in a team this process's part of all three.

    Args:
        architecture: of the whole model.
        tensors: whole, under their Hugging Face names; no two need to exist at once.
        slots: of the cache.
        team: the processes that share the model.
    """

    def __init__(
        self,
        architecture: Architecture,
        tensors: Iterable[tuple[str, torch.Tensor]],
        slots: int,
        team: Team,
    ) -> None:
        self.architecture = architecture.shared(team.size)
        self.team = team
        by_name: dict[str, torch.Tensor] = {}
        for name, tensor in tensors:
            if name == EMBEDDING:
                self.vocabulary = len(tensor)
            # Copies: the trainer goes on to change its own tensors in place.
            by_name[name] = own_part(name, tensor, team)
        prefix = "model.layers."
        self.embedding_VE = by_name[EMBEDDING]
        self.head_VE = self.embedding_VE if architecture.tied else by_name[HEAD]
        self.norm_E = by_name["model.norm.weight"]
        self.layers = [
            _fused(by_name, f"{prefix}{index}.", self.architecture) for index in range(architecture.layers)
        ]
        frequencies = rope_frequencies(
            architecture.head_dim, architecture.rope_theta, architecture.rope_scaling
        )
        self.frequencies = frequencies.to(self.embedding_VE.device)
        self.rope_gain = rope_gain(architecture.rope_scaling)
        self.cache_LSX = [self._empty_cache(slots) for _ in self.layers]

    @property
    def device(self) -> torch.device:
        return self.embedding_VE.device

    def grow(self, slots: int) -> None:
        """Makes room for `slots` slots; what is cached stays."""
        for index, cache_SX in enumerate(self.cache_LSX):
            more_SX = self._empty_cache(slots - len(cache_SX))
            self.cache_LSX[index] = torch.cat([cache_SX, more_SX])

    def pass_of(self, rows: Rows, wanted: Numbers) -> torch.Tensor:
        """Writes each row's key and value into its slot; the logits [C, V], float32, of the `wanted` rows."""
        rows, places_N = rows.longest_first()
        most_cells = MOST_BYTES[self.device.type] // (self._width * self.embedding_VE.element_size())
        columns = (rows.tokens_N, rows.positions_N, rows.slots_N, rows.seen_NT, rows.lengths_N)
        arguments = (torch.from_numpy(column).to(self.device) for column in (*columns, places_N[wanted]))
        return self.forward(*arguments, rows.groups(most_cells))

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
        """The pass itself, which asks the host for no number on a GPU; see `Rows` for its arguments.

        Of a team only rank 0 gets the whole vocabulary's logits, the others those of their own part.
        """
        a = self.architecture
        cos_N1D, sin_N1D = self._rotation(positions_N)
        hidden_NE = self._embed(tokens_N)
        seen = [
            _Seen(start, stop, seen_NT[start:stop, :longest].flatten(), bias_N11T)
            for start, stop, longest in groups
            for bias_N11T in (_bias(lengths_N[start:stop], longest, hidden_NE.dtype),)
        ]
        gathered_CX = self.cache_LSX[0].new_empty(max(len(group.slots) for group in seen), self._width)
        for layer, cache_SX in zip(self.layers, self.cache_LSX, strict=True):
            normed_NE = _rms_norm(hidden_NE, layer.attention_norm_E, a.norm_eps)
            qkv_NX = F.linear(normed_NE, layer.qkv_AE, layer.qkv_bias_A)
            query_key_NX, value_NX = qkv_NX.tensor_split([(a.heads + a.kv_heads) * a.head_dim], dim=-1)
            query_key_NJD = query_key_NX.unflatten(-1, (-1, a.head_dim))
            if layer.query_key_norm_JD is not None:
                query_key_NJD = _rms_norm(query_key_NJD, layer.query_key_norm_JD, a.norm_eps)
            query_NHD, key_NKD = _rotate(query_key_NJD, cos_N1D, sin_N1D).tensor_split([a.heads], dim=1)
            cache_SX.index_copy_(0, slots_N, torch.cat([key_NKD.flatten(1), value_NX], dim=-1))
            attended_NX = self._attend(query_NHD, cache_SX, seen, gathered_CX)
            hidden_NE = hidden_NE + self.team.sum(F.linear(attended_NX, layer.output_EA))
            normed_NE = _rms_norm(hidden_NE, layer.mlp_norm_E, a.norm_eps)
            hidden_NE = hidden_NE + self.team.sum(layer.mlp(normed_NE))
        last_NE = _rms_norm(hidden_NE[wanted], self.norm_E, a.norm_eps)
        logits_NV = self.team.gather_columns(F.linear(last_NE, self.head_VE))
        return logits_NV[:, : self.vocabulary].float()

    def _embed(self, tokens_N: torch.Tensor) -> torch.Tensor:
        """Each token's row of the embedding, which one process of the team has."""
        if self.team.size == 1:
            return F.embedding(tokens_N, self.embedding_VE)
        rows_N = tokens_N - self.team.rank * len(self.embedding_VE)
        elsewhere_N = (rows_N < 0) | (rows_N >= len(self.embedding_VE))
        found_NE = F.embedding(rows_N.masked_fill(elsewhere_N, 0), self.embedding_VE)
        return self.team.sum(found_NE.masked_fill(elsewhere_N[:, None], 0.0))

    def _attend(
        self,
        query_NHD: torch.Tensor,
        cache_SX: torch.Tensor,
        seen: Sequence[_Seen],
        gathered_CX: torch.Tensor,
    ) -> torch.Tensor:
        """Attention of each row over its own slots, [N, H x D]; `gathered_CX` is written over."""
        a = self.architecture
        query_NKGD = query_NHD.unflatten(1, (a.kv_heads, -1))
        out_NKGD = torch.empty_like(query_NKGD)
        for group in seen:
            rows = slice(group.start, group.stop)
            both_CX = torch.index_select(cache_SX, 0, group.slots, out=gathered_CX[: len(group.slots)])
            both_NT2KD = both_CX.view(group.stop - group.start, -1, 2, a.kv_heads, a.head_dim)
            key_NKTD, value_NKTD = both_NT2KD.permute(2, 0, 3, 1, 4)
            out_NKGD[rows] = F.scaled_dot_product_attention(
                query_NKGD[rows], key_NKTD, value_NKTD, attn_mask=group.bias_N11T
            )
        return out_NKGD.flatten(1)

    def _rotation(self, positions_N: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        angles_N1D = (positions_N[:, None].float() * self.frequencies).repeat(1, 2)[:, None]
        dtype = self.embedding_VE.dtype
        gain = self.rope_gain
        return (angles_N1D.cos() * gain).to(dtype), (angles_N1D.sin() * gain).to(dtype)

    def _empty_cache(self, slots: int) -> torch.Tensor:
        return self.embedding_VE.new_zeros(slots, self._width)

    @property
    def _width(self) -> int:
        """Numbers of one token's key and value in one layer."""
        return 2 * self.architecture.kv_heads * self.architecture.head_dim


def _fused(by_name: dict[str, torch.Tensor], prefix: str, own: Architecture) -> _Layer:
    """Takes a layer's weights out of `by_name`: fused and unfused, only one layer's exist at once."""

    def weight(name: str) -> torch.Tensor:
        return by_name.pop(f"{prefix}{name}.weight")

    def mlp(name: str) -> Dense:
        gate_up_FE = torch.cat([weight(f"{name}.gate_proj"), weight(f"{name}.up_proj")])
        return Dense(gate_up_FE, weight(f"{name}.down_proj"))

    norms = []
    if f"{prefix}self_attn.q_norm.weight" in by_name:
        heads = ((weight("self_attn.q_norm"), own.heads), (weight("self_attn.k_norm"), own.kv_heads))
        norms = [norm_D.expand(count, -1) for norm_D, count in heads]
    has_bias = f"{prefix}self_attn.q_proj.bias" in by_name
    biases = [by_name.pop(f"{prefix}self_attn.{part}_proj.bias") for part in "qkv"] if has_bias else []
    if own.experts_per_token:
        router_XE = weight("mlp.gate")
        experts = [mlp(f"mlp.experts.{index}") for index in range(len(router_XE))]
        feed_forward = Experts(router_XE, experts, own.experts_per_token, own.renormalized)
    else:
        feed_forward = mlp("mlp")
    return _Layer(
        attention_norm_E=weight("input_layernorm"),
        qkv_AE=torch.cat([weight(f"self_attn.{part}_proj") for part in "qkv"]),
        qkv_bias_A=torch.cat(biases) if has_bias else None,
        query_key_norm_JD=torch.cat(norms) if norms else None,
        output_EA=weight("self_attn.o_proj"),
        mlp_norm_E=weight("post_attention_layernorm"),
        mlp=feed_forward,
    )


def _rms_norm(hidden: torch.Tensor, weight: torch.Tensor, eps: float) -> torch.Tensor:
    wide = hidden.float()
    normed = wide * torch.rsqrt(wide.pow(2).mean(-1, keepdim=True) + eps)
    return weight * normed.to(hidden.dtype)


def _rotate(x_NHD: torch.Tensor, cos_N1D: torch.Tensor, sin_N1D: torch.Tensor) -> torch.Tensor:
    low, high = x_NHD.chunk(2, dim=-1)
    return x_NHD * cos_N1D + torch.cat([-high, low], dim=-1) * sin_N1D


def _bias(lengths_N: torch.Tensor, longest: int, dtype: torch.dtype) -> torch.Tensor:
    """0 where a slot is the row's own, -inf where it fills up; [N, 1, 1, T]."""
    unseen_NT = torch.arange(longest, device=lengths_N.device) >= lengths_N[:, None]
    return torch.zeros_like(unseen_NT, dtype=dtype).masked_fill_(unseen_NT, float("-inf"))[:, None, None]
