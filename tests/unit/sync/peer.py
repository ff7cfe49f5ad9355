"""The servers' end of a weight group, made by torch's own helper as SGLang makes it; see test_group.py."""

from __future__ import annotations

import sys
from datetime import timedelta

import torch
import torch.distributed as dist
from torch.distributed import distributed_c10d as c10d


def main() -> None:
    port, rank, size, times = map(int, sys.argv[1:])
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    store = dist.TCPStore("127.0.0.1", port, size, is_master=False)
    group, _ = c10d._new_process_group_helper(
        size,
        rank,
        [],
        c10d.Backend("gloo"),
        dist.PrefixStore("weights", store),
        group_name="weights",
        timeout=timedelta(seconds=120),
    )
    c10d._world.pg_group_ranks[group] = {number: number for number in range(size)}
    for _ in range(times):
        tensor = torch.empty(1000)
        dist.broadcast(tensor, src=0, group=group)
        print(tensor.sum().item(), flush=True)


if __name__ == "__main__":
    main()
