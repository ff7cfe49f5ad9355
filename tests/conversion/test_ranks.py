"""Four ranks of Megatron, split in several ways, load what one process converted; in one launch."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from megatron_parallel_r1.conversion.shard_plan import Target
from megatron_parallel_r1.conversion.to_hf import megatron_to_hf
from megatron_parallel_r1.conversion.to_megatron import hf_to_megatron
from tests.parallel.launch import ENVIRONMENT
from tests.unit.conversion.folders import assert_equal, tensors_of, write_hf

ROOT = Path(__file__).resolve().parents[2]


CASES = {
    "dense": ("qwen2", Target(2, 2)),
    "split": ("qwen3_moe", Target(2, 2)),
    "stages": ("qwen3_moe", Target(1, 2, 2)),
}


@pytest.mark.slow
def test_ranks_load_it_and_what_they_save_is_the_same(tmp_path: Path) -> None:
    for name, (variant, target) in CASES.items():
        write_hf(tmp_path / name / "hf", variant, vocab_size=101)
        hf_to_megatron(tmp_path / name / "hf", tmp_path / name / "megatron", target)
    torchrun = (sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "4")
    layouts = [
        f"{name}:{target.tensor}:{target.pipeline}:{target.expert}" for name, (_, target) in CASES.items()
    ]
    done = subprocess.run(
        [*torchrun, "-m", "tests.conversion.loading", str(tmp_path), *layouts],
        cwd=ROOT,
        env={**os.environ, **ENVIRONMENT},
        capture_output=True,
        text=True,
        timeout=600,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    for name in CASES:
        folder = tmp_path / name
        found = json.loads((folder / "found.json").read_text())
        assert found == {"wrong": [], "missing": [], "astray": []}, name
        megatron_to_hf(folder / "again", folder / "back", like=folder / "hf")
        assert_equal(tensors_of(folder / "hf"), tensors_of(folder / "back"))
