"""Converts a Hugging Face folder to a distributed checkpoint of Megatron, in one process.

    python checkpoints_tools/hf_to_megatron.py Qwen3-4B-Base Qwen3-4B-Base-megatron --tensor 2 --pipeline 2

Killed, the same command goes on. A recipe's model.path may name the result. docs/checkpoints.md says more.
"""

from __future__ import annotations

from megatron_parallel_r1.conversion.command import RESUME, hf_to_megatron_command
from megatron_parallel_r1.utils.exit import run_and_exit

if __name__ == "__main__":
    run_and_exit(hf_to_megatron_command, RESUME)
