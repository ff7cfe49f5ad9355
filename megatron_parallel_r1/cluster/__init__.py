"""Cluster jobs: submission, bookkeeping of attempts, and status. The scripts in `slurm/` call it."""
