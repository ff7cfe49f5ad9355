"""Buckets of a split model against all of its tensors, and the memory that they take; run by torchrun, see
test_sync.py.

torchrun --nproc-per-node 4 -m tests.parallel.gathering OUT.json "tensor=2 pipeline=2" "tensor=2"
"""

from __future__ import annotations

import json
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from megatron_parallel_r1.architecture.model_config import ModelConfig
from megatron_parallel_r1.architecture.weight_table import weight_table
from megatron_parallel_r1.distributed import process
from megatron_parallel_r1.distributed.collectives import all_gather_objects
from megatron_parallel_r1.distributed.parallel_config import ParallelConfig
from megatron_parallel_r1.model.gpt import Model, build_model
from megatron_parallel_r1.model.weights import hf_tensors, load_hf_tensors, own_parameters, random_hf_tensors
from megatron_parallel_r1.sync.buckets import gather_buckets
from megatron_parallel_r1.utils.rank import is_rank_zero
from tests.parallel.launch import parallel_of
from tests.reference.peak import Peak

BUCKETS = (1, 20_000, 10**9)


@contextmanager
def counted(model: Model) -> Iterator[Peak]:
    """Counts what is made beside a model's parameters."""
    with Peak() as peak:
        for parameter in model.parameters():
            peak.know(parameter)
        yield peak


def gathered(
    shape: ModelConfig, parallel: ParallelConfig, bucket_bytes: int, everywhere: bool = False
) -> dict[str, Any]:
    """How a pass went on this process: sizes of the buckets, memory, and what differed from `hf_tensors`."""
    model = build_model(shape, torch.float32, parallel)
    load_hf_tensors(model, random_hf_tensors(shape, seed=3, std=0.2))
    whole = dict(hf_tensors(model))
    sizes: list[int] = []
    names: list[str] = []
    differing: list[str] = []
    lasts: list[bool] = []
    with counted(model) as peak:
        for bucket in gather_buckets(model, bucket_bytes, everywhere):
            sizes.append(bucket.bytes)
            lasts.append(bucket.last)
            for name, tensor in bucket.tensors:
                names.append(name)
                if not torch.equal(tensor, whole[name]) or not tensor.is_contiguous():
                    differing.append(name)
    return {
        "sizes": sizes,
        "lasts": lasts,
        "names": sorted(names) == sorted(whole),
        "sent": len(names),
        "differing": differing,
        "peak": peak.peak,
        "shards": sum(parameter.nbytes for parameter in own_parameters(model).values()),
    }


def passes(model: ModelConfig, parallel: ParallelConfig) -> dict[str, Any]:
    """How passes went on all processes, by model and size of the buckets."""
    found: dict[str, Any] = {}
    for tied in (True, False):
        shape = replace(model, tied=tied)
        weights = [
            4 * sum(torch.Size(size).numel() for _, size in weight.parts) for weight in weight_table(shape)
        ]
        for bucket_bytes in BUCKETS:
            found[f"{tied} {bucket_bytes}"] = {
                "ranks": all_gather_objects(gathered(shape, parallel, bucket_bytes)),
                "everywhere": all_gather_objects(gathered(shape, parallel, bucket_bytes, everywhere=True)),
                "bucket": bucket_bytes,
                "largest": max(weights),
                "all": sum(weights),
            }
    return found


def main() -> None:
    out, *layouts = sys.argv[1:]
    torch.set_num_threads(1)
    found = {}
    for layout in layouts:
        parallel, shape = parallel_of(layout)
        with process.running(1, parallel):
            found[layout] = passes(shape, parallel)
    if is_rank_zero():
        Path(out).write_text(json.dumps(found))


if __name__ == "__main__":
    main()
