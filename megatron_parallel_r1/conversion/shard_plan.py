"""Which pieces the ranks of a target layout hold, and which rows and columns each is made of.

Ranks are numbered as Megatron does in its smallest world (order tp-cp-ep-dp-pp): tensor fastest, then expert,
then pipeline. What several ranks hold alike, the first of them writes. Nothing is read here.
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
    """How many ranks share the layers, the matrices and the experts."""

    tensor: int = 1
    pipeline: int = 1
    expert: int = 1

    def check(self, shape: ModelConfig) -> None:
        """
        Raises:
            UserError: something does not divide; it names what, and a size that would do.
        """
        counts = [("tensor", "heads", shape.heads), ("tensor", "key/value heads", shape.kv_heads)]
        experts = shape.experts
        counts += [("tensor", "feed-forward size", experts.ffn if experts else shape.ffn)]
        counts += [("pipeline", "layers", shape.layers)]
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
class Source:
    """Rows of a Hugging Face tensor, from `column` on where they are not taken whole."""

    name: str
    row: int
    rows: int
    column: int | None = None


@dataclass(frozen=True, slots=True)
class Piece:
    """A rectangle of a whole tensor of the checkpoint.

    Attributes:
        key: the whole tensor's name.
        whole: its sizes.
        corner: indices of the piece's first element in it.
        sizes: of the piece, as many as `whole`.
        groups: into how many groups the rows of each source are dealt out.
        sources: in the order in which a group holds them.
    """

    key: str
    whole: tuple[int, ...]
    corner: tuple[int, ...]
    sizes: tuple[int, ...]
    groups: int
    sources: tuple[Source, ...]

    @property
    def numbers(self) -> int:
        return prod(self.sizes)


def pieces_of(shape: ModelConfig, target: Target) -> dict[int, list[Piece]]:
    """The pieces that each rank writes, in the order of a forward pass."""
    made: dict[int, list[Piece]] = {}
    each_layers = shape.layers // target.pipeline
    each_experts = shape.experts.count // target.expert if shape.experts else 1
    has_experts = shape.experts is not None
    head = False
    for weight in weight_table(shape):
        head = head or weight.layer is not None
        stage = weight.layer // each_layers if weight.layer is not None else (target.pipeline - 1) * head
        expert = 0 if weight.expert is None else weight.expert // each_experts
        for rank in range(target.tensor if weight.split_dim is not None else 1):
            pieces = _of_rank(weight, rank, target.tensor, shape, checkpoint_key(weight, has_experts))
            made.setdefault(target.rank(rank, stage, expert), []).extend(pieces)
    return made


def _of_rank(weight: WeightMapping, rank: int, size: int, shape: ModelConfig, key: str) -> Iterator[Piece]:
    lead = () if weight.expert is None else (weight.expert,)
    whole = (*((shape.experts.count,) if lead else ()), *weight.shape)
    rest = weight.shape[1:]

    def piece(row: int, rows: int, groups: int, *sources: Source, column: int = 0, width: int = 0) -> Piece:
        corner, sizes = (row, *(0 for _ in rest)), (rows, *rest)
        if width:
            corner, sizes = (row, column), (rows, width)
        return Piece(key, whole, (*lead, *corner), (*(1 for _ in lead), *sizes), groups, sources)

    if weight.split_dim is None:
        ((name, (rows, *_)),) = weight.parts
        yield piece(0, rows, 1, Source(name, 0, rows))
    elif weight.split_dim == 1:
        ((name, (rows, width)),) = weight.parts
        own = width // size
        source = Source(name, 0, rows, rank * own if size > 1 else None)
        yield piece(0, rows, 1, source, column=rank * own, width=own)
    elif weight.vocabulary:
        ((name, (rows, *_)),) = weight.parts
        own = padded_vocab(rows, size) // size
        first, last = min(rank * own, rows), min((rank + 1) * own, rows)
        if last > first:
            yield piece(first, last - first, 1, Source(name, first, last - first))
    elif weight.groups > 1:
        sources = [Source(name, rank * (rows // size), rows // size) for name, (rows, *_) in weight.parts]
        rows = sum(source.rows for source in sources)
        yield piece(rank * rows, rows, weight.groups_of(size), *sources)
    else:
        # Megatron cuts each part of such a matrix by itself: a rank has a piece of gate, and one of up.
        above = 0
        for name, (rows, *_) in weight.parts:
            own = rows // size
            yield piece(above + rank * own, own, 1, Source(name, rank * own, own))
            above += rows
