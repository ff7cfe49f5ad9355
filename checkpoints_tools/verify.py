"""Compares two checkpoints, each of either form: every tensor bit for bit, then logits.

    python checkpoints_tools/verify.py Qwen3-4B-Base Qwen3-4B-Base-megatron

Exit code 0: the same; 1: different; 2: one cannot be read. docs/checkpoints.md says more.
"""

from __future__ import annotations

from megatron_parallel_r1.utils.imports import prepare_imports

prepare_imports()

from megatron_parallel_r1.conversion.command import run_and_exit, verify_command  # noqa: E402

if __name__ == "__main__":
    run_and_exit(verify_command)
