#!/usr/bin/env bash
# Runs COMMAND as one rank: translates SLURM's variables to torch.distributed's.
set -euo pipefail
export RANK=$SLURM_PROCID WORLD_SIZE=$SLURM_NTASKS LOCAL_RANK=$SLURM_LOCALID
export LOCAL_WORLD_SIZE=${SLURM_STEP_TASKS_PER_NODE%%[(,]*}
export PYTHONPATH=$PWD${PYTHONPATH:+:$PYTHONPATH}  # a container's Python does not have this package
exec "$@"
