"""Launches by torchrun, as a user would, and layouts in words: `tensor=2 pipeline=2 sequence`.

To start a process costs as much as what a layout has to show; so the processes of one launch come together
and part again for each layout in turn.
"""

from __future__ import annotations

import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

from megatron_parallel_r1.architecture.model_config import ExpertsConfig, ModelConfig
from megatron_parallel_r1.distributed.parallel_config import ParallelConfig

ROOT = Path(__file__).resolve().parents[2]
# Nothing here is compiled, and to load torch's compiler is a third of the work of a process that starts.
ENVIRONMENT = {"OMP_NUM_THREADS": "1", "TORCHDYNAMO_DISABLE": "1"}
# 41 tokens: no tensor group divides them.
SHAPE = ModelConfig(hidden=32, layers=4, heads=4, kv_heads=2, head_dim=8, ffn=64, vocab=41, rope_theta=1e3)
# Few layers, since a choice of experts that hangs on a rounding error shows in every figure.
EXPERTS: dict[str, Any] = {
    "family": "qwen3_moe",
    "layers": 2,
    "experts": ExpertsConfig(count=8, per_token=2, ffn=24),
}
HANGS_S = 1500  # a launch that has not ended by then never will


def torchrun(processes: int, module: str, *arguments: str | Path) -> None:
    """Runs a module of this folder in so many processes; if one fails, the error has all that they said."""
    launcher = ("-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(processes))
    done = subprocess.run(
        [sys.executable, *launcher, "-m", f"tests.parallel.{module}", *map(str, arguments)],
        cwd=ROOT,
        env={**os.environ, **ENVIRONMENT},
        capture_output=True,
        text=True,
        timeout=HANGS_S,
    )
    assert done.returncode == 0, done.stdout + done.stderr


def settings_of(layout: str) -> dict[str, int | bool]:
    """`tensor=2 sequence` is {"tensor": 2, "sequence": True}."""
    pairs = (word.partition("=") for word in layout.split())
    return {name: int(value) if value else True for name, _, value in pairs}


# The words that are no key of `parallel`.
MODELS = ("untied", "experts")


def parallel_of(layout: str) -> tuple[ParallelConfig, ModelConfig]:
    """A layout and its model, `SHAPE`: the word `untied` gives it an output matrix of its own, `experts`
    two layers of experts."""
    settings = settings_of(layout)
    untied, experts = (bool(settings.pop(word, False)) for word in MODELS)
    shape = replace(SHAPE, tied=not untied)
    return ParallelConfig(**settings), replace(shape, **EXPERTS) if experts else shape
