"""The experts that an engine chose stay with the rank that recorded them until another one needs them.

They are most of what a mixture of experts records: 768 bytes a token of Qwen3-30B-A3B, beside 18 of all else.
A rank trains few of a step's traces, and all ranks together hold their experts once.
"""

from __future__ import annotations

from collections.abc import Collection, Sequence

import torch.distributed as dist

from megatron_parallel_r1.distributed.collectives import (
    all_gather_objects,
    exchange_bytes,
    replica_slice,
)
from megatron_parallel_r1.rl.packed_trace import PackedTrace


def with_own(traces: Sequence[PackedTrace], own: Sequence[PackedTrace]) -> list[PackedTrace]:
    """Replaces this replica's slice of all replicas' traces by `own`, which have their experts.

    Args:
        own: empty on ranks that hold none.
    """
    here = replica_slice(range(len(traces)))
    return [*traces[: here.start], *own, *traces[here.stop :]] if own else list(traces)


def fetch_experts(traces: Sequence[PackedTrace], wanted: Collection[int]) -> dict[int, bytes]:
    """Returns the experts of the traces with these indices that have any, from the ranks that hold them.

    A collective over all ranks, unless no trace has experts.

    Args:
        traces: on every rank the same, but for who holds their experts.
        wanted: by this rank; another may want others.
    """
    if not any(trace.recorded for trace in traces):
        return {}
    held = {index: len(trace.experts) for index, trace in enumerate(traces) if trace.experts}
    found = {index: traces[index].experts for index in wanted if index in held}
    missing = [index for index in wanted if traces[index].recorded and index not in held]
    ranks = all_gather_objects((held, missing))
    # The first rank that holds a trace's experts sends them.
    sizes: dict[int, tuple[int, int]] = {}
    for rank, (there, _) in enumerate(ranks):
        for index, size in there.items():
            sizes.setdefault(index, (rank, size))
    me = dist.get_rank()
    outgoing = [[index for index in needed if sizes[index][0] == me] for _, needed in ranks]
    incoming = [[index for index in missing if sizes[index][0] == rank] for rank in range(len(ranks))]

    def lengths(parcels: Sequence[Sequence[int]]) -> list[int]:
        return [sum(sizes[index][1] for index in parcel) for parcel in parcels]

    if not any(needed for _, needed in ranks):
        return found
    payload = b"".join(traces[index].experts for parcel in outgoing for index in parcel)
    received = exchange_bytes(payload, lengths(outgoing), lengths(incoming))
    start = 0
    for index in (index for parcel in incoming for index in parcel):
        stop = start + sizes[index][1]
        found[index] = bytes(received[start:stop])
        start = stop
    return found
