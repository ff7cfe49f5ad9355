"""Submits jobs through submitit to SLURM, or to this machine where there is no SLURM (docs/cluster.md).

python slurm/launch.py submit rl recipes/qwen3_4b/rl_s1.yaml [--dry-run] [--sweep seed=1,2,3] [KEY=VALUE]...
python slurm/launch.py curriculum recipes/tiny/demo.yaml       # one job per stage, chained
python slurm/launch.py status | cancel [JOB]... | logs JOB
"""

from __future__ import annotations

from megatron_parallel_r1.cluster.command import app
from megatron_parallel_r1.utils.exit import one_line_exit

if __name__ == "__main__":
    with one_line_exit():
        app()
