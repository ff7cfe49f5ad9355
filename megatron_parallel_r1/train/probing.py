"""The trainer's log-probs of probe texts, to compare with a server's.

Shapes: N targets of a micro-batch, T texts of L tokens.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import numpy as np
import torch.distributed as dist

from megatron_parallel_r1.distributed.collectives import all_gather_objects
from megatron_parallel_r1.thought.layout import lay_out
from megatron_parallel_r1.thought.tree import Tree
from megatron_parallel_r1.train.logprob_runner import LogprobRunner
from megatron_parallel_r1.train.micro_batch import MicroBatch
from megatron_parallel_r1.train.partition import partition_rows


def probe_texts(vocabulary: int, count: int = 4, length: int = 48) -> tuple[tuple[int, ...], ...]:
    """Token ids of the probe texts, the same in every run."""
    drawn_TL = np.random.default_rng(0).integers(vocabulary, size=(count, length))
    return tuple(tuple(text) for text in drawn_TL.tolist())


def causal_logprobs(
    runner: LogprobRunner,
    texts: Sequence[Sequence[int]],
    capacity: int,
    world: dist.ProcessGroup | None = None,
) -> list[tuple[float, ...]]:
    """Natural log-probs of `text[1:]` of each text under a causal mask, on every rank.

    All ranks call it; each replica computes all texts.

    Args:
        texts: token ids, at least two per text.
        capacity: tokens of a packed row.
        world: process group of all ranks; None: the default group.
    """
    rows = [lay_out(t[:1], t[1:], [True] * (len(t) - 1), Tree(len(t) - 1, ()), "causal") for t in texts]
    alone = replace(runner.partition, data=0, data_size=1)
    batches = [MicroBatch.of(row, runner.device) for row in partition_rows(rows, capacity, alone)]
    entries: list[tuple[int, int, float]] = []
    # Only the last pipeline stage has log-probs, and with context parallelism each rank has part of a row.
    for batch, logprobs_N in zip(batches, runner.logprobs(batches), strict=False):
        at_N = batch.at_N.cpu().numpy()
        members = [batch.row.members[place] for place in batch.row.member_L[at_N]]
        entries += zip(members, batch.row.source_L[at_N].tolist(), logprobs_N.tolist(), strict=True)
    logprobs = [[float("nan")] * (len(text) - 1) for text in texts]
    for part in all_gather_objects(entries, world):
        for text, index, logprob in part:
            logprobs[text][index] = logprob
    return [tuple(values) for values in logprobs]
