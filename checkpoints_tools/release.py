"""Makes a folder ready to upload of a run, or of any checkpoint.

    python checkpoints_tools/release.py runs/x release-of-x
    python checkpoints_tools/release.py CHECKPOINT out --like runs/x/sft/model --run runs/x

docs/checkpoints.md says more.
"""

from __future__ import annotations

from megatron_parallel_r1.conversion.command import RESUME, release_command
from megatron_parallel_r1.utils.exit import run_and_exit

if __name__ == "__main__":
    run_and_exit(release_command, RESUME)
