"""Four ranks of Megatron, two pipeline stages of two tensor ranks, load what one process converted."""

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


@pytest.mark.slow
@pytest.mark.parametrize("variant", ["qwen2", "qwen3_moe"])
def test_ranks_load_it_and_what_they_save_is_the_same(variant: str, tmp_path: Path) -> None:
    write_hf(tmp_path / "hf", variant, vocab_size=101)
    hf_to_megatron(tmp_path / "hf", tmp_path / "megatron", Target(2, 2))
    torchrun = (sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "4")
    out = tmp_path / "told.json"
    paths = [str(path) for path in (tmp_path / "megatron", tmp_path / "hf", out)]
    done = subprocess.run(
        [*torchrun, "-m", "tests.conversion.loading", *paths, "--tensor", "2", "--pipeline", "2"],
        cwd=ROOT,
        env={**os.environ, **ENVIRONMENT},
        capture_output=True,
        text=True,
        timeout=600,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    assert json.loads(out.read_text()) == {"wrong": [], "missing": [], "astray": []}
    megatron_to_hf(out.with_suffix(".again"), tmp_path / "back", like=tmp_path / "hf")
    assert_equal(tensors_of(tmp_path / "hf"), tensors_of(tmp_path / "back"))
