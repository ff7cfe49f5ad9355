"""Evaluates a checkpoint in parallel, sequential or majority mode and writes tables with intervals.

    python eval/run.py --checkpoint runs/tiny/release --benchmarks embedded_hard --mode parallel
    python eval/run.py --checkpoint X --benchmarks aime24,aime25,amc23,math500 --mode majority@16 --data DIR
    torchrun --nproc-per-node 8 eval/run.py …          # copies of the model share the work

A killed evaluation resumes, a repeated one reads its records; see docs/evaluation.md.
"""

from __future__ import annotations

from megatron_parallel_r1.evaluation.command import RESUME, evaluate_command
from megatron_parallel_r1.utils.exit import run_and_exit

if __name__ == "__main__":
    run_and_exit(evaluate_command, RESUME)
