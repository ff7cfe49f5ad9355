#!/usr/bin/env bash
# One stage that samples own traces for SFT: sbatch slurm/distill_stage.sh RECIPE [--stage NAME] [KEY=VALUE]...
#SBATCH --job-name=distill
#SBATCH --nodes=2
#SBATCH --ntasks-per-node=8
#SBATCH --gpus-per-node=8
#SBATCH --cpus-per-task=12
#SBATCH --exclusive
#SBATCH --mem=0
#SBATCH --time=24:00:00
##SBATCH --account=yours
##SBATCH --partition=yours
#SBATCH --signal=B:USR1@300
#SBATCH --requeue
#SBATCH --open-mode=append
#SBATCH --output=%x-%j.out
set -euo pipefail
# sbatch runs a copy of this script: the repository is where it was submitted from, or where it lies.
lies=$(scontrol show job --oneliner "${SLURM_JOB_ID:?submit this script with sbatch}" |
    sed -En '1s|.* Command=(/\S*)/slurm/.*|\1|p') || true
for REPOSITORY in "$SLURM_SUBMIT_DIR" "$lies"; do [[ ! -f $REPOSITORY/slurm/common.sh ]] || break; done
source "$REPOSITORY/slurm/common.sh"
launch distill "$@"
