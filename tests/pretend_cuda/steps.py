"""Optimizer steps of SFT and GRPO under a layout, or of a mixture of experts, as a program:

python -m tests.pretend_cuda FOLDER tests.pretend_cuda.steps LAYOUT, for example "pipeline=2", or `experts`.
"""

from __future__ import annotations

import sys
from dataclasses import replace

import torch

from megatron_parallel_r1.architecture.model_config import ExpertsConfig
from megatron_parallel_r1.distributed import process
from tests.parallel.launch import parallel_of
from tests.parallel.steps import SHAPE, three_steps

EXPERTS = replace(SHAPE, family="qwen3_moe", experts=ExpertsConfig(count=4, per_token=2, ffn=32))

if __name__ == "__main__":
    layout = sys.argv[1]
    shape, layout = (EXPERTS, "") if layout == "experts" else (SHAPE, layout)
    parallel, _ = parallel_of(layout)
    with process.running(1, parallel):
        for loss in ("sft", "grpo"):
            three_steps(shape, parallel, torch.bfloat16, loss)
