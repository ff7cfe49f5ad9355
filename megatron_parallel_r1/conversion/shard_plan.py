"""Plans the shards of each rank of a target layout, and the rows and columns that each consists of.

Ranks are numbered in Megatron's order for its smallest world (tp-cp-ep-dp-pp): tensor fastest, then expert,
then pipeline. The first of the ranks that replicate a shard writes it. Nothing is read here.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from math import prod

from megatron_parallel_r1.architecture.model_config import ModelConfig
from megatron_parallel_r1.architecture.weight_table import WeightMapping, padded_vocab, weight_table
from megatron_parallel_r1.checkpoint_formats.torch_dist import checkpoint_key
from megatron_parallel_r1.errors import UserError


@dataclass(frozen=True, slots=True)
class Target:
    """Sizes of the groups that split the layers, the matrices and the experts."""

    tensor: int = 1
    pipeline: int = 1
    expert: int = 1

    def check(self, config: ModelConfig) -> None:
        """Checks that the sizes divide the model.

        Raises:
            UserError: one does not; the message names it, and a size that does.
        """
        counts = [("tensor", "heads", config.heads), ("tensor", "key/value heads", config.kv_heads)]
        experts = config.experts
        counts += [("tensor", "feed-forward size", experts.ffn if experts else config.ffn)]
        counts += [("pipeline", "layers", config.layers)]
        counts += [("expert", "experts", experts.count if experts else 1)]
        for name, what, count in counts:
            size = getattr(self, name)
            if size < 1 or count % size:
                fits = next((n for n in range(size, 0, -1) if count % n == 0), 1)
                raise UserError(
                    f"{name} {size} does not divide the model's {count} {what}; give --{name} {fits}"
                )

    def rank(self, tensor: int, pipeline: int, expert: int) -> int:
        return (pipeline * self.expert + expert) * self.tensor + tensor


@dataclass(frozen=True, slots=True)
class RowSlice:
    """Rows of a Hugging Face tensor; with `column`, only the columns from there on."""

    name: str
    row: int
    rows: int
    column: int | None = None


@dataclass(frozen=True, slots=True)
class Shard:
    """A rectangle of a tensor of the checkpoint.

    Attributes:
        key: the whole tensor's name.
        whole: its sizes.
        offset: indices of the shard's first element in it.
        sizes: of the shard, as many as `whole`.
        groups: number of row groups that the sources are interleaved in.
        sources: in their order within a group.
    """

    key: str
    whole: tuple[int, ...]
    offset: tuple[int, ...]
    sizes: tuple[int, ...]
    groups: int
    sources: tuple[RowSlice, ...]

    @property
    def elements(self) -> int:
        return prod(self.sizes)


def shard_plan(config: ModelConfig, target: Target) -> dict[int, list[Shard]]:
    """Returns the shards that each rank writes, in the order of a forward pass."""
    shards: dict[int, list[Shard]] = {}
    layers_per_stage = config.layers // target.pipeline
    experts_per_rank = config.experts.count // target.expert if config.experts else 1
    has_experts = config.experts is not None
    head = False
    for weight in weight_table(config):
        head = head or weight.layer is not None
        stage = weight.layer // layers_per_stage if weight.layer is not None else (target.pipeline - 1) * head
        expert = 0 if weight.expert is None else weight.expert // experts_per_rank
        for rank in range(target.tensor if weight.split_dim is not None else 1):
            own = _rank_shards(weight, rank, target.tensor, config, checkpoint_key(weight, has_experts))
            shards.setdefault(target.rank(rank, stage, expert), []).extend(own)
    return shards


def _rank_shards(
    weight: WeightMapping, rank: int, size: int, config: ModelConfig, key: str
) -> Iterator[Shard]:
    lead = () if weight.expert is None else (weight.expert,)
    experts = (config.experts.count,) if config.experts and lead else ()
    whole = (*experts, *weight.shape)
    rest = weight.shape[1:]

    def shard(row: int, rows: int, groups: int, *sources: RowSlice, column: int = 0, width: int = 0) -> Shard:
        offset, sizes = (row, *(0 for _ in rest)), (rows, *rest)
        if width:
            offset, sizes = (row, column), (rows, width)
        return Shard(key, whole, (*lead, *offset), (*(1 for _ in lead), *sizes), groups, sources)

    if weight.split_dim is None:
        ((name, (rows, *_)),) = weight.parts
        yield shard(0, rows, 1, RowSlice(name, 0, rows))
    elif weight.split_dim == 1:
        ((name, (rows, width)),) = weight.parts
        own = width // size
        source = RowSlice(name, 0, rows, rank * own if size > 1 else None)
        yield shard(0, rows, 1, source, column=rank * own, width=own)
    elif weight.vocabulary:
        ((name, (rows, *_)),) = weight.parts
        own = padded_vocab(rows, size) // size
        first, last = min(rank * own, rows), min((rank + 1) * own, rows)
        if last > first:
            yield shard(first, last - first, 1, RowSlice(name, first, last - first))
    elif weight.groups > 1:
        sources = [RowSlice(name, rank * (rows // size), rows // size) for name, (rows, *_) in weight.parts]
        rows = sum(source.rows for source in sources)
        yield shard(rank * rows, rows, weight.groups_of(size), *sources)
    else:
        # Megatron splits each part of such a matrix separately: a rank has a shard of gate, and one of up.
        above = 0
        for name, (rows, *_) in weight.parts:
            own = rows // size
            yield shard(above + rank * own, own, 1, RowSlice(name, rank * own, own))
            above += rows
