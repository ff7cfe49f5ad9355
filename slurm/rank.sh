#!/usr/bin/env bash
# One rank of a step: SLURM's names for its place become torch's, then it is the command.
set -euo pipefail
export RANK=$SLURM_PROCID WORLD_SIZE=$SLURM_NTASKS LOCAL_RANK=$SLURM_LOCALID
export LOCAL_WORLD_SIZE=${SLURM_STEP_TASKS_PER_NODE%%[(,]*}
export PYTHONPATH=$PWD${PYTHONPATH:+:$PYTHONPATH}  # a container's Python has no code of the package's
exec "$@"
