"""Losses of rows that two processes share, as context-parallel ranks do; run twice, see test_loss.py.

python -m tests.unit.rl.objective.two_processes RANK STORE OUT.json
"""

from __future__ import annotations

import json
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from megatron_parallel_r1.config.objective import Objective
from megatron_parallel_r1.rl.objective.loss import policy_loss
from megatron_parallel_r1.train.micro_batch import Segments

OBJECTIVES = {
    "gspo": Objective(ratio="sequence"),
    "gspo_token": Objective(ratio="sequence_token"),
    "masked_by_trace": Objective(correction="mask", correction_level="sequence", correction_low=0.9),
    "gspo_truncated": Objective(
        ratio="sequence", correction="truncate", correction_level="geometric", correction_cap=1.05
    ),
}
# The trace of each target of a row, and where the row is cut: within traces; with nothing on the first
# process; a row of fillers alone.
ROWS = {"within": ([0, 0, 1, 0, 0, 2, 1, 2], 3), "before": ([0, 1, 1, 2], 0), "fillers": ([], 0)}


def losses(rank: int | None, group: dist.ProcessGroup | None = None) -> dict[str, dict[str, Any]]:
    """Loss, gradient and report of each objective and row, of one process's part; rank None: of the whole."""
    return {
        f"{name}, {row}": _loss(
            objective, traces, {None: slice(None), 0: slice(0, cut), 1: slice(cut, None)}[rank], group
        )
        for name, objective in OBJECTIVES.items()
        for row, (traces, cut) in ROWS.items()
    }


def _loss(
    objective: Objective, traces: Sequence[int], part: slice, group: dist.ProcessGroup | None
) -> dict[str, Any]:
    generator = torch.Generator().manual_seed(11)
    near, old, engine, advantage, weight = (
        torch.randn(len(traces), generator=generator, dtype=torch.float64) for _ in range(5)
    )
    values = {
        "old": old[part],
        "engine": (old + engine / 10)[part],
        "advantage": advantage[part],
        "weight": weight.exp()[part],
    }
    logprobs_N = (old + near / 10)[part].clone().requires_grad_()
    segments = Segments(torch.tensor(traces, dtype=torch.int64)[part], len(set(traces)), group)
    loss, sums = policy_loss(logprobs_N, torch.zeros_like(logprobs_N), values, objective, segments)
    loss.backward()
    assert logprobs_N.grad is not None
    return {
        "loss": loss.item(),
        "grad": logprobs_N.grad.tolist(),
        "sums": {name: float(value) for name, value in sums.items()},
    }


def main() -> None:
    rank, out = int(sys.argv[1]), Path(sys.argv[3])
    torch.set_num_threads(1)
    store = dist.FileStore(sys.argv[2], 2)
    dist.init_process_group("gloo", store=store, rank=rank, world_size=2)
    out.write_text(json.dumps(losses(rank, dist.group.WORLD)))
    # Gloo fails in a process whose peer hangs up before the last collective has returned there.
    store.set(f"done by {rank}", "")
    store.wait(["done by 0", "done by 1"])
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
