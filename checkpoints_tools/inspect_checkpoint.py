"""Says what a checkpoint of either form holds, and with --check whether its files are undamaged.

    python checkpoints_tools/inspect_checkpoint.py Qwen3-4B-Base-megatron --check

docs/checkpoints.md says more.
"""

from __future__ import annotations

from megatron_parallel_r1.utils.imports import prepare_imports

prepare_imports()

from megatron_parallel_r1.conversion.command import inspect_command, run_and_exit  # noqa: E402

if __name__ == "__main__":
    run_and_exit(inspect_command)
