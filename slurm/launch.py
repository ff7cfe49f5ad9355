"""Submits jobs with submitit, to SLURM or, where there is none, to this machine. docs/cluster.md says more.

python slurm/launch.py submit rl recipes/qwen3_4b/rl_s1.yaml [--dry-run] [--sweep seed=1,2,3] [KEY=VALUE]...
python slurm/launch.py curriculum recipes/tiny/demo.yaml       # a job a stage, each after the one before
python slurm/launch.py status | cancel [JOB]... | logs JOB
"""

from __future__ import annotations

import sys

from megatron_parallel_r1.cluster.command import app
from megatron_parallel_r1.errors import UserError

if __name__ == "__main__":
    try:
        app()
    except UserError as error:
        print(f"error: {' '.join(str(error).split())}", file=sys.stderr)
        sys.exit(2)
