#!/usr/bin/env bash
# Runs COMMAND as one rank: translates SLURM's variables to torch.distributed's.
set -euo pipefail
export RANK=$SLURM_PROCID WORLD_SIZE=$SLURM_NTASKS LOCAL_RANK=$SLURM_LOCALID
export LOCAL_WORLD_SIZE=${SLURM_STEP_TASKS_PER_NODE%%[(,]*}
# For ranks alone (docs/cluster.md, H100 nodes). A value that is set already stays, an empty one too.
export CUDA_DEVICE_MAX_CONNECTIONS=${CUDA_DEVICE_MAX_CONNECTIONS-1}
export PYTORCH_ALLOC_CONF=${PYTORCH_ALLOC_CONF-expandable_segments:True}
# A container's Python does not have this package.
export PYTHONPATH=${REPOSITORY:-$PWD}${PYTHONPATH:+:$PYTHONPATH}
exec "$@"
