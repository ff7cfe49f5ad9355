"""Publishes two versions of a split model's weights to running servers; run by torchrun, see test_sync.py.

torchrun --nproc-per-node 4 -m tests.engines.publishing OUT.json --tensor 2 --pipeline 2 --url URL distributed
"""

from __future__ import annotations

import argparse
import json
from dataclasses import asdict
from pathlib import Path

import torch
import torch.distributed as dist

from megatron_parallel_r1.distributed import process
from megatron_parallel_r1.distributed.parallel_config import ParallelConfig
from megatron_parallel_r1.model.gpt import build_model
from megatron_parallel_r1.sync.publisher import Publisher
from megatron_parallel_r1.sync.settings import Sync
from megatron_parallel_r1.sync.sglang import SglangControl
from tests.engines.trained import EXACT, ROWS, SHAPE, Trained, draw


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("out", type=Path)
    parser.add_argument("--tensor", type=int, default=1)
    parser.add_argument("--pipeline", type=int, default=1)
    parser.add_argument("--url", action="append", required=True)
    parser.add_argument("transports", nargs="+")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    parallel = ParallelConfig(tensor=arguments.tensor, pipeline=arguments.pipeline)
    found = []
    with process.running(1, parallel):
        model = build_model(SHAPE, torch.float32, parallel)
        version = 0
        for transport in arguments.transports:
            settings = Sync(
                transport=transport,
                bucket_bytes=30_000,
                tolerance=EXACT,
                timeout_s=120,
                folder=arguments.out.parent / "versions",
            )
            controls = [SglangControl(url, 120) for url in arguments.url]
            publisher = Publisher(controls, model, settings, ROWS, Trained(model))
            for _ in range(2):
                version += 1
                draw(model, version)
                published = publisher.publish(version)
                everyone = [None] * dist.get_world_size()
                dist.all_gather_object(everyone, published)
                # All processes are told the same, up to what the clock said.
                assert all(state == published for state in everyone)
                found.append(asdict(published))
            publisher.end()
        if dist.get_rank() == 0:
            arguments.out.write_text(json.dumps(found))


if __name__ == "__main__":
    main()
