"""Converts a distributed checkpoint of Megatron to a Hugging Face folder, in one process.

    python checkpoints_tools/megatron_to_hf.py Qwen3-4B-Base-megatron Qwen3-4B-again
    python checkpoints_tools/megatron_to_hf.py runs/x/rl/checkpoints/step_000100 out --like runs/x/sft/model

Killed, the same command goes on. docs/checkpoints.md says more.
"""

from __future__ import annotations

from megatron_parallel_r1.conversion.command import RESUME, megatron_to_hf_command
from megatron_parallel_r1.utils.exit import run_and_exit

if __name__ == "__main__":
    run_and_exit(megatron_to_hf_command, RESUME)
