"""Saves into a folder until it cannot; run by test_full_disk.py.

python -m tests.unit.train.full_disk FOLDER [BYTES]

BYTES: a file may not be larger, from the second checkpoint on.
"""

from __future__ import annotations

import json
import resource
import sys
import warnings
from pathlib import Path

import torch

from megatron_parallel_r1.architecture.model_config import ModelConfig
from megatron_parallel_r1.distributed import process
from megatron_parallel_r1.errors import UserError
from megatron_parallel_r1.model.gpt import build_model
from megatron_parallel_r1.model.weights import load_hf_tensors, random_hf_tensors
from megatron_parallel_r1.train.checkpoints.folder import Checkpoints
from megatron_parallel_r1.train.trainer import Adam, Trainer

SHAPE = ModelConfig(hidden=64, layers=2, heads=4, kv_heads=2, head_dim=16, ffn=128, vocab=64)


def main() -> None:
    warnings.simplefilter("ignore")
    folder, *limit = sys.argv[1:]
    with process.running(1):
        trainer = Trainer(build_model(SHAPE), Adam(lr=1e-3))
        load_hf_tensors(trainer.model, random_hf_tensors(SHAPE, seed=1))
        checkpoints = Checkpoints(Path(folder), keep_last=3)
        saved = 0
        try:
            for step in (1, 2, 3):
                checkpoints.save(trainer, step, {})
                checkpoints.settle()
                saved = step
                if limit:
                    resource.setrlimit(resource.RLIMIT_FSIZE, (int(limit[0]), resource.RLIM_INFINITY))
            error = None
        except UserError as raised:
            error = str(raised)
        left = sorted(path.name for path in Path(folder).iterdir())
        weights = [parameter.detach().clone() for parameter in trainer.model.parameters()]
        for parameter in trainer.model.parameters():
            parameter.data.zero_()
        restored, _ = checkpoints.restore(trainer)
        pairs = zip(weights, trainer.model.parameters(), strict=True)
        same = all(torch.equal(a, b) for a, b in pairs)
    print(json.dumps({"saved": saved, "error": error, "left": left, "restored": restored, "same": same}))


if __name__ == "__main__":
    main()
