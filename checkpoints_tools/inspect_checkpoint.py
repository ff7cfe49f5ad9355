"""Says what a checkpoint of either form holds, and with --check whether its files are undamaged.

    python checkpoints_tools/inspect_checkpoint.py Qwen3-4B-Base-megatron --check

docs/checkpoints.md says more.
"""

from __future__ import annotations

from megatron_parallel_r1.conversion.command import explained, inspect_command

if __name__ == "__main__":
    explained(inspect_command)
