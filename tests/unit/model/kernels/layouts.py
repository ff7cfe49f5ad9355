"""Random rows of each kind of layout, and who sees whom by definition, made without intervals."""

from collections.abc import Mapping
from functools import cache

import torch
from torch import Tensor

from megatron_parallel_r1.thought.layout import Mode, lay_out
from megatron_parallel_r1.thought.packing import concatenate
from megatron_parallel_r1.thought.parser import parse
from tests.reference.dense import row_sees
from tests.reference.traces import TAGS, random_trace
from tests.unit.model.rows import causal_row, random_row

LayoutAndSight = tuple[Tensor, Tensor]


def _of_traces(seeds: range, mode: Mode) -> LayoutAndSight:
    rows = []
    for seed in seeds:
        trace = random_trace(seed)
        tree = parse(trace, TAGS)
        rows.append(lay_out([20, 21, 22], trace, [True] * len(trace), tree, mode))
    packed = concatenate(rows, range(len(rows)))
    return torch.from_numpy(packed.layout_KL), torch.from_numpy(row_sees(packed))


@cache
def layouts() -> Mapping[str, LayoutAndSight]:
    """layout [K, L] and sees [L, L] by name: `packed` short documents, `nested` blocks, `replay` branches."""
    packed, nested, long = random_row(3, documents=5, depth=1), random_row(8, 2, 3), causal_row(150)
    return {
        "causal": (long.layout_KL, long.sees_LL),
        "packed": (packed.layout_KL, packed.sees_LL),
        "nested": (nested.layout_KL, nested.sees_LL),
        "replay": _of_traces(range(6, 9), "replay"),
        "isolated": _of_traces(range(3), "isolated"),
    }
