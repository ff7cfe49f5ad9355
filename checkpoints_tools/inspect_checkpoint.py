"""Says what a checkpoint of either form holds, and with --check whether its files are undamaged.

    python checkpoints_tools/inspect_checkpoint.py Qwen3-4B-Base-megatron --check

docs/checkpoints.md says more.
"""

from __future__ import annotations

from megatron_parallel_r1.conversion.command import RESUME, inspect_command
from megatron_parallel_r1.utils.exit import run_and_exit

if __name__ == "__main__":
    run_and_exit(inspect_command, RESUME)
