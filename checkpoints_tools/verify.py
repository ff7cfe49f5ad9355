"""Compares two checkpoints, each of either form: every tensor bit for bit, then logits.

    python checkpoints_tools/verify.py Qwen3-4B-Base Qwen3-4B-Base-megatron

Exit code 0: the same; 1: different; 2: one cannot be read. docs/checkpoints.md says more.
"""

from __future__ import annotations

from megatron_parallel_r1.conversion.command import RESUME, verify_command
from megatron_parallel_r1.utils.exit import run_and_exit

if __name__ == "__main__":
    run_and_exit(verify_command, RESUME)
