"""Evaluates several checkpoints, or all stages of a run, and tests their differences on the same problems.

    python eval/compare.py --run runs/tiny --benchmarks embedded_hard --modes parallel,sequential,majority@4
    python eval/compare.py --checkpoint A --checkpoint B --benchmarks aime24,aime25 --samples 16

Writes tables with paired tests and a plot by checkpoint; reads the records of `run.py`.
"""

from __future__ import annotations

from megatron_parallel_r1.evaluation.command import RESUME, compare_command
from megatron_parallel_r1.utils.exit import run_and_exit

if __name__ == "__main__":
    run_and_exit(compare_command, RESUME)
