"""Run by torchrun: each rank loads converted checkpoints by Megatron's own loader and tells what came of it.

    torchrun --nproc-per-node 4 -m tests.conversion.loading FOLDER NAME:TENSOR:PIPELINE:EXPERT ...

Rank 0 writes FOLDER/NAME/found.json: whether the model has the weights of FOLDER/NAME/hf bit for bit, and
which slices that Megatron would have a rank save are not in that rank's files; then all save it again, as
Megatron does, to FOLDER/NAME/again.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import torch
from megatron.core import dist_checkpointing
from megatron.core.dist_checkpointing.dict_utils import nested_values
from megatron.core.dist_checkpointing.mapping import ShardedTensor, apply_factories, is_main_replica
from torch.distributed.checkpoint import FileSystemReader
from torch.distributed.checkpoint.metadata import MetadataIndex

from megatron_parallel_r1.checkpoint_formats.hf_folder import load_hf_folder, read_config
from megatron_parallel_r1.conversion.to_megatron import RELEASE
from megatron_parallel_r1.conversion.verify import load_with_megatron
from megatron_parallel_r1.distributed import process
from megatron_parallel_r1.distributed.collectives import all_gather_objects
from megatron_parallel_r1.distributed.parallel_config import ParallelConfig
from megatron_parallel_r1.model.gpt import build_model
from megatron_parallel_r1.model.weights import hf_tensors
from megatron_parallel_r1.utils.rank import is_rank_zero


def astray(state: dict[str, Any], release: Path) -> list[str]:
    """Slices of which this rank has the first copy, and that are in no file of its own."""
    places = FileSystemReader(release).read_metadata().storage_data
    own = f"__{torch.distributed.get_rank()}_"
    state = dict(state)
    apply_factories(state)
    found = []
    for shard in nested_values(state):
        if isinstance(shard, ShardedTensor) and is_main_replica(shard.replica_id):
            place = places[MetadataIndex(shard.key, torch.Size(shard.global_offset))]
            if not place.relative_path.startswith(own):
                found.append(f"{shard.key} at {shard.global_offset}: {place.relative_path}, not {own}")
    return found


def load(folder: Path, parallel: ParallelConfig) -> None:
    hf, megatron = folder / "hf", folder / "megatron"
    model = build_model(read_config(hf), torch.float32, parallel)
    load_with_megatron(model, megatron)
    expected = dict(load_hf_folder(hf)[1])
    wrong = [name for name, tensor in hf_tensors(model) if not torch.equal(expected.pop(name), tensor)]
    state = model[0].sharded_state_dict(metadata={"non_homogeneous_layers": True})
    each = all_gather_objects(astray(state, megatron / RELEASE))
    if is_rank_zero():
        found = {
            "wrong": wrong,
            "missing": list(expected),
            "astray": [name for some in each for name in some],
        }
        (folder / "found.json").write_text(json.dumps(found))
        (folder / "again").mkdir()
    torch.distributed.barrier()
    state = model[0].sharded_state_dict(metadata={"non_homogeneous_layers": True})
    dist_checkpointing.save(state, str(folder / "again"))


def main() -> None:
    folder = Path(sys.argv[1])
    for case in sys.argv[2:]:
        name, *sizes = case.split(":")
        tensor, pipeline, expert = map(int, sizes)
        parallel = ParallelConfig(
            tensor=tensor,
            pipeline=pipeline,
            expert=expert,
            sequence=tensor > 1,
        )
        with process.running(seed=0, parallel=parallel):
            load(folder / name, parallel)


if __name__ == "__main__":
    main()
